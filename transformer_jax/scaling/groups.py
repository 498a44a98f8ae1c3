"""Which numbers count as one: model sizes that are the same, runs of the same budget."""

from __future__ import annotations

import numpy as np

SAME = np.log(1.01)
"""Sizes that differ by less count as one."""


def within(x: np.ndarray, width: float) -> np.ndarray:
    """Group numbers into windows no wider than `width`, the fullest window first; no rounding, no chain of neighbours.

    Returns:
        The group of each, numbered upwards by value.
    """
    order = np.argsort(x, kind="stable")
    values, group = x[order], np.full(len(x), -1)
    free = np.ones(len(x), bool)
    starts: list[float] = []
    while free.any():
        left = np.flatnonzero(free)
        # Windows that begin at each free value; earlier groups cut them, since they were taken out.
        ends = np.searchsorted(values[left], values[left] + width + 1e-12, side="right")
        first = int(np.argmax(ends - np.arange(len(left))))
        members = left[first : ends[first]]
        group[members] = len(starts)
        starts.append(float(values[members].mean()))
        free[members] = False
    rank = np.argsort(np.argsort(starts))
    result = np.empty(len(x), int)
    result[order] = rank[group]
    return result
