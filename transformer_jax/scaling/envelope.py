"""Approach 1: the envelope of training curves (Hoffmann 2022, 3.1).

At each of 1,500 values of C, the run of the least loss, its curve interpolated in log L against log C. A point of the
envelope counts only where smaller and larger models were alive too: elsewhere the best of those at hand is the edge of
the sweep, not an optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.laws import Frontier
from transformer_jax.scaling.runs import Points, Table

POINTS = 1500
"""Values of C, evenly spaced in its logarithm (Hoffmann 2022)."""
_THIN = 5  # of them, every fifth in the bootstrap
_WINDOW = 7  # rows of a curve that are smoothed together


@dataclass(frozen=True)
class Envelope:
    """Training curves on one grid of C."""

    log_C: np.ndarray
    """[G]"""
    log_loss: np.ndarray
    """[R, G], NaN where a run has not begun or has ended."""
    log_N: np.ndarray
    """[R]"""
    best: np.ndarray
    """[G]: the run of the least loss; -1 where none is alive."""
    rejected: dict[str, int]
    """Points of the grid that do not count, by reason."""

    @classmethod
    def of(cls, table: Table) -> Envelope:
        """Interpolate the training curves and find the envelope.

        Raises:
            UserError: the table holds no curves, or their envelope has no interior.
        """
        curves = table.curves
        runs = curves.take(curves.last_of_each())
        rows = [np.flatnonzero(curves.run == run) for run in runs.run]
        if max(len(part) for part in rows) < 2:
            raise UserError(
                "A1 needs training curves, several rows (losses at growing D) a run, and the column that names the "
                "run (--run); here every run has one row."
            )
        log_C = np.linspace(np.log(curves.C.min()), np.log(curves.C.max()), POINTS)
        log_loss = np.stack([_on_grid(curves.take(part), log_C) for part in rows])
        log_N = np.log(runs.N)
        index, counted, reasons = _interior(log_loss, log_N, np.ones(len(rows), bool))
        found = cls(log_C, log_loss, log_N, np.where(counted, index, -1), reasons)
        sizes = len(np.unique(runs.size[found.best[counted]]))
        if sizes < 2:
            why = "; ".join(f"{count} with {reason}" for reason, count in reasons.items())
            raise UserError(
                f"A1 needs an envelope on which at least two sizes are best with smaller and larger ones beside them: "
                f"there {'is one' if sizes else 'is none'} (of {POINTS} values of C, {why})."
            )
        return found

    def line(self) -> Frontier:
        """Fit log N to log C along the interior of the envelope."""
        return _line(self.log_C, self.log_N, self.best, self.best >= 0)

    def lines(self, weight_BR: np.ndarray) -> Frontier:
        """Find the envelope again in every resample, and fit it."""
        log_C, log_loss = self.log_C[::_THIN], self.log_loss[:, ::_THIN]
        found = []
        for weight in weight_BR:
            index, counted, _ = _interior(log_loss, self.log_N, weight > 0)
            found.append(_line(log_C, self.log_N, index, counted))
        return Frontier(np.concatenate([f.a for f in found]), np.concatenate([f.log_k for f in found]))


def _on_grid(curve: Points, log_C: np.ndarray) -> np.ndarray:
    """Smooth a curve and interpolate it."""
    order = np.argsort(curve.C)
    x, y = np.log(curve.C[order]), np.log(curve.loss[order])
    return np.interp(log_C, x, _smooth(x, y), left=np.nan, right=np.nan)


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Replace each loss by that of the parabola through its neighbours: noise goes, curvature stays."""
    if len(x) < _WINDOW:
        return y
    smooth = np.empty_like(y)
    for i in range(len(x)):
        first = min(max(i - _WINDOW // 2, 0), len(x) - _WINDOW)
        near = slice(first, first + _WINDOW)
        u = (x[near] - x[i]) / max(np.ptp(x[near]), 1e-12)
        smooth[i] = np.polynomial.polynomial.polyfit(u, y[near], 2)[0]
    return smooth


def _interior(
    log_loss: np.ndarray, log_N: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return the best run at each C, whether it counts, and how many points do not, by reason."""
    alive = np.isfinite(log_loss) & present[:, None]
    best = np.where(alive, log_loss, np.inf).argmin(0)
    N = log_N[best]
    smallest = np.where(alive, log_N[:, None], np.inf).min(0) >= N - 0.01
    largest = np.where(alive, log_N[:, None], -np.inf).max(0) <= N + 0.01
    reasons = {
        "the smallest model alive best": int((smallest & ~largest).sum()),
        "the largest model alive best": int((largest & ~smallest).sum()),
        "one size alive": int((smallest & largest).sum()),
    }
    return best, ~(smallest | largest), {reason: count for reason, count in reasons.items() if count}


def _line(log_C: np.ndarray, log_N: np.ndarray, best: np.ndarray, counted: np.ndarray) -> Frontier:
    x, y = log_C[counted], log_N[best[counted]]
    if len(x) < 2 or np.ptp(y) == 0:
        return Frontier(np.array([np.nan]), np.array([np.nan]))
    a = float(np.cov(x, y, bias=True)[0, 1] / x.var())
    return Frontier(np.array([a]), np.array([y.mean() - a * x.mean()]))
