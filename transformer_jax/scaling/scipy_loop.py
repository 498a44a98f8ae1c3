"""The usual way to fit approach 3, for comparison: a loop of SciPy's L-BFGS over the starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from transformer_jax.scaling.fit import DELTA
from transformer_jax.scaling.forms import CHINCHILLA

TIGHT = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 100_000, "maxfun": 1_000_000}


@dataclass(frozen=True)
class ScipyLoop:
    """What a loop over starts found, and how long it took."""

    theta: np.ndarray
    """[P], of the best start."""
    objective: float
    """Sum of Huber there, whatever was minimised."""
    seconds: float
    timed: int
    """Starts that were run."""
    starts: int
    """Starts of the whole grid."""

    @property
    def extrapolated(self) -> float:
        """Seconds that the whole grid would take."""
        return self.seconds * self.starts / self.timed


def scipy_loop(
    N: np.ndarray,
    D: np.ndarray,
    loss: np.ndarray,
    delta: float = DELTA,
    timed: int = 100,
    seed: int = 0,
    *,
    mean: bool = False,
    options: dict[str, float] | None = None,
) -> ScipyLoop:
    """Fit approach 3 by L-BFGS with the exact gradient in NumPy, from random starts of the published grid.

    Args:
        N: parameters of each run.
        D: tokens of each run.
        loss: its loss.
        delta: Huber's.
        timed: starts to run; the whole grid if as many or more.
        seed: which of them.
        mean: minimise the mean over runs, not the sum (what Besiroglu 2024 found in the original).
        options: of `scipy.optimize.minimize`; by default `TIGHT`, {} for SciPy's own.
    """
    from scipy.optimize import minimize  # noqa: PLC0415 - half a second, for this alone

    n, d, y = np.log(N), np.log(D), np.log(loss)
    scale = 1 / len(n) if mean else 1.0

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a, alpha, b, beta, e = theta
        z = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        highest = z.max(0)
        p = np.exp(z - highest)
        total = p.sum(0)
        r = highest + np.log(total) - y
        p /= total
        size = np.abs(r)
        value = np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)).sum()
        slope = np.clip(r, -delta, delta)
        gradient = np.array([p[0] @ slope, -(p[0] * n) @ slope, p[1] @ slope, -(p[1] * d) @ slope, p[2] @ slope])
        return scale * value, scale * gradient

    grid = CHINCHILLA.starts()
    natural = CHINCHILLA.shift(grid, float(n.mean()), float(d.mean()), float(y.mean()))
    rows = np.random.default_rng(seed).permutation(len(grid))[:timed]
    began = time.monotonic()
    found = [
        minimize(objective, natural[row], jac=True, method="L-BFGS-B", options=TIGHT if options is None else options)
        for row in rows
    ]
    seconds = time.monotonic() - began
    best = min(found, key=lambda result: result.fun)
    return ScipyLoop(best.x, float(best.fun / scale), seconds, len(rows), len(grid))
