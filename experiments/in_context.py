"""Learning in context (Garg 2022): a decoder is shown examples of a linear function, and predicts the next value."""

from __future__ import annotations

from transformer_jax.config import Experiment, OptimConfig, Published, ScheduleConfig, TrainConfig
from transformer_jax.data.linear_functions import LinearFunctions
from transformer_jax.models.in_context import InContextGPTConfig
from transformer_jax.objectives import InContextRegression


def garg_linear_20d() -> Experiment:
    """Linear functions of 20 numbers, as published (Garg 2022, appendix A): 500,000 steps with a curriculum."""
    steps = 500_000
    return Experiment(
        name="garg_linear_20d",
        model=InContextGPTConfig(),
        objective=InContextRegression(),
        data=LinearFunctions(dimension=20, points=41, curriculum=2000, batch_rows=64, rows_multiple=64),
        optim=OptimConfig(schedule=ScheduleConfig(kind="constant", peak=1e-4, warmup=1), b2=0.999, eps=1e-8),
        train=TrainConfig(steps=steps, log_every=100, eval_every=5000, save_every=5000),
        published=Published(
            parameters=22_400_000,
            source="Garg 2022, section 3.1",
            note="The paper's count holds a table of 50,257 tokens (12.9M) that nothing reads; without it, 9.5M.",
        ),
    )


def in_context_linear_5d() -> Experiment:
    """The same in small: linear functions of 5 numbers, for 2 CPU cores; about 5 minutes."""
    steps = 6000
    return Experiment(
        name="in_context_linear_5d",
        # The paper's initial values, N(0, 0.02^2), suit a width of 256; at 64 they make a slow start.
        model=InContextGPTConfig(inputs=5, context=21, width=64, layers=3, heads=4, init_std=0.1),
        objective=InContextRegression(),
        data=LinearFunctions(dimension=5, points=11, batch_rows=64),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=2e-3, warmup=300, steps=steps),
            b2=0.99,
            eps=1e-8,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=500, save_every=2000),
    )
