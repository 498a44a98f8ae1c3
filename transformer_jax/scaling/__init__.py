"""Scaling laws: from a table of runs to exponents, intervals, decisions and the next run to buy.

It knows tables only, no model and no training: the runs may be another paper's.
"""
