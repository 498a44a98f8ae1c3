"""Transformers against LSTMs by size, and what each makes of its context (Kaplan 2020, figure 7).

    tjax sweep lstm_against_transformer
    python -m experiments.lstm_against_transformer runs/lstm_against_transformer

draws the loss against parameters without embeddings, and the loss of a token against its place in the context, into
experiments/results (or the folder given). All runs read the same tokens in the same order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.chinchilla_at_home import BUNDLED
from experiments.gpt import gpt2_demo
from transformer_jax import verbs
from transformer_jax.config import (
    ComputeConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.rnn_lm import RNNLMConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.provenance import provenance
from transformer_jax.scaling.files import read_columns
from transformer_jax.scaling.plots import COLORS, log_axis, panels
from transformer_jax.sweep.counts import counts
from transformer_jax.sweep.grid import lasting, rates, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAMILIES = {
    "transformer": "Transformer",
    "lstm1": "LSTM, 1 layer",
    "lstm2": "LSTM, 2 layers",
    "lstm4": "LSTM, 4 layers",
}
PEAKS = (5e-3, 1e-2, 2e-2, 4e-2)
"""Learning rates that `lstm_against_transformer_rates` tries."""


@dataclass(frozen=True)
class _Scale:
    """The comparison for one kind of machine."""

    base: Experiment
    transformer: GPTConfig
    """Of the middle size, at which all rates are tuned; muP carries this one to other widths (Yang 2022)."""
    lstm: RNNLMConfig
    sizes: Sequence[int]
    """Parameters without embeddings, about."""
    steps: int
    peak: float
    """Learning rate of the Transformers, at all widths by muP."""
    lstm_peak: float
    """Learning rate of the LSTMs, of all sizes and depths."""

    def model(self, family: str, size: int) -> ModelConfig:
        """Return the family's model of about this size."""
        if family == "transformer":
            model, head = self.transformer, self.transformer.block.size
            heads = round((size / (12 * model.layers)) ** 0.5 / head)
            return replace(model, width=heads * head, heads=heads)
        layers = int(family.removeprefix("lstm"))
        return replace(self.lstm, layers=layers, width=round((size / (8 * layers)) ** 0.5))

    def run(self, family: str, size: int, steps: int) -> Experiment:
        """Return the run of a family at a size."""
        peak = self.peak if family == "transformer" else self.lstm_peak
        schedule = replace(self.base.optim.schedule, peak=peak)
        optim = replace(self.base.optim, schedule=schedule)
        run = lasting(replace(self.base, model=self.model(family, size), optim=optim), steps, family)
        return replace(run, name=f"{family}-n{short(counts(run).N_non_embedding)}")

    def grid(self) -> list[Experiment]:
        """Return all families at all sizes."""
        return [self.run(family, size, self.steps) for size in self.sizes for family in FAMILIES]


def _small() -> _Scale:
    return _Scale(
        Experiment(
            name="",
            model=GPTConfig(),
            objective=CausalLM(),
            # One text without an end, cut into rows: so every row has all of its context.
            data=PackedText(
                BUNDLED,
                tokenizer="characters",
                context=256,
                batch_rows=8,
                validation_rows=64,
                separate=False,
                threads=1,
            ),
            optim=OptimConfig(
                schedule=ScheduleConfig(kind="cosine", warmup=40, final=0.1), b2=0.98, eps=1e-8, clip_norm=1.0
            ),
            train=TrainConfig(keep=1),
        ),
        GPTConfig(
            vocab_size=160,
            context=256,
            width=32,
            layers=2,
            heads=4,
            positions="rope",
            norm="rmsnorm",
            bias=False,
            init_std=0.1,
            base_width=32,
        ),
        RNNLMConfig(vocab_size=160, context=256, tied=True, dropout=0.0),
        sizes=(6_000, 20_000, 60_000),
        steps=400,
        peak=1e-2,
        lstm_peak=4e-2,
    )


def _gpu() -> _Scale:
    small = _small()
    data = PackedText("c4/en", context=1024, batch_rows=64, validation_rows=256, separate=False)
    compute = ComputeConfig(dtype="bfloat16")
    schedule = ScheduleConfig(kind="cosine", warmup=300, final=0.1)
    base = replace(small.base, data=data, compute=compute, optim=replace(small.base.optim, schedule=schedule))
    return replace(
        small,
        base=base,
        transformer=replace(small.transformer, vocab_size=8192, context=1024, width=256, layers=6, base_width=256),
        lstm=replace(small.lstm, vocab_size=8192, context=1024),
        sizes=(1_200_000, 4_800_000, 19_000_000),
        steps=3000,
        peak=4e-3,
        lstm_peak=4e-3,
    )


