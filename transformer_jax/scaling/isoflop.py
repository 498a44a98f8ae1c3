"""Approach 2: a parabola of the loss in log N at each budget, and a line through their minima (Hoffmann 2022, 3.2).

A minimum counts only where it is one and lies between the smallest and the largest model that was trained: a parabola
that opens downward has a maximum, and one whose vertex lies outside extrapolates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.groups import within
from transformer_jax.scaling.laws import Frontier
from transformer_jax.scaling.runs import Points

EVEN = 0.02
"""Budgets whose FLOPs differ by less (in log C) are taken as equal; others get a term for it in the fit."""
_SIZES, _RUNS_FOR_TERM = 3, 5


@dataclass(frozen=True)
class Budget:
    """The runs of one budget and their parabola."""

    C: float
    """Geometric mean of the FLOPs."""
    runs: Points
    rows: np.ndarray
    """Where the runs are in the table."""
    spread: float
    """log of the largest over the smallest C."""
    coefficients: np.ndarray
    """Loss = c0 + c1 x + c2 x^2 (+ c3 log(C'/C)), with x = (log N - centre) / scale."""
    centre: float
    scale: float
    N: float
    """Where the parabola is least; NaN if nowhere."""
    loss: float
    """The loss there."""
    rejected: str
    """Why the minimum does not count; "" if it does."""

    def curve(self, N: np.ndarray) -> np.ndarray:
        """Return the parabola at N."""
        x = (np.log(N) - self.centre) / self.scale
        return self.coefficients[0] + self.coefficients[1] * x + self.coefficients[2] * x * x


@dataclass(frozen=True)
class IsoFlops:
    """All budgets of a table."""

    budgets: list[Budget]

    @classmethod
    def of(cls, runs: Points, width: float) -> IsoFlops:
        """Group runs by budget, within a factor `width` of C, and fit.

        Raises:
            UserError: fewer than two budgets have an interior minimum.
        """
        group = within(np.log(runs.C), np.log(width))
        parts = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
        found = cls([_budget(runs, rows) for rows in parts])
        accepted = [budget for budget in found.budgets if not budget.rejected]
        if len(accepted) < 2:
            sizes = sum(len(np.unique(budget.runs.size)) >= _SIZES for budget in found.budgets)
            raise UserError(
                f"A2 needs two budgets with an interior minimum: there {'is' if len(accepted) == 1 else 'are'} "
                f"{len(accepted) or 'none'}, of {len(parts)} groups of equal C (within a factor {width:g}), {sizes} of "
                f"them with the {_SIZES} sizes it takes. First reason: "
                f"{next(f'C = {b.C:.3g}: {b.rejected}' for b in found.budgets if b.rejected)}."
            )
        return found

    def line(self) -> Frontier:
        """Fit log N* to log C over all accepted budgets."""
        return self.lines(np.ones((1, sum(len(budget.rows) for budget in self.budgets))))

    def lines(self, weight_BR: np.ndarray) -> Frontier:
        """Do everything again on every resample, the check of the minima included; NaN where under two are left."""
        log_N = np.stack([_minima(budget, weight_BR[:, budget.rows])[0] for budget in self.budgets])
        log_C = np.log([budget.C for budget in self.budgets])[:, None]
        ok = np.isfinite(log_N)
        count = np.maximum(ok.sum(0), 1)
        x = np.where(ok, log_C - (log_C * ok).sum(0) / count, 0.0)
        mean_N = np.where(ok, log_N, 0.0).sum(0) / count
        with np.errstate(all="ignore"):
            a = (x * np.where(ok, log_N, 0.0)).sum(0) / np.where(ok.sum(0) >= 2, (x * x).sum(0), np.nan)
        return Frontier(a, mean_N - a * (log_C * ok).sum(0) / count)


def _budget(runs: Points, rows: np.ndarray) -> Budget:
    points = runs.take(rows)
    x, log_C = np.log(points.N), np.log(points.C)
    budget = Budget(
        C=float(np.exp(log_C.mean())),
        runs=points,
        rows=rows,
        spread=float(np.ptp(log_C)),
        coefficients=np.full(3, np.nan),
        centre=float(x.mean()),
        scale=float(np.ptp(x)) or 1.0,
        N=np.nan,
        loss=np.nan,
        rejected="",
    )
    sizes = len(np.unique(points.size))
    if sizes < _SIZES:
        return replace(budget, rejected=f"{sizes} model size{'s' if sizes > 1 else ''}; a parabola takes {_SIZES}")
    if budget.spread > EVEN and len(rows) < _RUNS_FOR_TERM:
        spread = f"C differs by {np.expm1(budget.spread):.0%} within the budget"
        return replace(budget, rejected=f"{spread}; {_RUNS_FOR_TERM} runs are needed to allow for it")
    log_N, coefficients = _minima(budget, np.ones((1, len(rows))))
    budget = replace(budget, coefficients=coefficients[0])
    c0, c1, c2 = budget.coefficients[:3]
    if c2 <= 0:
        return replace(budget, rejected="the parabola opens downward: it has no minimum")
    vertex = float(np.exp(budget.centre - budget.scale * c1 / (2 * c2)))
    budget = replace(budget, N=vertex, loss=float(c0 - c1 * c1 / (4 * c2)))
    if np.isnan(log_N[0]):
        trained = f"{points.N.min():.3g} to {points.N.max():.3g}"
        return replace(budget, rejected=f"the minimum {vertex:.3g} lies outside the sizes trained, {trained}")
    return budget


def _minima(budget: Budget, weight_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the parabola to every resample: log N of its minimum, NaN where it does not count, and the coefficients."""
    if budget.rejected:
        return np.full(len(weight_BM), np.nan), np.full((len(weight_BM), 3), np.nan)
    points = budget.runs
    x = (np.log(points.N) - budget.centre) / budget.scale
    columns = [np.ones_like(x), x, x * x]
    if budget.spread > EVEN:
        columns.append(np.log(points.C / budget.C))
    X = np.stack(columns, 1)
    weight_BM = weight_BM.astype(float)
    gram = np.einsum("bm,mp,mq->bpq", weight_BM, X, X)
    moment = np.einsum("bm,mp,m->bp", weight_BM, X, points.loss)
    coefficients = np.einsum("bpq,bq->bp", np.linalg.pinv(gram, rcond=1e-12, hermitian=True), moment)
    size = points.size
    present = weight_BM > 0
    sizes = sum((present[:, size == s].any(1)).astype(int) for s in range(size.max() + 1))
    low = np.where(present, x, np.inf).min(1)
    high = np.where(present, x, -np.inf).max(1)
    with np.errstate(all="ignore"):
        vertex = -coefficients[:, 1] / (2 * coefficients[:, 2])
    good = (sizes >= _SIZES) & (coefficients[:, 2] > 0) & (low < vertex) & (vertex < high)
    return np.where(good, budget.centre + budget.scale * vertex, np.nan), coefficients


def along_curves(curves: Points, budgets: np.ndarray) -> Points:
    """Read every training curve at each budget, interpolated in log L against log C: IsoFLOP points without new runs.

    It is what a run shorter by design would have reached only where the schedule is the same up to there (Porian 2024,
    section 3). A curve that has not begun, or has ended, has no point at that budget.
    """
    found = []
    for run in np.unique(curves.run):
        rows = np.flatnonzero(curves.run == run)
        rows = rows[np.argsort(curves.C[rows])]
        inside = (budgets >= curves.C[rows[0]]) & (budgets <= curves.C[rows[-1]])
        C, N = budgets[inside], float(curves.N[rows[0]])
        loss = np.exp(np.interp(np.log(C), np.log(curves.C[rows]), np.log(curves.loss[rows])))
        found.append(Points(np.full(len(C), run), np.full(len(C), N), C / (6 * N), C, loss))
    return Points(*(np.concatenate([getattr(p, f.name) for p in found]) for f in fields(Points)))
