"""Resampling: by run, and by model size, since runs of one size share what is peculiar to it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from transformer_jax.scaling.runs import Points

Kind = Literal["run", "size"]
KINDS: tuple[Kind, ...] = ("run", "size")
LEVEL = 0.95
FEW = 8
"""Below this many clusters, a bootstrap over them is too narrow to rely on (Cameron 2008)."""


def weights(runs: Points, kind: Kind, resamples: int, seed: int) -> np.ndarray:
    """Return how often each resample holds each row: [B, R].

    Args:
        runs: their rows.
        kind: "run" draws runs with replacement, "size" draws model sizes; each with all its rows.
        resamples: B.
        seed: same seed, same draws.
    """
    group = np.unique(runs.run, return_inverse=True)[1] if kind == "run" else runs.size
    count = int(group.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws.astype(np.uint16)[:, group]


def interval(samples: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """Return the percentile interval [low, high] of the resamples that have a value; None if under half have one."""
    known = samples[np.isfinite(samples)]
    if len(known) < max(len(samples) / 2, 2):
        return None
    tail = (1 - level) / 2
    return [float(bound) for bound in np.quantile(known, [tail, 1 - tail])]
