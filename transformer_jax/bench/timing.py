"""Repeating something that waits for its own result until its median is known well enough, or the budget is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transformer_jax.errors import UserError

FEWEST = 3
"""Repeats that are made whatever they cost."""
MOST = 500


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in order.

    Raises:
        UserError: one took no time, or less.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """A clock that stands still or goes back measures nothing."""
        if min(self.seconds) <= 0:
            raise UserError(f"a repeat took {min(self.seconds):.3g} s: the clock is wrong, no figure is given.")

    @property
    def median(self) -> float:
        """Of the seconds."""
        return float(np.median(self.seconds))

    @property
    def bounds(self) -> tuple[float, float]:
        """A 95 % interval of the median by order statistics, which assumes no distribution; of fewer than 6, all."""
        return bounds(self.seconds)

    @property
    def width(self) -> float:
        """Of the interval, as a share of the median."""
        low, high = self.bounds
        return (high - low) / self.median

    def figures(self) -> dict[str, Any]:
        """Return what a report needs, JSON-able, every repeat included."""
        low, high = self.bounds
        n = len(self.seconds)
        return {
            "median": self.median,
            "low": low,
            "high": high,
            "confidence": 0.95 if n >= 6 else 1 - 2.0 ** (1 - n),
            "min": min(self.seconds),
            "samples": n,
            "seconds": list(self.seconds),
        }


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the order statistics between which the median lies with 95 % (the outermost two of fewer than six).

    Their ranks are those of the binomial distribution in its normal approximation, which is off by one at most.
    """
    ordered, n = sorted(values), len(values)
    k = max(round((n - 1.96 * math.sqrt(n)) / 2), 1)
    return ordered[k - 1], ordered[n - k]


def repeat(
    run: Callable[[], object],
    *,
    budget: float,
    width: float = 0.02,
    warmup: int = 2,
    before: Callable[[], object] = lambda: None,
) -> Timing:
    """Time calls of `run`, which must wait for its own result, after `warmup` that do not count.

    Args:
        run: what to time.
        budget: seconds after which no further repeat is begun, those for warming up included.
        width: of the interval, as a share of the median, at which it is narrow enough.
        warmup: calls before the first that counts.
        before: is called before each of them, and not timed.
    """
    began = time.perf_counter()
    for _ in range(warmup):
        before()
        run()
    seconds: list[float] = []
    while len(seconds) < MOST:
        before()
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        seconds.append(end - start)
        if len(seconds) >= FEWEST and end - began > budget:
            break
        if len(seconds) >= 6 and Timing(tuple(seconds)).width < width:
            break
    return Timing(tuple(seconds))
