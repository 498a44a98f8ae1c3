"""Compiling: seconds against the number of layers, which a scan over them should keep flat."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from transformer_jax.bench.batches import length_of, rows_of, shapes_of
from transformer_jax.bench.compiled import compile_step
from transformer_jax.bench.train import checked
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.train import Trainer

DEPTHS = ("layers", "encoder_layers", "decoder_layers")
"""Fields of a model that say how often a layer is repeated."""


def bench_compile(experiment: Experiment, layers: tuple[int, ...]) -> dict[str, Any]:
    """Compile the training step at every depth; compute.layers=auto is taken for scan.

    Raises:
        UserError: no depths, or a model without layers.
    """
    if not layers or min(layers) < 1:
        raise UserError(f"--layers must be at least 1, got {layers}.")
    checked(experiment)
    depths: list[dict[str, Any]] = []
    for depth in layers:
        trainer = Trainer.of(at_depth(experiment, depth))
        say(f"compiling {depth} layers")
        step = compile_step(trainer, experiment.data.batch_shapes(), warm=False)
        depths.append(
            {
                "layers": depth,
                "how": trainer.experiment.compute.layers,
                "trace": step.trace_seconds,
                "compile": step.cold_seconds,
                "memory": step.memory,
            }
        )
    first, last = (float(depths[i]["trace"] + depths[i]["compile"]) for i in (0, -1))
    shapes = shapes_of(experiment)
    return {"rows": rows_of(shapes), "length": length_of(shapes), "depths": depths, "ratio": last / first}


def at_depth(experiment: Experiment, depth: int) -> Experiment:
    """Return the experiment with so many layers (on each side), scanned unless it says otherwise."""
    names = {field.name for field in fields(experiment.model)} & set(DEPTHS)
    if not names:
        raise UserError(f"{experiment.name}: its model has no number of layers to change.")
    sizes: dict[str, Any] = dict.fromkeys(names, depth)
    compute = experiment.compute
    compute = replace(compute, layers="scan") if compute.layers == "auto" else compute
    return replace(experiment, model=replace(experiment.model, **sizes), compute=compute)
