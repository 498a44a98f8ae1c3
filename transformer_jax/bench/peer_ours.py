"""Our side of a comparison with PyTorch, and what a side is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from transformer_jax.bench.batches import Batch
from transformer_jax.bench.compiled import compile_step, empty_cache
from transformer_jax.bench.decode import Opened, Prompted, writer_of
from transformer_jax.bench.peer_spec import write_weights
from transformer_jax.bench.train import Watch, checked
from transformer_jax.config import Experiment
from transformer_jax.nn.module import parameter_count
from transformer_jax.objectives import means

OURS = "transformer_jax"
TURN = 3
"""Pieces of work of a turn; the first one of each does not count: the other side has just emptied the caches."""


@dataclass(frozen=True)
class Contender:
    """One side: works when asked."""

    name: str
    take: Callable[[int], dict[str, Any]]
    """N -> {"seconds", "cpu": of each piece of work}."""
    facts: dict[str, Any]


def trainer(experiment: Experiment, batch: Batch, weights: Path) -> Contender:
    """Get ready to take training steps on a batch; the parameters before the first one go to the file `weights`."""
    trainer = checked(experiment)
    compiled = compile_step(trainer, experiment.data.batch_shapes(), warm=False)
    state, placed = trainer.init(), trainer.put(batch)
    write_weights(experiment, state.params, weights)
    sums, counted = trainer.eval_step()(state.params, placed)
    loss, watch = float(means(sums, counted)["loss"]), Watch(trainer, state)

    def step() -> None:
        nonlocal state
        state, metrics = compiled.call(state, placed)
        jax.block_until_ready(state)
        watch.see(metrics)

    def take(n: int) -> dict[str, Any]:
        taken = _timed(step, n)
        watch.check(state)
        return taken

    first = compiled.trace_seconds + compiled.cold_seconds + sum(take(TURN)["seconds"][:1])
    facts = {"parameters": parameter_count(trainer.skeleton.abstract), "loss": loss, "first_seconds": first}
    facts |= {"tokens": watch.tokens, "setup": trainer.describe(), "compute": asdict(experiment.compute)}
    return Contender(OURS, take, facts)


def writer(experiment: Experiment, rows: int, prompted: Prompted, weights: Path) -> Contender:
    """Get ready to read prompts and to write after them; the parameters, as drawn, go to the file `weights`."""
    drawn = Opened.drawn(experiment)
    write_weights(experiment, drawn.params, weights)
    writes = writer_of(experiment, drawn.holding(prompted.weights), rows, prompted)
    written: list[list[int]] = []

    def write() -> None:
        written[:] = writes.read_and_write().tolist()

    with empty_cache():
        first = _timed(write, 1)["seconds"][0]
    facts = {"parameters": parameter_count(drawn.skeleton.abstract), "written": written, "first_seconds": first}
    facts |= {"tokens": rows * prompted.new, "setup": f"{drawn.describe(experiment.name, prompted)}, {writes.how}"}
    return Contender(OURS, lambda n: _timed(write, n), facts)


def _timed(work: Callable[[], None], n: int) -> dict[str, Any]:
    seconds, cpu = [], []
    for _ in range(n):
        start, busy = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return {"seconds": seconds, "cpu": cpu}
