"""Plans of sweeps: sizes x budgets for a law, rates x widths for a transfer of rates.

A sweep is a list of experiments; these functions write the usual ones. With the schedule "wsd" (constant, then a
cooldown: Haegele 2024), the runs of one size share all steps before their cooldowns, and the sweep trains those once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformer_jax.config import Experiment, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.sweep.counts import counts

EVALUATIONS = 10
"""Times that a run is scored on its way."""


def lasting(experiment: Experiment, steps: int, name: str) -> Experiment:
    """Let a run last `steps` steps, its schedule with it, and score it `EVALUATIONS` times."""
    schedule = replace(experiment.optim.schedule, steps=steps, warmup=min(experiment.optim.schedule.warmup, steps // 5))
    rhythm = max(steps // EVALUATIONS, 1)
    train = replace(experiment.train, steps=steps, eval_every=rhythm, save_every=max(steps // 3, 1))
    return replace(experiment, name=name, optim=replace(experiment.optim, schedule=schedule), train=train)


def iso_flops(
    base: Experiment,
    models: Sequence[ModelConfig],
    budgets: Sequence[float],
    *,
    fewest_steps: int = 50,
    most_tokens: float = math.inf,
) -> list[Experiment]:
    """Lay out an IsoFLOP grid: every model for as long as each budget lasts (Hoffmann 2022, section 3.2).

    Args:
        base: data, rates and everything else that is the same; its warm-up must suit the shortest run.
        models: one a size.
        budgets: FLOPs by 6ND.
        fewest_steps: a run of fewer is left out: it would be all warm-up.
        most_tokens: a run of more is left out: it would read its text over and over.

    Raises:
        UserError: no run of any budget is long enough.
    """
    runs = []
    for model in models:
        sized = replace(base, model=model)
        one = counts(lasting(sized, 1, base.name))
        for budget in sorted(budgets):
            steps = round(budget / (6 * one.N * one.D))
            if steps >= fewest_steps and steps * one.D <= most_tokens:
                runs.append(lasting(sized, steps, f"{base.name}-n{short(one.N)}-c{budget:.3g}".replace("+", "")))
    if not runs:
        raise UserError(
            f"{base.name}: {min(budgets):g} to {max(budgets):g} FLOPs give no model {fewest_steps} steps within "
            f"{most_tokens:g} tokens."
        )
    return _same_warmup(runs)


def _same_warmup(runs: Sequence[Experiment]) -> list[Experiment]:
    """Warm all runs up alike, so that those of one size begin alike."""
    warmup = min(run.optim.schedule.warmup for run in runs)
    return [replace(run, optim=replace(run.optim, schedule=replace(run.optim.schedule, warmup=warmup))) for run in runs]


def rates(base: Experiment, peaks: Sequence[float]) -> list[Experiment]:
    """Repeat an experiment at several peak learning rates."""
    return [
        replace(
            base,
            name=f"{base.name}-lr{peak:.2g}",
            optim=replace(base.optim, schedule=replace(base.optim.schedule, peak=peak)),
        )
        for peak in peaks
    ]


def short(number: float) -> str:
    """Write a count for a name: 12k, 1.3m."""
    for size, letter in ((1e9, "b"), (1e6, "m"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(round(number))
