"""What a run is by the variables of a law, from its configuration alone: N, D and C."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax

from transformer_jax.config import ComputeConfig, Experiment
from transformer_jax.data.packed import PackedText
from transformer_jax.flops import flops
from transformer_jax.nn.module import Skeleton, parameter_count

CONVENTION = "matmuls, causal attention halved"
"""Of the exact count (`flops.py`)."""


@dataclass(frozen=True)
class Counts:
    """Parameters, tokens and FLOPs of a whole run."""

    N: int
    """Parameters that a token meets: all, but of experts only those that it takes, so that C is about 6ND."""
    N_total: int
    """All parameters; more than N with experts only."""
    N_non_embedding: int
    """Those of N outside the tables that are looked up (Kaplan 2020, section 2.1)."""
    N_head: int | None
    """Those of the output layer; None for a model that scores no vocabulary."""
    D: int
    """Positions trained on, padding included."""
    exact: int
    """FLOPs, matmul by matmul."""
    batch: int
    """Positions of the largest batch."""

    @property
    def six_nd(self) -> int:
        """FLOPs by 6ND."""
        return 6 * self.N * self.D


@functools.cache
def counts(experiment: Experiment) -> Counts:
    """Count; takes no memory."""
    step = flops(experiment)
    skeleton = Skeleton.of(experiment.model, replace(ComputeConfig(), layers="scan"))
    tables = zip(jax.tree.leaves(skeleton.abstract), jax.tree.leaves(skeleton.letters), strict=True)
    vocabulary = [leaf.size for leaf, letters in tables if letters == "VD"]
    rows = max(shape[0] for shape, _ in experiment.data.batch_shapes().values())
    seen = rows_seen(experiment, rows)
    return Counts(
        N=step.active,
        N_total=parameter_count(skeleton.abstract),
        N_non_embedding=step.six_n_non_embedding // (6 * step.tokens),
        N_head=vocabulary[-1] if vocabulary else None,
        D=step.tokens * seen // rows,
        exact=step.matmuls * seen // rows,
        batch=step.tokens,
    )


def step_flops(experiment: Experiment) -> float:
    """Return the exact FLOPs of a step; with a ramp, of the mean step."""
    return counts(experiment).exact / experiment.train.steps


def rows_seen(experiment: Experiment, rows: int) -> int:
    """Count the rows that all steps together read, `rows` a batch after its ramp."""
    steps, seen = experiment.train.steps, 0
    for stage, length in experiment.data.ramp if isinstance(experiment.data, PackedText) else ():
        seen += stage * min(length, steps)
        steps -= min(length, steps)
    return seen + rows * steps
