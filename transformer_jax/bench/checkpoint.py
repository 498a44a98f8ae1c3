"""Saving: how long the loop stands still, and how fast the bytes reach the disk."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

import grain
import jax

from transformer_jax.bench.batches import length_of, random_batch, rows_of, shapes_of
from transformer_jax.bench.timing import Timing, repeat
from transformer_jax.bench.train import Effort, Watch, checked
from transformer_jax.checkpoint import Checkpoints
from transformer_jax.config import Experiment
from transformer_jax.logs import say

SAVES = 3
"""Saves that count, after one that compiles what it needs."""


class _NoData:
    """Stands for the iterator whose place a checkpoint holds."""

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        pass


def bench_checkpoint(experiment: Experiment, effort: Effort) -> dict[str, Any]:
    """Save as the training loop does while steps go on, then restore; in a folder under `runs/` that is removed.

    Raises:
        UserError: a full disk, or an experiment that cannot run.
    """
    trainer, shapes = checked(experiment), shapes_of(experiment)
    batch, state, step = trainer.put(random_batch(experiment)), trainer.init(), trainer.train_step()
    watch, data = Watch(trainer, state), cast(grain.DatasetIterator, _NoData())

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        watch.see(metrics)

    plain = repeat(run, budget=effort.budget / 2, width=effort.width)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state()))
    stalls, totals, beside = [], [], []
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir="runs") as folder:
        checkpoints = Checkpoints(Path(folder), trainer, "", [], say)
        for number in range(SAVES + 1):
            start = time.perf_counter()
            checkpoints.save(number + 1, state, data, None)
            stalled = time.perf_counter() - start
            slowed = []
            while checkpoints.manager.is_saving_in_progress():
                one = time.perf_counter()
                run()
                slowed.append(time.perf_counter() - one)
            checkpoints.wait()
            if number:
                stalls.append(stalled)
                totals.append(time.perf_counter() - start)
                beside += slowed
        checkpoints.close()
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) // len(
            list((Path(folder) / "checkpoints").glob("[0-9]*"))
        )
        start = time.perf_counter()
        again = Checkpoints(Path(folder), trainer, "", [], say)
        jax.block_until_ready(again.restore_or_init(data).state)
        restored = time.perf_counter() - start
        again.close()
    watch.check(state)
    stall, total = Timing(tuple(stalls)), Timing(tuple(totals))
    return {
        "rows": rows_of(shapes),
        "length": length_of(shapes),
        "state_bytes": size,
        "disk_bytes": written,
        "plain_step_seconds": plain.figures(),
        "step_seconds": stall.figures(),
        "stall_in_steps": stall.median / plain.median,
        "save_seconds": total.figures(),
        "bytes_per_second": size / total.median,
        "step_seconds_while_saving": Timing(tuple(beside)).figures() if beside else None,
        "restore_seconds": restored,
    }
