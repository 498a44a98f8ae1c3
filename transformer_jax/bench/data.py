"""The loader alone: what one core of the host makes ready, beside what a step uses up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np

from transformer_jax.bench.batches import length_of, read_ahead_of, rows_of, shapes_of
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.timing import Timing
from transformer_jax.bench.train import Effort, bench_train
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.flops import tokens_of
from transformer_jax.logs import say

KEPT = 2**28
"""Most bytes of batches that are held until they are counted."""

BLOCKS = 30


def bench_data(
    experiment: Experiment, effort: Effort, ceilings: Ceilings, tokens_per_second: float = 0.0
) -> dict[str, Any]:
    """Take batches as fast as one core makes them; those that were read ahead do not count.

    Args:
        experiment: whose data and batches.
        effort: seconds to take batches for; the interval is not used, since batches come in bursts.
        ceilings: of the device, for the step.
        tokens_per_second: what the loader has to feed; 0 times the step on this device.

    Raises:
        UserError: there are no data, or the step cannot be timed here.
    """
    data = experiment.data.open(experiment.model.vocab_size)
    say(data.describe())
    taken, gaps, held = list[Any](), list[float](), 0
    with one_core() as core:
        iterator = data.train_iterator(experiment.train.seed, jax.process_index(), jax.process_count())
        for _ in range(read_ahead_of(experiment.data) + 1):
            next(iterator)
        began, busy = time.perf_counter(), time.process_time()
        last = began
        while (last - began < effort.budget and held < KEPT) or not taken:
            taken.append(next(iterator))
            now = time.perf_counter()
            gaps.append(now - last)
            held += sum(array.nbytes for array in taken[-1].values())
            last = now
        seconds, busy = last - began, time.process_time() - busy
    tokens = sum(float(experiment.objective.weights(batch)["tokens"]) for batch in taken)
    positions = sum(tokens_of({name: array.shape for name, array in batch.items()}) for batch in taken)
    examples = sum(int((batch["example"] >= 0).sum()) for batch in taken)
    wanted = tokens_per_second or _eaten(experiment, effort, ceilings)
    shapes = shapes_of(experiment)
    return {
        "rows": rows_of(shapes),
        "length": length_of(shapes),
        "data": data.describe(),
        "core": core,
        "threads": getattr(experiment.data, "threads", 0),
        "batches": len(taken),
        "seconds": seconds,
        "cpu_seconds": busy,
        "step_seconds": _blocks(gaps).figures(),
        "examples_per_second": examples / seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_padded": positions / seconds,
        "padding": 1 - tokens / positions,
        "step_tokens_per_second": wanted,
        "headroom": tokens / seconds / wanted,
        "ceilings": asdict(ceilings),
    }


def _blocks(gaps: list[float]) -> Timing:
    """Seconds a batch in up to `BLOCKS` stretches of the run: single batches come in bursts, as threads finish."""
    return Timing(tuple(float(block.mean()) for block in np.array_split(gaps, min(len(gaps), BLOCKS))))


def _eaten(experiment: Experiment, effort: Effort, ceilings: Ceilings) -> float:
    try:
        step = bench_train(experiment, replace(effort, warm_cache=False), ceilings)
    except UserError as error:
        raise UserError(f"{error} Or name what the loader has to feed by --tokens-per-second.") from error
    return float(step["tokens_per_second"])


@contextmanager
def one_core() -> Iterator[int | None]:
    """Keep this thread and those it starts on one core, where the system can (Linux); yields its number, or None."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)