def lstm_against_transformer() -> list[Experiment]:
    """Transformers and LSTMs of 6k to 60k parameters on 0.8 million characters of the bundled text, for a CPU."""
    return _small().grid()


def lstm_against_transformer_rates() -> list[Experiment]:
    """The rates of `lstm_against_transformer`: four of them at the middle size, a quarter as long."""
    scale = _small()
    middle = [scale.run(family, scale.sizes[1], scale.steps // 4) for family in ("transformer", "lstm2")]
    return [run for experiment in middle for run in rates(experiment, PEAKS)]


def lstm_against_transformer_gpu() -> list[Experiment]:
    """The same with 1.2 to 19 million parameters, on 200 million tokens of C4, for one H100."""
    return _gpu().grid()


def lstm_lm_demo() -> Experiment:
    """Two LSTM layers on the text, the tokens and the schedule of `gpt2_demo`, of about its size."""
    model = RNNLMConfig(vocab_size=1024, context=128, width=208, tied=True, dropout=0.1)
    return replace(gpt2_demo(), name="lstm_lm_demo", model=model)


def summarise(sweep: Path) -> dict[str, Any]:
    """Read the losses of a sweep, and score the runs of the least and the largest size by position.

    Returns:
        By family: "sizes", "losses", "exponent" (alpha of L ~ N^-alpha), and "by_position" of two runs.

    Raises:
        UserError: no table of this plan.
    """
    cells = read_columns(sweep / "runs.csv").cells
    found: dict[str, dict[str, Any]] = {}
    for run, size, loss, status in zip(
        *(cells[name] for name in ("run", "n_non_embedding", "loss", "status")), strict=True
    ):
        family = str(run).partition("-")[0]
        if family not in FAMILIES:
            raise UserError(f"{sweep}: run '{run}' is not of the plan lstm_against_transformer.")
        if status == "done":
            own = found.setdefault(family, {"runs": [], "sizes": [], "losses": []})
            for name, value in (("runs", str(run)), ("sizes", int(float(size))), ("losses", float(loss))):
                own[name].append(value)
    for own in found.values():
        if len(own["sizes"]) > 1:
            own["exponent"] = -float(np.polyfit(np.log(own["sizes"]), np.log(own["losses"]), 1)[0])
        ends = dict.fromkeys((own["runs"][int(np.argmin(own["sizes"]))], own["runs"][int(np.argmax(own["sizes"]))]))
        own["by_position"] = {run: _positions(sweep / "runs" / run) for run in ends}
    return found


def _positions(run: Path) -> dict[str, Any]:
    """Return the groups of `tjax evaluate RUN --by-position`."""
    done = verbs.evaluate(run, by_position=True)
    return {"test_nll": done.report["scores"]["nll"], "groups": done.report["by_position"]}


def main(sweep: Path, folder: Path) -> None:
    """Summarise, draw, write."""
    found = summarise(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    figure, grid = panels(2, 5.4, 4.2)
    for (family, own), color in zip(found.items(), COLORS.values(), strict=False):
        grid[0][0].plot(own["sizes"], own["losses"], "o-", color=color, label=FAMILIES[family])
        *small, large = own["by_position"].values()
        _draw(grid[0][1], large, color, own["sizes"][-1], FAMILIES[family])
        for one in small:
            _draw(grid[0][1], one, color, own["sizes"][0], "")
    grid[0][0].set(xlabel="parameters without embeddings", ylabel="validation loss (nats a token)")
    grid[0][1].set(xlabel="token of the context", ylabel="test loss (nats a token)")
    grid[0][1].set_xscale("log", base=2)
    log_axis(grid[0][0], "x")
    for axes in grid[0]:
        axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.68))
    figure.savefig(folder / "lstm_against_transformer.png")
    path = folder / "lstm_against_transformer.json"
    path.write_text(json.dumps(found | {"provenance": provenance()}, indent=1) + "\n", encoding="utf-8")
    for family, own in found.items():
        pairs = ", ".join(f"{n:,}: {loss:.4f}" for n, loss in zip(own["sizes"], own["losses"], strict=True))
        say(f"{FAMILIES[family]}: {pairs}; L ~ N^-{own.get('exponent', float('nan')):.3f}")
    say(f"written: {path} and the picture beside it")


def _draw(axes: Axes, one: dict[str, Any], color: str, size: int, label: str) -> None:
    """Draw a run by position: the large one solid, the small one dashed."""
    middles = [((group["first"] + 1) * (group["last"] + 1)) ** 0.5 for group in one["groups"]]
    values = [group["nll"] for group in one["groups"]]
    style = "-" if label else "--"
    axes.plot(
        middles, values, style, color=color, lw=1.8 if label else 1.0, label=f"{label}, {size:,}" if label else ""
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m experiments.lstm_against_transformer SWEEP_FOLDER [FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "results")
