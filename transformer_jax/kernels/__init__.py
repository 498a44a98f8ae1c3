"""Attention backends and their dispatch."""
