"""Blocks: layers, attention, positions, and the stack that repeats them."""
