"""How fast a training step is, beside what the device can do.

Compile time apart, every step waited for, the median of many with an interval. The floor is measured, not looked up:
the rate of a large matrix product in the compute precision, on the same device in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.nn.module import parameter_count
from transformer_jax.provenance import provenance
from transformer_jax.train import Trainer

MATMUL = {"cpu": 2048}
"""Side of the square matrices whose product is timed, by backend; 8192 elsewhere."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one step."""

    median: float
    low: float
    """Bounds of a 95 % bootstrap interval of the median."""
    high: float
    samples: int


def bench_train(experiment: Experiment, rows: int, length: int, steps: int = 20) -> dict[str, Any]:
    """Time the training step of an experiment on `rows` pairs of `length` random tokens a side, without padding.

    Model FLOPs are three times those of the forward pass: matrix products and attention (halved where causal),
    no lookups, norms or recomputation.

    Raises:
        UserError: the rows cannot be divided over the mesh, or the step is faster than the measured peak allows.
    """
    trainer = Trainer.of(experiment)
    multiple = experiment.data.rows_multiple
    if min(rows, length, steps) < 1 or rows % multiple:
        raise UserError(f"--rows {rows} must be a multiple of data.rows_multiple={multiple}; --length, --steps from 1.")
    batch = trainer.put(random_pairs(experiment.model.vocab_size, rows, length))
    state, step = trainer.init(), trainer.train_step()
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    first = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    timing = measure(run, steps)
    flops = 3 * experiment.model.forward_flops({name: array.shape for name, array in batch.items()})
    peak = matmul_peak(experiment.compute.dtype) * trainer.mesh.size
    share = flops / timing.median / peak
    if share > 1:
        raise UserError(
            f"{flops / timing.median:.3g} model FLOP/s is {share:.0%} of the measured matmul rate: "
            "the step or the clock is broken, no figure is given."
        )
    return {
        "experiment": experiment.name,
        "rows": rows,
        "length": length,
        "parameters": parameter_count(trainer.skeleton.abstract),
        "first_step_seconds": first,
        "step_seconds": asdict(timing),
        "tokens_per_second": rows * length / timing.median,
        "model_flops_per_step": flops,
        "model_flops_per_second": flops / timing.median,
        "matmul_flops_per_second": peak,
        "share_of_matmul_rate": share,
        "compute": vars(experiment.compute),
        "mesh": dict(trainer.mesh.shape),
        "provenance": provenance(),
    }


def random_pairs(vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Make a batch of sentence pairs of `length` random tokens a side, without padding."""
    ids = np.random.default_rng(0).integers(4, vocab_size, (rows, length + 1), dtype=np.int32)
    return {"source": ids[:, 1:], "target": ids}


def measure(run: Callable[[], object], samples: int) -> Timing:
    """Time `samples` calls of `run`, which must wait for its own result, after two that do not count."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    draws = np.random.default_rng(0).choice(seconds, (1000, samples))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Timing(float(np.median(seconds)), float(low), float(high), samples)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the fastest of ten square matrix products on one device."""
    n = MATMUL.get(jax.default_backend(), 8192)
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x, y: x @ y)
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)
