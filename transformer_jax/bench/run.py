"""One benchmark: what is measured at each point of a sweep, under the same ceilings, with its provenance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import jax

from transformer_jax.bench.batches import length_of, rows_of, shapes_of, sized
from transformer_jax.bench.ceilings import Ceilings, busy, ceilings
from transformer_jax.bench.checkpoint import bench_checkpoint
from transformer_jax.bench.data import bench_data
from transformer_jax.bench.decode import Prompted, bench_decode
from transformer_jax.bench.depth import bench_compile
from transformer_jax.bench.train import Effort, bench_real, bench_train
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.provenance import provenance

What = Literal["train", "decode", "data", "checkpoint", "compile"]


@dataclass(frozen=True)
class Request:
    """What to measure, and where."""

    what: What = "train"
    """The training step, writing tokens, the loader, saving, or compiling at growing depth."""
    batch: tuple[int, ...] = ()
    """Rows of a batch, each a point; empty is the recipe's."""
    length: tuple[int, ...] = ()
    """Tokens of a row, each a point; empty is the recipe's."""
    real_data: bool = False
    """Train on the recipe's own data, and report how long the step waits for it."""
    peak: float = 0.0
    """Peak of one device in TFLOP/s, where its chip is not known; 0 measures it."""
    effort: Effort = field(default_factory=Effort)
    prompted: Prompted = field(default_factory=Prompted)
    layers: tuple[int, ...] = (12, 96)
    """Depths that are compiled."""
    tokens_per_second: float = 0.0
    """What the loader has to feed; 0 times a step on this device."""


def bench(variants: Sequence[tuple[str, Experiment]], request: Request) -> dict[str, Any]:
    """Measure every point: variant by variant, batch by batch, length by length.

    Args:
        variants: experiments, and what tells them apart ("" if there is one).
        request: what to measure.

    Returns:
        JSON-able: the request, the ceilings of the device, the points, the experiment, the provenance. A point of a
        sweep that does not fit in memory says "failed".

    Raises:
        UserError: bad input, or a figure that cannot be.
    """
    if not request.effort.budget > 0 or not 0 < request.effort.width < 1:
        raise UserError("--budget must be positive, and --width a share between 0 and 1.")
    if not request.tokens_per_second >= 0:
        raise UserError(f"--tokens-per-second must be positive, got {request.tokens_per_second:g}.")
    if request.what == "decode" and request.length:
        raise UserError("--length is of training; --what decode reads --prompt tokens and writes --new.")
    experiments = [
        (name, sized(experiment, rows, length))
        for name, experiment in variants
        for rows, length in itertools.product(request.batch or (0,), request.length or (0,))
    ]
    for _, experiment in experiments:
        experiment.check()
    if disturbed := busy():
        say(f"warning: {disturbed}")
    limits = ceilings(variants[0][1].compute.dtype, request.peak)
    if limits.doubt:
        say(f"warning: {limits.doubt}")
    points = []
    for name, experiment in experiments:
        shapes = shapes_of(experiment)
        length = request.prompted.prompt if request.what == "decode" else length_of(shapes)
        say(f"{experiment.name}{name and f' ({name})'}: {rows_of(shapes)} rows of {length} tokens")
        limits = (
            limits if limits.dtype == experiment.compute.dtype else ceilings(experiment.compute.dtype, request.peak)
        )
        points.append({"variant": name, **_measured(experiment, request, limits, alone=len(experiments) == 1)})
    return {
        "what": request.what,
        "experiment": variants[0][1].name,
        "disturbed": disturbed,
        "points": points,
        "request": asdict(request),
        "config": json.loads(variants[0][1].to_json()),
        "provenance": provenance(),
    }


def exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Tell whether a device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _measured(experiment: Experiment, request: Request, limits: Ceilings, *, alone: bool) -> dict[str, Any]:
    """Measure a point; one of several may say that it does not fit in memory."""
    try:
        return _measure(experiment, request, limits)
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        shapes = shapes_of(experiment)
        rows, length = rows_of(shapes), length_of(shapes)
        if alone:
            raise UserError(f"{rows} rows of {length} tokens do not fit in memory; give a smaller --batch.") from error
        say("does not fit in memory")
        return {"rows": rows, "length": length, "failed": "out of memory"}


def _measure(experiment: Experiment, request: Request, limits: Ceilings) -> dict[str, Any]:
    effort = request.effort
    match request.what:
        case "train":
            return (bench_real if request.real_data else bench_train)(experiment, effort, limits)
        case "decode":
            return bench_decode(experiment, request.prompted, effort, limits)
        case "data":
            return bench_data(experiment, effort, limits, request.tokens_per_second)
        case "checkpoint":
            return bench_checkpoint(experiment, effort)
        case "compile":
            return bench_compile(experiment, request.layers)
