"""Chinchilla at home (Hoffmann 2022): IsoFLOP sweeps of small decoders, and a larger run predicted before it is made.

    tjax sweep chinchilla_at_home                     the grid
    tjax fit runs/chinchilla_at_home/runs.csv         the law, by all approaches
    tjax predict runs/chinchilla_at_home/runs.csv --recipe chinchilla_at_home_larger
    tjax train chinchilla_at_home_larger
    tjax predict runs/chinchilla_at_home/runs.csv --recipe chinchilla_at_home_larger

All sizes share depth, size of a head, and one learning rate, which muP carries from width to width (Yang 2022). The
runs of one size share a trunk at a constant rate, from which each branches off with a cooldown (Haegele 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.sweep.counts import counts
from transformer_jax.sweep.grid import iso_flops, lasting

BUNDLED = "tjax_text/shakespeare,tjax_text/help_en,tjax_text/bible_en"
"""2.4 million characters, of which 2 million are for training."""
FOUR_EPOCHS = 8e6
"""Tokens; up to four epochs, text read again teaches almost as much as new text (Muennighoff 2023)."""


@dataclass(frozen=True)
class _Scale:
    """A sweep for one kind of machine."""

    base: Experiment
    widths: Sequence[int]
    budgets: Sequence[float]
    larger: tuple[int, float]
    """Width and FLOPs (6ND) of the run that is predicted."""
    most_tokens: float = math.inf

    def model(self, width: int) -> GPTConfig:
        model = self.base.model
        assert isinstance(model, GPTConfig)
        return replace(model, width=width, heads=width // model.block.size)

    def grid(self) -> list[Experiment]:
        models = [self.model(width) for width in self.widths]
        return iso_flops(self.base, models, self.budgets, most_tokens=self.most_tokens)

    def predicted(self, name: str) -> Experiment:
        width, budget = self.larger
        run = replace(self.base, model=self.model(width))
        one = counts(lasting(run, 1, name))
        return lasting(run, round(budget / (6 * one.N * one.D)), name)


def _base(name: str, model: GPTConfig, data: PackedText, peak: float, warmup: int) -> Experiment:
    model = replace(model, positions="rope", norm="rmsnorm", bias=False, base_width=model.width)
    schedule = ScheduleConfig(kind="wsd", peak=peak, warmup=warmup, decay_fraction=0.2)
    optim = OptimConfig(schedule=schedule, b2=0.98, eps=1e-8, clip_norm=1.0)
    return Experiment(name, model, CausalLM(), data, optim, TrainConfig(keep=2))


def _characters(name: str, rows: int) -> Experiment:
    """Characters: with a vocabulary of words the smallest models would be all embedding."""
    # GPT-2's 0.02 is for widths from 768 on: at 32, training stands still for a hundred steps first.
    model = GPTConfig(vocab_size=160, context=128, width=32, layers=3, heads=4, init_std=0.1)
    data = PackedText(BUNDLED, tokenizer="characters", context=128, batch_rows=rows, validation_rows=256, threads=1)
    return _base(name, model, data if rows >= 8 else replace(data, rows_multiple=rows), peak=1e-2, warmup=30)


def _home() -> _Scale:
    return _Scale(
        _characters("home", 8), (16, 24, 32, 48, 64, 96, 128), (1e11, 3e11, 1e12, 3e12), (96, 1.2e13), FOUR_EPOCHS
    )


def _small() -> _Scale:
    return _Scale(_characters("small", 4), (16, 24, 32, 48, 64), (1e10, 3e10, 1e11), (48, 4e11))


def _gpu() -> _Scale:
    model = GPTConfig(vocab_size=4096, context=512, width=256, layers=8, heads=4)
    data = PackedText("lm1b", context=512, batch_rows=128, validation_rows=512)
    base = replace(_base("gpu", model, data, peak=4e-3, warmup=100), compute=ComputeConfig(dtype="bfloat16"))
    return _Scale(base, (64, 128, 192, 256, 384, 512, 768), (1e15, 3e15, 1e16), (640, 1e17))


def _tpu() -> _Scale:
    model = GPTConfig(vocab_size=32_768, context=1024, width=512, layers=12, heads=8)
    data = PackedText("c4/en", context=1024, batch_rows=256, rows_multiple=16, validation_rows=1024)
    base = replace(_base("tpu", model, data, peak=2e-3, warmup=200), compute=ComputeConfig(dtype="bfloat16"))
    return _Scale(base, (256, 384, 512, 768, 1024, 1536, 2048), (1e18, 3e18, 1e19), (1536, 1e20))


def chinchilla_at_home() -> list[Experiment]:
    """IsoFLOP grid of decoders of 12k to 610k parameters on the bundled text, budgets of 1e11 to 3e12, for 2 cores."""
    return _home().grid()


def chinchilla_at_home_larger() -> Experiment:
    """Four times the largest budget of `chinchilla_at_home`; predict it with `tjax predict` before you train it."""
    return _home().predicted("chinchilla_at_home_larger")


def chinchilla_at_home_small() -> list[Experiment]:
    """The same grid at a thirtieth of the budgets, 1e10 to 1e11: minutes."""
    return _small().grid()


def chinchilla_at_home_small_larger() -> Experiment:
    """Four times the largest budget of `chinchilla_at_home_small`."""
    return _small().predicted("chinchilla_at_home_small_larger")


def chinchilla_at_home_gpu() -> list[Experiment]:
    """IsoFLOP grid of decoders of 0.7M to 60M parameters on lm1b, budgets of 1e15 to 1e16, for one H100."""
    return _gpu().grid()


def chinchilla_at_home_gpu_larger() -> Experiment:
    """Ten times the largest budget of `chinchilla_at_home_gpu`."""
    return _gpu().predicted("chinchilla_at_home_gpu_larger")


def chinchilla_at_home_tpu() -> list[Experiment]:
    """IsoFLOP grid of decoders of 18M to 671M parameters on C4, budgets of 1e18 to 1e19, for a v5e-16."""
    return _tpu().grid()


def chinchilla_at_home_tpu_larger() -> Experiment:
    """Ten times the largest budget of `chinchilla_at_home_tpu`."""
    return _tpu().predicted("chinchilla_at_home_tpu_larger")
