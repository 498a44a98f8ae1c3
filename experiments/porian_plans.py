"""The runs of Porian's ladder: what each rung changes of the one before, and the sizes for three machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from experiments.chinchilla_at_home import BUNDLED
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.sweep.counts import counts

EVALUATIONS = 30
"""Points of a curve; of a run that ends with its schedule only the end counts."""
FEWEST_STEPS = 20
"""A run of fewer is left out."""
PIECES, FOUR_EPOCHS = 1024, 3.4e6
"""Vocabulary of the runs on bundled text, and the tokens that four epochs of it then have."""


@dataclass(frozen=True)
class Rung:
    """A way to train and to count."""

    runs: str
    """What its runs are called by; two rungs may share them."""
    published: tuple[float, float]
    """The exponent of Porian 2024 on RefinedWeb and on OpenWebText2."""
    head: bool = False
    """Count the output layer, in parameters and FLOPs."""
    short_warmup: bool = False
    """Warm up for as many tokens as the model has parameters, not for a number of steps that is the same for all."""
    matched_decay: bool = False
    """The cosine ends with the run; else it is as long as the longest run's, for all."""
    tuned: bool = False
    """Rate, batch and beta2 by size, and a constant rate."""


KAPLAN = Rung("kaplan", (0.834, 0.870))
HEAD = replace(KAPLAN, published=(0.701, 0.700), head=True)
WARMUP = replace(HEAD, published=(0.604, 0.602), runs="warmup", short_warmup=True)
DECAY = replace(WARMUP, published=(0.571, 0.569), runs="decay", matched_decay=True)
TUNED = replace(DECAY, published=(0.497, 0.518), runs="tuned", matched_decay=False, tuned=True)
LADDER = {
    "as Kaplan": KAPLAN,
    "+ head counted": HEAD,
    "+ short warm-up": WARMUP,
    "+ decay matched": DECAY,
    "+ tuned, constant rate": TUNED,
}


@dataclass(frozen=True)
class Tuned:
    """What is tuned by size."""

    peak: float
    rows: int
    b2: float


