"""A form fitted to a table, from every start of its grid; and again to each resample.

Coordinates are centred at the geometric means of the table, which makes the fit the same at 1e11 FLOPs as at 1e25.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.laws import Law, predict
from transformer_jax.scaling.minimise import FLOOR, minimise

DELTA = 1e-3
"""Huber's delta on log L (Hoffmann 2022): beyond 0.1 % of the loss, a residual counts by its size, not its square."""


@dataclass(frozen=True)
class Fit:
    """A form fitted to a table."""

    law: Law
    theta: np.ndarray
    """[P], in the units of the table."""
    objective: float
    seconds: float
    """It took, compiling included."""
    starts: int
    reached: int
    """Starts that ended at this optimum (within 1e-6 of its objective)."""
    runner_up: tuple[float, np.ndarray] | None
    """Objective and theta of the next distinct optimum, at most twice as bad."""
    delta: float
    residuals: np.ndarray
    """log L measured - log L of the form, in the order of the runs."""


@dataclass(frozen=True)
class Centred:
    """A table with its geometric means taken out."""

    n: np.ndarray
    d: np.ndarray
    y: np.ndarray
    centre: tuple[float, float, float]

    @classmethod
    def of(cls, N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> Centred:
        """Take logarithms, and their means out."""
        logs = [np.log(values) for values in (N, D, loss)]
        centre = [float(values.mean()) for values in logs]
        n, d, y = (values - mean for values, mean in zip(logs, centre, strict=True))
        return cls(n, d, y, (centre[0], centre[1], centre[2]))

    def out(self, law: Law, theta: np.ndarray) -> np.ndarray:
        """Bring parameters of the centred table into the units of the table itself."""
        return law.shift(theta, *self.centre)

    def into(self, law: Law, theta: np.ndarray) -> np.ndarray:
        """Undo `out`."""
        return law.shift(theta, *(-mean for mean in self.centre))


def fit(
    law: Law, N: np.ndarray, D: np.ndarray, loss: np.ndarray, delta: float = DELTA, every: int = 1, progress: str = ""
) -> Fit:
    """Fit a form to runs from every start of its grid.

    Args:
        law: the form.
        N: parameters of each run.
        D: tokens of each run.
        loss: its loss (any positive unit).
        delta: Huber's.
        every: 1 for all starts, k for every k-th of them.
        progress: what the bar says; "" for none.

    Raises:
        UserError: the runs do not determine the form, or no start converged.
    """
    if lack := law.missing(N, D):
        raise UserError(f"{lack}.")
    began = time.monotonic()
    table = Centred.of(N, D, loss)
    starts = law.starts()[::every]
    found = minimise(law, starts, table.n, table.d, table.y, np.ones(len(N)), delta, progress)
    usable = found.converged & np.isfinite(found.theta).all(1)
    if not usable.any():
        raise UserError(f"{law.name}: none of {len(starts)} starts converged; the losses do not follow the form.")
    objective = np.where(usable, found.objective, np.inf)
    best = int(np.argmin(objective))
    lowest = float(objective[best])
    same = objective <= lowest * (1 + 1e-6) + FLOOR
    other = int(np.argmin(np.where(same, np.inf, objective)))
    near = not same[other] and objective[other] <= 2 * lowest
    theta = table.out(law, found.theta[best])
    return Fit(
        law=law,
        theta=theta,
        objective=lowest,
        seconds=time.monotonic() - began,
        starts=len(starts),
        reached=int(same.sum()),
        runner_up=(float(objective[other]), table.out(law, found.theta[other])) if near else None,
        delta=delta,
        residuals=np.log(loss) - predict(law, theta[None], N, D)[0],
    )


def refit(
    fitted: Fit, N: np.ndarray, D: np.ndarray, loss: np.ndarray, weight_BR: np.ndarray, progress: str = ""
) -> np.ndarray:
    """Fit the same form to B resamples of the runs, each begun at the optimum of all.

    Args:
        fitted: the fit of all runs.
        N: parameters of each run.
        D: tokens of each run.
        loss: its loss.
        weight_BR: how often each resample holds each run.
        progress: what the bar says; "" for none.

    Returns:
        theta [B, P] in the units of the table; NaN where a resample did not converge.
    """
    law, table = fitted.law, Centred.of(N, D, loss)
    start = np.broadcast_to(table.into(law, fitted.theta), (len(weight_BR), law.parameters))
    found = minimise(law, start, table.n, table.d, table.y, weight_BR, fitted.delta, progress)
    return table.out(law, np.where(found.converged[:, None], found.theta, np.nan))
