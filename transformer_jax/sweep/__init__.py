"""Sweeps: many experiments trained one after another into one table of runs, from which `tjax fit` makes a law.

grid.py      plans: sizes x budgets (IsoFLOP), rates x widths
counts.py    what a run is by the law's variables: N, D, C
trunk.py     runs that begin alike are trained once up to where they part
cost.py      what a sweep takes, before it begins
row.py       a run as a row of the table
run.py       the sweep itself; killed, it goes on where it stood
register.py  a loss predicted on record before the run it is about
"""
