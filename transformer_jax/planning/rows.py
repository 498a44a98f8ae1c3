"""Batches that a mesh divides: everything that has to be set so that it can."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from transformer_jax.config import Experiment, flatten
from transformer_jax.data.packed import PackedText
from transformer_jax.data.row_plan import RowPlan
from transformer_jax.planning.target import Target
from transformer_jax.sharding import BATCH_AXES, mesh_sizes


def overrides_of(before: Experiment, after: Experiment) -> str:
    """Return what has to be typed to turn one experiment into the other."""
    old = dict(flatten(before))
    changed = [(key, value) for key, value in flatten(after) if old.get(key) != value]
    return " ".join(f"--{key.replace('_', '-')} {_typed(value)}".rstrip() for key, value in changed)


def _typed(value: Any) -> str:
    return " ".join(map(_typed, value)) if isinstance(value, tuple) else str(value)


def roomy(experiment: Experiment, target: Target) -> Experiment:
    """Give batches more rows (or tokens) where they have not enough for the mesh and the accumulation to divide."""
    parts = parts_of(experiment, target)
    data: Any = experiment.data
    changed = {}
    for name in ("batch_rows", "held_out_rows"):
        if name in vars(data):
            changed[name] = -(-getattr(data, name) // parts) * parts
    if "batch_tokens" in vars(data):
        changed["batch_tokens"] = max(data.batch_tokens, data.max_length * parts)
    return replace(experiment, data=replace(data, **changed))


def dividing(experiment: Experiment, target: Target) -> Experiment:
    """Set data.rows_multiple so that the mesh and the accumulation divide every batch.

    The stages of a ramp get more rows and fewer steps where they have to, and what is counted in steps (the end of
    training, of the warm-up and of the decay) moves to where as many rows have been read.

    Raises:
        UserError: the mesh does not suit the devices.
    """
    parts, data = parts_of(experiment, target), experiment.data
    if data.rows_multiple % parts == 0:
        return experiment
    node: Any = data
    after = replace(node, rows_multiple=parts)
    if not isinstance(data, PackedText) or not data.ramp:
        return replace(experiment, data=after)
    after = replace(after, ramp=tuple(after.divisible_ramp()))
    was = RowPlan((), data.batch_rows, data.ramp)
    now = RowPlan((), data.batch_rows, after.ramp)

    def moved(step: int) -> int:
        return _step(now, was.rows_before(step))

    optim, train = experiment.optim, experiment.train
    schedule = replace(optim.schedule, warmup=moved(optim.schedule.warmup), steps=moved(optim.schedule.steps))
    return replace(
        experiment,
        data=after,
        optim=replace(optim, schedule=schedule),
        train=replace(train, steps=moved(train.steps)),
    )


def _step(plan: RowPlan, rows: int) -> int:
    """Return the step before which about so many rows have been read."""
    step = 0
    for stage, steps in plan.ramp:
        if rows <= stage * steps:
            return step + round(rows / stage)
        rows, step = rows - stage * steps, step + steps
    return step + round(rows / plan.rows)


def parts_of(experiment: Experiment, target: Target) -> int:
    """Return into how many parts mesh and accumulation cut a batch.

    Raises:
        UserError: the mesh does not suit the devices.
    """
    sizes = mesh_sizes(experiment.mesh, target.devices, target.slices)
    return math.prod(sizes[axis] for axis in BATCH_AXES) * experiment.train.accumulate
