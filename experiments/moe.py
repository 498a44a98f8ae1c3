"""Mixtures of experts: one small enough for a laptop beside its dense twin, and Mixtral (Jiang 2024)."""

from __future__ import annotations

from dataclasses import replace

from experiments.gpt import gpt2_demo
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, Published, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.moe import ExpertsConfig
from transformer_jax.objectives import CausalLM


def moe_demo() -> Experiment:
    """`gpt2_demo` with 8 experts of half its feed-forward width, two for a token: as much work, more parameters."""
    dense = gpt2_demo()
    assert isinstance(dense.model, GPTConfig)
    model = replace(dense.model, feedforward=2 * dense.model.width, experts=ExpertsConfig(count=8, chosen=2))
    return replace(dense, name="moe_demo", model=model)


def moe_against_dense() -> list[Experiment]:
    """`gpt2_demo` and `moe_demo`: equal FLOPs of a token, equal tokens."""
    return [gpt2_demo(), moe_demo()]


def mixtral_8x7b() -> Experiment:
    """Mixtral 8x7B (Jiang 2024, table 1): 8 experts, two for a token; how it was trained is not published."""
    steps = 100_000
    return Experiment(
        name="mixtral_8x7b",
        model=GPTConfig(
            vocab_size=32_000,
            context=32_768,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            feedforward=14_336,
            activation="silu",
            gated=True,
            norm="rmsnorm",
            bias=False,
            positions="rope",
            rope_theta=1e6,
            scaled_residual=False,
            experts=ExpertsConfig(count=8, chosen=2, group=1024),
            tied=False,
        ),
        objective=CausalLM(chunk=256),
        data=PackedText(dataset="c4/en", context=4096, batch_rows=512, rows_multiple=512),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=3e-4, warmup=2000, steps=steps, final=0.1),
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=2000, save_every=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        published=Published(
            parameters=46_700_000_000,
            source="Mistral AI, Mixtral of experts, 2023: 46.7B, of which a token takes 12.9B",
            note="Data, batch, rate and length of the training were not published; those here are ours.",
        ),
    )
