"""Tables of runs on surfaces that are known, for the tests of scaling laws."""

from __future__ import annotations

import numpy as np

from transformer_jax.scaling.forms import CHINCHILLA, KAPLAN, OVER_TRAINING
from transformer_jax.scaling.laws import Law, frontier, predict
from transformer_jax.scaling.runs import Points

SURFACES: dict[str, tuple[Law, np.ndarray]] = {
    "A3": (CHINCHILLA, np.array([np.log(8.0), 0.35, np.log(60.0), 0.40, np.log(1.7)])),
    "kaplan": (KAPLAN, np.array([14.0, 0.8, 16.0, 0.11])),
    "over-training": (OVER_TRAINING, np.array([np.log(9.0), np.log(50.0), 0.37, np.log(1.5)])),
}
"""Parameters in natural units, for sizes of a home: some 1e4 parameters at 1e11 FLOPs."""


def iso_flops(law: Law, theta: np.ndarray, first: float, budgets: int = 6, sizes: int = 9, span: float = 8.0) -> Points:
    """Runs without noise: budgets a factor 4 apart, sizes from 1/span to span times the best."""
    best = frontier(law, theta[None])
    C = np.repeat(first * 4.0 ** np.arange(budgets), sizes)
    N = np.array([best.N(c)[0] for c in C]) * np.tile(np.geomspace(1 / span, span, sizes), budgets)
    return Points(np.arange(len(C)), N, C / 6 / N, C, np.exp(predict(law, theta[None], N, C / 6 / N))[0])


def noisy(points: Points, sigma: float, seed: int) -> Points:
    """Multiply losses by log-normal noise."""
    noise = np.exp(sigma * np.random.default_rng(seed).standard_normal(len(points)))
    return Points(points.run, points.N, points.D, points.C, points.loss * noise)


def write_csv(points: Points, path, header: str = "n,d,c,loss") -> None:
    """Write a table; columns in the order N, D, C, loss."""
    rows = zip(points.N, points.D, points.C, points.loss, strict=True)
    path.write_text("\n".join([header, *(",".join(repr(float(cell)) for cell in row) for row in rows)]) + "\n")
