"""Which run to buy next: the one after which the interval of a target is expected to be narrowest.

The bootstrap of the form is the belief about its parameters. A new run at (N, D) is one noisy look at log L(N, D), so
its expected effect on the variance of a target t is that of a linear Gaussian update,

    var(t | run) = var(t) - cov(t, log L)^2 / (var(log L) + sigma^2),

with sigma the scatter of the runs around the law: sequential optimal design (c-optimality; Chaloner and Verdinelli
1995, section 2), the Fisher information replaced by the bootstrap covariance. No new loss is needed to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.approaches import Estimate
from transformer_jax.scaling.laws import predict
from transformer_jax.scaling.runs import Points

Target = Literal["exponent", "loss"]
COOLDOWN = 0.2
"""Share of a run that a cooldown branch adds to the constant-rate trunk it leaves (Haegele 2024)."""
_BEYOND = 2.0  # factor by which candidates may leave the table's sizes and D/N
_SIZES, _BUDGETS = 25, (1.0, 1 / 3, 1 / 10, 1 / 30, 1 / 100)


@dataclass(frozen=True)
class Candidate:
    """A run that could be bought."""

    N: float
    D: float
    C: float
    width: float
    """Width of the target's 95 % interval expected after it."""
    shrinks: float
    """Share of the present width that it takes away."""


@dataclass(frozen=True)
class Belief:
    """What the bootstrap knows of the target and of the loss at every candidate, jointly."""

    width: float
    """Present width of the target's 95 % interval."""
    covariance: np.ndarray
    """[1 + M, 1 + M]: the target, then log L at each candidate."""
    noise: float
    """sigma^2."""
    N: np.ndarray
    D: np.ndarray

    @classmethod
    def of(cls, estimate: Estimate, runs: Points, target: Target, at: float, budget: float) -> Belief:
        """Build it for runs that cost at most `budget`, of sizes and D/N near those of the table.

        Args:
            estimate: of a form.
            runs: those it was fitted to.
            target: "exponent" a of N* ~ C^a, or "loss": log L at the best split of budget `at`.
            at: FLOPs at which the loss is to be predicted.
            budget: FLOPs.

        Raises:
            UserError: no run of this budget is near the table, or the form has no optimum to speak of.
        """
        fitted = estimate.fit
        assert fitted is not None
        N, D = _candidates(runs, budget)
        theta = estimate.thetas["run"]
        if target == "exponent":
            goal = estimate.lines["run"].a
        else:
            best = estimate.lines["run"].N(at)[:, None]
            goal = predict(fitted.law, theta, best, at / 6 / best)[:, 0]
        joint = np.concatenate([goal[:, None], predict(fitted.law, theta, N, D)], 1)
        joint = joint[np.isfinite(joint).all(1)]
        if len(joint) < max(len(theta) / 2, 20):
            raise UserError(
                "Most resamples have no optimum: the runs do not determine the form well enough to plan by."
            )
        low, high = np.quantile(joint, [0.025, 0.975], axis=0)
        clipped = np.clip(joint, *np.quantile(joint, [0.01, 0.99], axis=0))  # a few wild resamples must not decide
        r = fitted.residuals
        sigma = 1.4826 * np.median(np.abs(r)) * np.sqrt(len(r) / max(len(r) - fitted.law.parameters, 1))
        covariance = np.cov(clipped, rowvar=False)
        if covariance[0, 0] < 1e-20:
            raise UserError(f"{estimate.name} fixes the target by its form; there is no interval to shrink.")
        return cls(float(high[0] - low[0]), covariance, float(max(sigma, 1e-6) ** 2), N, D)

    def ranking(self) -> list[Candidate]:
        """Return all candidates, the one that shrinks the interval most first; among equals the cheaper one."""
        left = np.sqrt(self._after() / self.covariance[0, 0])
        order = np.lexsort((6 * self.N * self.D, left.round(4)))
        return [self._candidate(i, left[i]) for i in order]

    def _candidate(self, i: int, left: float) -> Candidate:
        N, D = float(self.N[i]), float(self.D[i])
        return Candidate(N, D, 6 * N * D, float(self.width * left), float(1 - left))

    def _after(self) -> np.ndarray:
        """Variance of the target after each candidate."""
        gain = self.covariance[0, 1:] ** 2 / (np.diag(self.covariance)[1:] + self.noise)
        return self.covariance[0, 0] - gain

    def after(self, i: int) -> Belief:
        """Return the belief after candidate i has been run."""
        column = self.covariance[:, 1 + i]
        covariance = self.covariance - np.outer(column, column) / (column[1 + i] + self.noise)
        width = self.width * np.sqrt(covariance[0, 0] / self.covariance[0, 0])
        return Belief(float(width), covariance, self.noise, self.N, self.D)


