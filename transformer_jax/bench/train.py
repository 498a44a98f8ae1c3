"""The training step: every one waited for, on random batches or on those of the recipe's own loader."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from transformer_jax.bench.account import (
    RANKED,
    Work,
    check_complete,
    device_memory,
    roofline,
    settled,
    shares,
    work_of,
)
from transformer_jax.bench.batches import Shapes, length_of, random_batch, read_ahead_of, rows_of, shapes_of
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.compiled import compile_step
from transformer_jax.bench.timing import FEWEST, Timing, repeat
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.flops import tokens_of
from transformer_jax.nn.module import Params, parameter_count
from transformer_jax.sharding import batch_shards, make_mesh, replicated
from transformer_jax.train import Trainer, TrainState

CORNER = 4
"""Entries along each dimension of a parameter by which is told whether a step changed it."""
PATIENCE = 10
"""A run whose first steps take at least so many budgets is refused."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    budget: float = 30.0
    """Seconds of repeats of each point, compiling not counted."""
    width: float = 0.02
    """Share of the median at which its 95 % interval is narrow enough."""
    warm_cache: bool = True
    """Compile a second time, from the cache."""


def bench_train(experiment: Experiment, effort: Effort, ceilings: Ceilings) -> dict[str, Any]:
    """Time the training step on a random batch of the experiment's largest size.

    Raises:
        UserError: a batch that the mesh cannot divide, a step that is out of reach, that leaves work out or that is
            faster than the device can be.
    """
    trainer, shapes = checked(experiment), shapes_of(experiment)
    work = work_of(trainer, shapes)
    floor = (work.hardware or 0) / (ceilings.matmul * trainer.mesh.size)
    if floor * 5 > PATIENCE * effort.budget:
        raise UserError(
            f"a step of {rows_of(shapes)} rows of {length_of(shapes)} tokens takes at least {floor:,.0f} s on this "
            "device; make it smaller, for example with --batch 1, or give more --budget."
        )
    compiled = compile_step(trainer, experiment.data.batch_shapes(), warm=effort.warm_cache)
    before = device_memory()
    batch, state = trainer.put(random_batch(experiment)), trainer.init()
    watch = Watch(trainer, state)

    def run() -> None:
        nonlocal state
        state, metrics = compiled.call(state, batch)
        jax.block_until_ready(state)
        watch.see(metrics)

    timing = repeat(run, budget=effort.budget, width=effort.width)
    watch.check(state)
    check_tokens(watch.tokens, tokens_of(shapes))
    after, ceilings = device_memory(), settled(work, timing.median, ceilings, trainer.mesh.size)
    point = _point(trainer, shapes, timing, watch.tokens)
    return point | {
        "compile_seconds": {
            "trace": compiled.trace_seconds,
            "cold": compiled.cold_seconds,
            "warm": compiled.warm_seconds,
        },
        "memory": {
            "compiler": compiled.memory,
            "device_peak": after,
            "device_peak_is_of": None if after is None else "this point" if after != before else "an earlier point",
        },
        "model_flops": work.model,
        "hardware_flops": work.hardware,
        **shares(work, timing.median, ceilings, trainer.mesh.size),
        "roofline": roofline(work, compiled.traffic, timing.median, ceilings, trainer.mesh.size),
        "hlo": compiled.hlo,
        "ceilings": asdict(ceilings),
    }


def checked(experiment: Experiment) -> Trainer:
    """Set an experiment up; raises `UserError` if the mesh cannot divide its largest batch."""
    parts = batch_shards(make_mesh(experiment.mesh)) * experiment.train.accumulate
    rows = rows_of(shapes_of(experiment))
    if rows % parts:
        raise UserError(f"--batch {rows}: {parts} parts (devices x train.accumulate) do not divide it.")
    return Trainer.of(experiment)


def step_seconds(experiment: Experiment, steps: int) -> tuple[float, list[float]]:
    """Take a few steps on a random batch: seconds of the first, set-up and compiling included, and of each after it."""
    began = time.perf_counter()
    trainer = checked(experiment)
    batch, state, step = trainer.put(random_batch(experiment)), trainer.init(), trainer.train_step()
    state, _ = jax.block_until_ready(step(state, batch))
    ends = [time.perf_counter()]
    for _ in range(steps):
        state, _ = jax.block_until_ready(step(state, batch))
        ends.append(time.perf_counter())
    return ends[0] - began, [end - start for start, end in itertools.pairwise(ends)]


