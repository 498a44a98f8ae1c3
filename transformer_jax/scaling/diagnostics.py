"""Whether to believe a fit: residuals, prediction of the largest runs, identifiability, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.approaches import Estimate, Settings
from transformer_jax.scaling.bootstrap import FEW, LEVEL, weights
from transformer_jax.scaling.decide import scatter
from transformer_jax.scaling.fit import Fit, fit, refit
from transformer_jax.scaling.laws import Law, frontier, predict
from transformer_jax.scaling.runs import Points

THINNED = 9
"""Refits of this file begin from every ninth start of the grid."""
_HELD_OUT = 0.1
_RESAMPLES = 400


def residual_summary(fitted: Fit, runs: Points) -> dict[str, Any]:
    """Return RMS and largest residual of log L, and its mean over thirds of the runs by N, D and C.

    Means that go up and down, or up, say that the form bends otherwise than the runs.
    """
    r = fitted.residuals
    thirds = {
        name: [float(r[part].mean()) for part in np.array_split(np.argsort(values, kind="stable"), 3)]
        for name, values in (("N", runs.N), ("D", runs.D), ("C", runs.C))
    }
    return {"rms": _rms(r), "largest": float(np.abs(r).max()), "mean_by_third": thirds}


def _rms(r: np.ndarray) -> float:
    return float(np.sqrt(np.mean(r * r)))


def leave_largest_out(law: Law, runs: Points, by: str, settings: Settings) -> dict[str, Any]:
    """Fit without the largest tenth of the runs (at least 2) and predict them.

    Args:
        law: the form.
        runs: all runs.
        by: "N" or "C", what is largest.
        settings: of the fit.

    Returns:
        How many were held out and from where on; mean and RMS error of log L on them, RMS on the others; and the
        share inside the 95 % interval of a new run. Or "missing", if the others do not determine the form.
    """
    values = getattr(runs, by)
    held = values >= np.sort(values)[-max(2, round(_HELD_OUT * len(runs)))]
    rest, largest = runs.take(~held), runs.take(held)
    if lack := law.missing(rest.N, rest.D):
        return {"missing": lack}
    try:
        fitted = fit(law, rest.N, rest.D, rest.loss, settings.delta, every=THINNED)
    except UserError as error:
        return {"missing": str(error)}
    errors = np.log(largest.loss) - predict(law, fitted.theta[None], largest.N, largest.D)[0]
    draws = weights(rest, "run", _RESAMPLES, settings.seed)
    thetas = refit(fitted, rest.N, rest.D, rest.loss, draws)
    predicted = predict(law, thetas, largest.N, largest.D)
    new_runs = predicted + scatter(fitted, predicted.size).reshape(predicted.shape)
    low, high = np.nanquantile(new_runs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    measured = np.log(largest.loss)
    return {
        "held_out": int(held.sum()),
        "from": float(values[held].min()),
        "to": float(values[held].max()),
        "mean_error": float(errors.mean()),
        "rms_error": _rms(errors),
        "rms_of_the_others": _rms(fitted.residuals),
        "inside_interval": float(np.mean((low <= measured) & (measured <= high))),
        "a": float(frontier(law, fitted.theta).a),
    }


def warnings(estimate: Estimate, runs: Points, held_out: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what makes this fit of a form unreliable, one sentence each; `held_out` by `leave_largest_out`."""
    fitted, found = estimate.fit, []
    assert fitted is not None
    if (decades := np.log10(runs.N.max() / runs.N.min())) < 1:
        found.append(f"N spans only {decades:.1f} decades; exponents need one or more.")
    together = abs(np.corrcoef(np.log(runs.N), np.log(runs.D))[0, 1])
    if together > 0.95:
        found.append(
            f"N and D move together (correlation of their logarithms {together:.2f}): the form cannot tell what each "
            "contributes; add runs at other D/N."
        )
    sizes = int(runs.size.max()) + 1
    if sizes < FEW:
        found.append(f"{sizes} model sizes are too few for the bootstrap by size: its intervals are too narrow.")
    if fitted.reached < 0.01 * fitted.starts:
        found.append(f"only {fitted.reached} of {fitted.starts} starts reach the best optimum.")
    if fitted.runner_up is not None and fitted.runner_up[0] < 1.01 * fitted.objective:
        other = float(frontier(fitted.law, fitted.runner_up[1]).a)
        found.append(f"another optimum is within 1 % of the best: a = {other:.3f}, not {estimate.values['a']:.3f}.")
    if (lost := estimate.lost("run")) > 0.01:
        found.append(f"{lost:.0%} of the resamples have no optimum (an exponent is not positive) and are left out.")
    bounds = estimate.intervals("run")
    loose = [name for name in ("A", "B", "N_c", "D_c", "lambda_a", "lambda_b") if _ratio(bounds.get(name)) > 2]
    if loose:
        found.append(f"{' and '.join(loose)} are known only within a factor of 2 or worse; do not quote them alone.")
    if (floor := bounds.get("E")) is not None and floor[0] < 0.05 * runs.loss.min():
        found.append("the floor E is compatible with 0: the runs are too small to see it.")
    if (a := bounds["a"]) is None or a[1] - a[0] > 0.2:
        found.append("the exponent a is not determined within 0.2; buy more runs (tjax next) before acting on it.")
    for by, row in held_out.items():
        if row.get("inside_interval", 1.0) < 0.8:
            found.append(
                f"only {row['inside_interval']:.0%} of the largest runs by {by} lie inside the 95 % interval that the "
                "others predict for them: extrapolated losses are less certain than their intervals say."
            )
    return found


def _ratio(bounds: list[float] | None) -> float:
    return 1.0 if bounds is None else bounds[1] / max(bounds[0], 1e-300)


def sensitivity(
    law: Law, runs: Points, settings: Settings, outliers: Mapping[str, Points], also_N: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float] | str]:
    """Refit with other choices, one at a time: what was dropped, delta, and which parameters N counts.

    Args:
        law: the form.
        runs: the runs as fitted.
        settings: as fitted.
        outliers: other sets of runs, by what was dropped from them.
        also_N: other counts of the parameters of `runs`.

    Returns:
        Parameters and exponents by variant, or why there are none.
    """
    deltas = {f"delta {settings.delta * factor:g}": settings.delta * factor for factor in (0.1, 10.0)}
    deltas["least squares of log L"] = 1e3
    variants = {name: (points, settings.delta) for name, points in outliers.items()}
    variants |= {name: (runs, delta) for name, delta in deltas.items()}
    for name, N in also_N.items():
        variants[f"N is '{name}'"] = (Points(runs.run, N, runs.D, runs.C, runs.loss), settings.delta)
    result: dict[str, dict[str, float] | str] = {}
    for name, (points, delta) in variants.items():
        try:
            theta = fit(law, points.N, points.D, points.loss, delta, every=THINNED).theta
        except UserError as error:
            result[name] = str(error)
        else:
            values = law.describe(theta) | {"a": frontier(law, theta).a}
            result[name] = {key: float(value) for key, value in values.items()} | {"runs": len(points)}
    return result


def without_outliers(fitted: Fit, runs: Points) -> Points:
    """Leave out the runs whose residual is beyond 4 robust standard deviations."""
    r = fitted.residuals
    spread = 1.4826 * np.median(np.abs(r - np.median(r)))
    return runs.take(np.abs(r - np.median(r)) <= 4 * spread + 1e-12)