@dataclass(frozen=True)
class _Scale:
    """The ladder for one kind of machine."""

    base: Experiment
    """Untuned: one rate, batch and beta2 for all sizes; its warm-up is the long one."""
    widths: Sequence[int]
    budgets: Sequence[float]
    """FLOPs by 6ND with the head: where decay is matched, runs end there; curves reach the last."""
    tuned: Callable[[int], Tuned]
    """By width."""
    most_tokens: float = math.inf

    def sized(self, width: int) -> Experiment:
        """Return the base at a width."""
        model = self.base.model
        assert isinstance(model, GPTConfig)
        return replace(self.base, model=replace(model, width=width, heads=width // model.block.size))

    def steps(self, run: Experiment, budget: float) -> int:
        """Return the steps to a budget, or to the end of the text."""
        return round(min(budget / (6 * _parameters(run)), self.most_tokens) / _tokens(run))

    def run(self, rung: Rung, width: int, budget: float, name: str, tuned: Tuned | None = None) -> Experiment | None:
        """Return a run that ends at a budget; None if that is too short.

        Where the text ends before the budget, so does a run of which the curve is read; one that has to end at its
        budget is None.
        """
        run = self.sized(width)
        if rung.tuned:
            run = with_tuned(run, tuned or self.tuned(width))
        steps = self.steps(run, budget)
        reaches = budget / (6 * _parameters(run)) <= self.most_tokens
        if steps < FEWEST_STEPS or (rung.matched_decay and not reaches):
            return None
        plan = run.optim.schedule
        if rung.short_warmup:
            plan = replace(plan, warmup=max(round(_parameters(run) / _tokens(run)), 1))
        if rung.matched_decay or rung.tuned:
            plan = replace(plan, steps=steps, kind="constant" if rung.tuned else "cosine")
        else:
            plan = replace(plan, steps=max(self.steps(self.sized(w), self.budgets[-1]) for w in self.widths))
        every = steps if rung.matched_decay else max(steps // EVALUATIONS, 1)
        train = replace(run.train, steps=steps, eval_every=every, save_every=steps)
        return replace(run, name=name, optim=replace(run.optim, schedule=plan), train=train)

    def runs(self) -> list[Experiment]:
        """Return the runs of all rungs."""
        plan: list[Experiment | None] = []
        for rung in (KAPLAN, WARMUP, DECAY, TUNED):
            for width in self.widths:
                name = f"{rung.runs}-w{width}"
                if rung.matched_decay:
                    for budget in self.budgets:
                        plan.append(self.run(rung, width, budget, f"{name}-c{budget:.3g}".replace("+", "")))
                else:
                    plan.append(self.run(rung, width, self.budgets[-1], name))
        return [run for run in plan if run is not None]

    def rates(self, widths: Sequence[int], grid: Sequence[Tuned], share: float) -> list[Experiment]:
        """Return runs at a share of the last budget that try rate, batch and beta2; what is best makes `tuned`."""
        plan = []
        for width in widths:
            for one in grid:
                name = f"rates-w{width}-lr{one.peak:.2g}-rows{one.rows}-b2{one.b2:g}"
                plan.append(self.run(TUNED, width, share * self.budgets[-1], name, one))
        return [replace(run, train=replace(run.train, eval_every=run.train.steps)) for run in plan if run is not None]


def with_tuned(run: Experiment, tuned: Tuned) -> Experiment:
    """Return a run with the rate, batch and beta2 of its size."""
    data, optim = run.data, run.optim
    assert isinstance(data, PackedText)
    multiple = math.gcd(data.rows_multiple, tuned.rows)
    plan = replace(optim.schedule, peak=tuned.peak)
    return replace(
        run,
        data=replace(data, batch_rows=tuned.rows, rows_multiple=multiple),
        optim=replace(optim, schedule=plan, b2=tuned.b2),
    )


def _parameters(run: Experiment) -> int:
    """Count the parameters, the head among them and the input embedding not: with one table for both, all."""
    found = counts(run)
    return found.N_non_embedding + (found.N_head or 0)


def _tokens(run: Experiment) -> int:
    return counts(run).batch


def _base(model: GPTConfig, data: PackedText, peak: float, warmup: int) -> Experiment:
    model = replace(model, positions="rope", norm="rmsnorm", bias=False)
    optim = OptimConfig(
        schedule=ScheduleConfig(kind="cosine", peak=peak, warmup=warmup), b2=0.95, eps=1e-8, clip_norm=1.0
    )
    return Experiment("", model, CausalLM(), data, optim, TrainConfig(keep=1))


def _bundled(rows: int, validation_rows: int, warmup: int) -> Experiment:
    # A vocabulary of pieces, so that the head is three quarters of the smallest model and a third of the largest, as
    # in the paper: of characters, it is too small for its count to matter. And the standard parametrisation: with muP,
    # one rate would suit all widths from the start.
    model = GPTConfig(vocab_size=PIECES, context=128, width=32, layers=3, heads=8, init_std=0.1)
    multiple = math.gcd(rows, 8)
    data = PackedText(
        BUNDLED, context=128, batch_rows=rows, rows_multiple=multiple, validation_rows=validation_rows, threads=1
    )
    return _base(model, data, peak=4e-3, warmup=warmup)


def _home() -> _Scale:
    return _Scale(
        # A warm-up of 614,400 tokens: longer than the best run of the smallest budget, a part of that of the largest.
        _bundled(rows=16, validation_rows=96, warmup=300),
        (8, 12, 16, 24, 32, 48, 64),
        (4e10, 1.2e11, 4e11),
        # What was best of `porian_ladder_rates`, at widths 12 and 32; rows of the larger ones are not tuned.
        lambda width: Tuned(peak=1e-2, rows=4 if width <= 32 else 8, b2=0.99),
        FOUR_EPOCHS,
    )


def _smoke() -> _Scale:
    base = _bundled(rows=4, validation_rows=32, warmup=30)
    return replace(_home(), base=base, widths=(8, 12, 16, 24), budgets=(2e9, 4e9, 8e9))


def _gpu() -> _Scale:
    model = GPTConfig(vocab_size=8192, context=512, width=256, layers=8, heads=8)
    data = PackedText("lm1b", context=512, batch_rows=256, validation_rows=256)
    base = replace(_base(model, data, peak=3e-3, warmup=600), compute=ComputeConfig(dtype="bfloat16"))
    return _Scale(
        base,
        (64, 96, 128, 192, 256, 384, 512),
        (1e15, 3e15, 1e16),
        lambda width: Tuned(peak=4e-3 * (256 / width) ** 0.5, rows=64 if width < 384 else 128, b2=0.99),
    )


def _tpu() -> _Scale:
    model = GPTConfig(vocab_size=32_768, context=1024, width=512, layers=12, heads=8)
    data = PackedText("c4/en", context=1024, batch_rows=512, rows_multiple=16, validation_rows=512)
    base = replace(_base(model, data, peak=3e-3, warmup=3000), compute=ComputeConfig(dtype="bfloat16"))
    return _Scale(
        base,
        (384, 512, 768, 1024, 1536, 2048),
        (1e18, 3e18, 1e19),
        lambda width: Tuned(peak=3e-3 * (512 / width) ** 0.5, rows=128 if width < 768 else 256, b2=0.99),
    )


def _grid(peaks: Sequence[float], rows: Sequence[int]) -> list[Tuned]:
    # The paper found beta2 to matter where batches are small.
    pairs = [(count, b2) for count in rows for b2 in ((0.95,) if count == max(rows) else (0.95, 0.99))]
    return [Tuned(peak, count, b2) for peak in peaks for count, b2 in pairs]


def porian_ladder() -> list[Experiment]:
    """Kaplan's exponent to Chinchilla's in five rungs: decoders of 11k to 213k parameters, to 4e11 FLOPs, for a CPU."""
    return _home().runs()


def porian_ladder_smoke() -> list[Experiment]:
    """The same runs at a fiftieth of the FLOPs: they show that the chain works, and no exponent."""
    return _smoke().runs()


# Rates are tried at sizes of which a run at 0.3 of the last budget is several times as long as its warm-up.


def porian_ladder_rates() -> list[Experiment]:
    """Rate, batch and beta2 at two sizes of `porian_ladder`, from which its tuned rung takes them."""
    return _home().rates((12, 32), _grid((4e-3, 1e-2, 2.5e-2), (4, 16)), 0.3)


def porian_ladder_gpu() -> list[Experiment]:
    """The ladder with decoders of 0.9 to 29 million parameters on lm1b, to 1e16 FLOPs, for one H100."""
    return _gpu().runs()


def porian_ladder_gpu_rates() -> list[Experiment]:
    """Rate, batch and beta2 at two sizes of `porian_ladder_gpu`."""
    return _gpu().rates((96, 256), _grid((1e-3, 3e-3, 1e-2), (64, 256)), 0.3)


def porian_ladder_tpu() -> list[Experiment]:
    """The ladder with decoders of 34 to 671 million parameters on C4, to 1e19 FLOPs, for a v5e-16."""
    return _tpu().runs()


def porian_ladder_tpu_rates() -> list[Experiment]:
    """Rate, batch and beta2 at two sizes of `porian_ladder_tpu`."""
    return _tpu().rates((384, 1024), _grid((1e-3, 3e-3, 1e-2), (128, 512)), 0.3)