def _point(trainer: Trainer, shapes: Shapes, timing: Timing, tokens: float) -> dict[str, Any]:
    return {
        "rows": rows_of(shapes),
        "length": length_of(shapes),
        "setup": trainer.describe(),
        "devices": trainer.mesh.size,
        "mesh": dict(trainer.mesh.shape),
        "compute": asdict(trainer.skeleton.compute),
        "parameters": parameter_count(trainer.skeleton.abstract),
        "step_seconds": timing.figures(),
        "tokens_per_second": tokens / timing.median,
        "tokens_per_second_padded": tokens_of(shapes) / timing.median,
    }


def check_tokens(tokens: float, positions: int) -> None:
    """Raise `UserError` if a step says to have read more tokens than there are places, or none."""
    if not 0 < tokens <= positions:
        raise UserError(f"{tokens:,.0f} tokens are counted on {positions:,} positions; no figure is given.")


class Watch:
    """Sees to it that steps do something: parameters change, the loss is a number."""

    def __init__(self, trainer: Trainer, state: TrainState) -> None:
        self._corners = jax.jit(_corners, out_shardings=replicated(trainer.mesh))
        self._before = jax.device_get(self._corners(state.params))
        self._losses: list[float] = []
        self.tokens = 0.0
        """Real tokens of the last batch, as its objective counts them."""

    def see(self, metrics: dict[str, jax.Array]) -> None:
        """Fetch the loss, which cannot be had before the step is done, whatever the device says."""
        self._losses.append(float(metrics["loss"]))
        self.tokens = float(metrics["tokens"])

    def check(self, state: TrainState) -> None:
        """Raise `UserError` if nothing was learned."""
        if not all(map(math.isfinite, self._losses)):
            raise UserError(f"the loss is {self._losses[-1]}: steps on such numbers are not timed.")
        after = jax.device_get(self._corners(state.params))
        changed = sum(not np.array_equal(a, b) for a, b in zip(self._before, after, strict=True))
        # Not all need to: a norm's 1 swallows a very small step, and no row may hold a special token.
        if 2 * changed < len(after):
            raise UserError(
                f"{len(self._losses)} steps changed {changed or 'no'} parameter{'s' * (changed > 1)} of {len(after)}: "
                "the step leaves the update out, or the learning rate is 0; no figure is given."
            )


def _corners(params: Params) -> list[jax.Array]:
    return [leaf[tuple(slice(CORNER) for _ in leaf.shape)] for leaf in jax.tree.leaves(params)]


def bench_real(experiment: Experiment, effort: Effort, ceilings: Ceilings) -> dict[str, Any]:
    """Time training on the recipe's own data, and how long the step waits for it.

    Steps that compile (a new shape of batch) do not count. What was read ahead at the start and beside them is used up
    first, so that a loader that is too slow shows at once.

    Raises:
        UserError: as `bench_train`, or there are no data.
    """
    trainer = checked(experiment)
    check_complete(trainer)
    data = experiment.data.open(experiment.model.vocab_size)
    iterator = data.train_iterator(experiment.train.seed, jax.process_index(), jax.process_count())
    ahead = read_ahead_of(experiment.data) + 1

    def use_up() -> None:
        for _ in range(ahead):
            next(iterator)

    start = time.perf_counter()
    use_up()
    loader = ahead / (time.perf_counter() - start)
    state, step = trainer.init(), trainer.train_step()
    watch, known = Watch(trainer, state), set[tuple[Any, ...]]()
    waits, totals = list[float](), list[float]()
    tokens, positions, flops = 0.0, 0, 0
    while len(totals) < FEWEST or sum(totals) < effort.budget:
        start = time.perf_counter()
        batch = next(iterator)
        arrived = time.perf_counter()
        state, metrics = step(state, trainer.put(batch))
        jax.block_until_ready(state)
        watch.see(metrics)
        end = time.perf_counter()
        shapes = {name: array.shape for name, array in batch.items() if name != "example"}
        if (key := tuple(sorted(shapes.items()))) not in known:
            known.add(key)
            use_up()
            continue
        waits.append(arrived - start)
        totals.append(end - start)
        tokens += watch.tokens
        positions += tokens_of(shapes) * jax.process_count()
        flops += 3 * experiment.model.forward_flops(shapes) * jax.process_count()
    watch.check(state)
    check_tokens(tokens, positions)
    timing, seconds, work = Timing(tuple(totals)), sum(totals), Work({RANKED: flops}, None)
    ceilings = settled(work, seconds, ceilings, trainer.mesh.size)
    point = _point(trainer, shapes_of(experiment), timing, 0.0)
    return point | {
        "data": data.describe(),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_padded": positions / seconds,
        "padding": 1 - tokens / positions,
        "shapes": len(known),
        "input_bound_share": sum(waits) / seconds,
        "loader_batches_per_second": loader,
        "wait_seconds": Timing(tuple(waits)).figures(),
        **shares(work, seconds, ceilings, trainer.mesh.size),
        "ceilings": asdict(ceilings),
    }