@dataclass(frozen=True)
class Purchase:
    """One run of a plan."""

    N: float
    D: float
    cost: float
    """FLOPs it adds, the trunk shared with the runs before."""
    width: float
    """Width of the interval expected after it."""


def cheapest_grid(belief: Belief, width: float, budget: float, most: int = 100) -> list[Purchase]:
    """Buy runs until the interval is as narrow as wanted, each time the one that shrinks it most for its cost.

    Runs of one size share a trunk at constant learning rate; each branches off it with a cooldown of a fifth of its
    tokens (Haegele 2024), so a second run of a size costs less than the first.

    Args:
        belief: what is known before.
        width: wanted width of the 95 % interval.
        budget: FLOPs for all runs together.
        most: runs at most.
    """
    bought: list[Purchase] = []
    trunk: dict[float, float] = {}
    left = budget
    new = np.ones(len(belief.N), bool)  # the same run again would share its data and say little
    while belief.width > width and len(bought) < most:
        longest = np.array([trunk.get(float(N), 0.0) for N in belief.N])
        tokens = np.maximum((1 - COOLDOWN) * belief.D - longest, 0) + COOLDOWN * belief.D
        cost = 6 * belief.N * tokens
        gain = -np.log(belief._after() / belief.covariance[0, 0])
        worth = np.where(new & (cost <= left), gain / cost, -np.inf)
        i = int(np.argmax(worth))
        if not worth[i] > 0:
            break
        N, D = float(belief.N[i]), float(belief.D[i])
        trunk[N] = max(trunk.get(N, 0.0), (1 - COOLDOWN) * D)
        left -= float(cost[i])
        new[i] = False
        belief = belief.after(i)
        bought.append(Purchase(N, D, float(cost[i]), belief.width))
    return bought


def _candidates(runs: Points, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens of runs of `budget` and fractions of it, near the table's sizes and D/N.

    Optimal designs lie at the edge of what is allowed, where a form is least to be trusted: so `_BEYOND` is small.
    """
    if budget <= 0:
        raise UserError(f"--budget must be positive FLOPs, got {budget:g}.")
    sizes = np.geomspace(runs.N.min() / _BEYOND, runs.N.max() * _BEYOND, _SIZES)
    ratio = runs.D / runs.N
    pairs: Sequence[tuple[float, float]] = [
        (N, budget * share / 6 / N)
        for N in sizes
        for share in _BUDGETS
        if ratio.min() / _BEYOND <= budget * share / 6 / N**2 <= ratio.max() * _BEYOND
    ]
    if not pairs:
        low, high = 6 * ratio.min() / _BEYOND * sizes[0] ** 2, 6 * ratio.max() * _BEYOND * sizes[-1] ** 2
        raise UserError(
            f"--budget {budget:g} FLOPs buys no run near the table (sizes and D/N within a factor {_BEYOND:g} of its "
            f"own); those cost {low:.2g} to {high:.2g}."
        )
    return np.array([N for N, _ in pairs]), np.array([D for _, D in pairs])
