"""What to train: the best split of a budget, the loss to expect, and what another split would cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transformer_jax.scaling.approaches import Estimate
from transformer_jax.scaling.bootstrap import KINDS, Kind, interval
from transformer_jax.scaling.fit import Fit
from transformer_jax.scaling.laws import predict, wasted

FACTORS = (0.1, 0.25, 0.5, 2.0, 4.0, 10.0)
"""Model sizes, in units of the best, whose cost is reported."""

RATIOS = (20.0, 80.0, 320.0, 1280.0)
"""Tokens a parameter at which the loss of over-trained runs is reported."""


def decision(estimate: Estimate, C: float) -> dict[str, Any]:
    """Return N*, D*, D*/N* and, of a form, the loss there at budget C = 6ND, each with 95 % intervals.

    The loss has a further interval, for one new run ("new_run"): that of the law, and the scatter of runs around it.
    """
    N = float(estimate.line.N(C)[0])
    N_samples = {kind: estimate.lines[kind].N(C) for kind in KINDS}
    with np.errstate(over="ignore", divide="ignore"):  # resamples that determine nothing
        D_samples = {kind: C / 6 / own for kind, own in N_samples.items()}
        ratios = {kind: D_samples[kind] / own for kind, own in N_samples.items()}
    result = {
        "N": _with(N, N_samples),
        "D": _with(C / 6 / N, D_samples),
        "tokens_per_parameter": _with(C / 6 / N**2, ratios),
    }
    if estimate.fit is not None:
        law, theta = estimate.fit.law, estimate.fit.theta[None]
        loss = np.exp(predict(law, theta, np.array([N]), np.array([C / 6 / N])))[0, 0]
        samples = {
            kind: np.exp(predict(law, estimate.thetas[kind], own[:, None], D_samples[kind][:, None])[:, 0])
            for kind, own in N_samples.items()
        }
        new_run = samples["run"] * np.exp(scatter(estimate.fit, len(samples["run"])))
        result["loss"] = _with(float(loss), samples) | {"new_run": interval(new_run)}
    return result


def at_ratios(estimate: Estimate, C: float) -> list[dict[str, Any]]:
    """Return the loss of runs of budget C = 6ND at fixed tokens a parameter, from Chinchilla's 20 to far beyond.

    A model that will be used a lot is trained longer than is best for training alone; this is what it costs.
    """
    assert estimate.fit is not None
    rows = []
    for ratio in RATIOS:
        N = np.array([np.sqrt(C / 6 / ratio)])
        loss = np.exp(predict(estimate.fit.law, estimate.fit.theta[None], N, ratio * N))[0, 0]
        samples = {k: np.exp(predict(estimate.fit.law, v, N, ratio * N))[:, 0] for k, v in estimate.thetas.items()}
        new_run = samples["run"] * np.exp(scatter(estimate.fit, len(samples["run"])))
        rows.append(
            {"tokens_per_parameter": ratio, "N": float(N[0]), "D": float(ratio * N[0])}
            | {"loss": _with(float(loss), samples) | {"new_run": interval(new_run)}}
        )
    return rows


def scatter(fit: Fit, count: int) -> np.ndarray:
    """Draw residuals of log L with replacement, widened for the parameters that were fitted to them."""
    runs = len(fit.residuals)
    drawn = np.random.default_rng(0).choice(fit.residuals, size=count)
    return drawn * np.sqrt(runs / max(runs - fit.law.parameters, 1))


def other_splits(estimate: Estimate, C: float) -> list[dict[str, Any]]:
    """Return what models smaller or larger than N* cost at the same budget: loss above the best, and compute wasted.

    "wasted" is the share of C that the best split would not need for the same loss.
    """
    assert estimate.fit is not None
    law, theta = estimate.fit.law, estimate.fit.theta[None]
    best = float(estimate.line.N(C)[0])
    rows = []
    for factor in FACTORS:
        N, D = np.array(factor * best), np.array(C / 6 / (factor * best))
        losses = np.exp(predict(law, theta, np.array([best, factor * best]), C / 6 / np.array([best, factor * best])))[
            0
        ]
        share = {kind: wasted(law, thetas, N, D) for kind, thetas in estimate.thetas.items()}
        rows.append(
            {
                "factor": factor,
                "N": float(N),
                "D": float(D),
                "loss_above_best": float(losses[1] - losses[0]),
                "wasted": _with(float(wasted(law, theta, N, D)[0]), share),
            }
        )
    return rows


def _with(value: float, samples: Mapping[Kind, np.ndarray]) -> dict[str, Any]:
    """Put a value beside its intervals."""
    return {"value": value} | {kind: interval(own) for kind, own in samples.items()}
