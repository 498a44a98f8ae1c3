"""The approaches side by side: what each needs, its exponent N* ~ C^a, and its bootstrap.

A1 and A2 fit lines through optima that they find (Hoffmann 2022, sections 3.1 and 3.2); the others fit a form of the
loss to all runs and derive the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.bootstrap import KINDS, Kind, interval, weights
from transformer_jax.scaling.envelope import Envelope
from transformer_jax.scaling.fit import Fit, fit, refit
from transformer_jax.scaling.forms import CHINCHILLA, KAPLAN, OVER_TRAINING
from transformer_jax.scaling.isoflop import IsoFlops
from transformer_jax.scaling.laws import Frontier, Law, frontier
from transformer_jax.scaling.runs import Points, Table

Approach = Literal["A1", "A2", "A3", "kaplan", "over-training"]
APPROACHES: dict[Approach, str] = {
    "A1": "envelope of training curves (Hoffmann 2022, 3.1)",
    "A2": "IsoFLOP parabolas (Hoffmann 2022, 3.2)",
    "A3": f"{CHINCHILLA.formula} (Hoffmann 2022, 3.3)",
    "kaplan": f"{KAPLAN.formula} (Kaplan 2020, 1.5)",
    "over-training": f"{OVER_TRAINING.formula} (Gadre 2024, 4)",
}
_LAWS: Mapping[str, Law] = {law.name: law for law in (CHINCHILLA, KAPLAN, OVER_TRAINING)}


@dataclass(frozen=True)
class Settings:
    """How to fit."""

    delta: float = 1e-3
    """Huber's delta on log L; beyond it a residual counts by its size, not its square."""
    bootstraps: int = 4000
    """Resamples of each kind, by run and by size."""
    seed: int = 0
    """Of the resampling."""
    isoflop_width: float = 1.25
    """Runs whose FLOPs lie within this factor are one budget of approach 2."""

    def check(self) -> None:
        """Raise `UserError` for settings that mean nothing."""
        if self.delta <= 0:
            raise UserError(f"--delta must be positive, got {self.delta:g}.")
        if self.bootstraps < 20:
            raise UserError(f"--bootstraps must be at least 20 for an interval, got {self.bootstraps}.")
        if self.isoflop_width <= 1:
            raise UserError(f"--isoflop-width must be above 1, got {self.isoflop_width:g}.")


@dataclass(frozen=True)
class Estimate:
    """What one approach says."""

    name: Approach
    values: dict[str, float]
    """Parameters by name, and "a", "b", "k": N* = k C^a, D* ~ C^b."""
    line: Frontier
    """Of all runs: one entry."""
    samples: dict[Kind, dict[str, np.ndarray]] = field(repr=False)
    """Values by resample, for each kind of resampling."""
    lines: dict[Kind, Frontier] = field(repr=False)
    """Of every resample."""
    fit: Fit | None = None
    """Of a form of the loss."""
    thetas: dict[Kind, np.ndarray] = field(default_factory=dict, repr=False)
    """Parameters of the form, by resample."""
    envelope: Envelope | None = None
    isoflops: IsoFlops | None = None

    def intervals(self, kind: Kind) -> dict[str, list[float] | None]:
        """Return the 95 % interval of every value."""
        return {name: interval(samples) for name, samples in self.samples[kind].items()}

    def lost(self, kind: Kind) -> float:
        """Return the share of resamples for which the approach found no optimum."""
        return float(np.mean(~np.isfinite(self.samples[kind]["a"])))


def estimate(name: Approach, table: Table, settings: Settings) -> Estimate:
    """Apply one approach.

    Raises:
        UserError: the table cannot support it; says what is missing.
    """

    def resample(runs: Points) -> dict[Kind, np.ndarray]:
        return {kind: weights(runs, kind, settings.bootstraps, settings.seed) for kind in KINDS}

    if name == "A1":
        envelope = Envelope.of(table)
        resamples = resample(table.curves.take(table.curves.last_of_each()))
        return _from_lines(
            name, envelope.line(), {k: envelope.lines(w) for k, w in resamples.items()}, envelope=envelope
        )
    resamples = resample(table.runs)
    if name == "A2":
        isoflops = IsoFlops.of(table.runs, settings.isoflop_width)
        return _from_lines(
            name, isoflops.line(), {k: isoflops.lines(w) for k, w in resamples.items()}, isoflops=isoflops
        )
    law, runs = _LAWS[name], table.runs
    if lack := law.missing(runs.N, runs.D):
        hint = "; --every-row fits all rows of the training curves" if len(runs) < len(table.curves) else ""
        raise UserError(f"{lack}{hint}.")
    fitted = fit(law, runs.N, runs.D, runs.loss, settings.delta, progress=f"{name}: starts")
    if np.isnan(frontier(law, fitted.theta).a):
        found = ", ".join(f"{key} {value:.3g}" for key, value in law.describe(fitted.theta).items())
        raise UserError(f"{name}: the best fit ({found}) has an exponent that is not positive, so no best split of C.")
    thetas = {
        kind: refit(fitted, runs.N, runs.D, runs.loss, weight, progress=f"{name}: resamples by {kind}")
        for kind, weight in resamples.items()
    }

    def values(theta: np.ndarray) -> dict[str, np.ndarray]:
        return law.describe(theta) | _exponents(frontier(law, theta))

    return Estimate(
        name,
        {key: float(value) for key, value in values(fitted.theta).items()},
        frontier(law, fitted.theta[None]),
        {kind: values(theta) for kind, theta in thetas.items()},
        {kind: frontier(law, theta) for kind, theta in thetas.items()},
        fit=fitted,
        thetas=thetas,
    )


def _from_lines(name: Approach, line: Frontier, lines: dict[Kind, Frontier], **found: Any) -> Estimate:
    values = {key: float(value[0]) for key, value in _exponents(line).items()}
    return Estimate(name, values, line, {kind: _exponents(line) for kind, line in lines.items()}, lines, **found)


def _exponents(line: Frontier) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        return {"a": line.a, "b": 1 - line.a, "k": np.exp(line.log_k)}
