"""Does the learning rate found at one width suit another? Standard parametrisation against muP (Yang 2022, figure 1).

    tjax sweep mup_transfer
    python -m experiments.scaling_mup runs/mup_transfer/runs.csv

draws the loss against the learning rate at every width into experiments/results (or the folder given).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.config import Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.provenance import provenance
from transformer_jax.scaling.files import read_columns
from transformer_jax.scaling.plots import panels
from transformer_jax.sweep.grid import lasting, rates

WIDTHS = (32, 128)
PEAKS = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
STEPS = 80
KINDS = {"standard": 0, "mup": WIDTHS[0]}
"""Base width by parametrisation."""


def mup_transfer() -> list[Experiment]:
    """Learning rate x width of a small decoder, with and without muP; minutes on 2 CPU cores."""
    model = GPTConfig(vocab_size=80, context=64, layers=2, positions="rope", norm="rmsnorm", bias=False, init_std=0.1)
    base = Experiment(
        name="",
        model=model,
        objective=CausalLM(),
        data=PackedText(
            "tjax_text/shakespeare", tokenizer="characters", context=64, batch_rows=8, validation_rows=256, threads=1
        ),
        optim=OptimConfig(schedule=ScheduleConfig(kind="linear", warmup=10), b2=0.98, eps=1e-8, clip_norm=1.0),
        train=TrainConfig(keep=1, log_every=10),
    )
    runs = []
    for kind, base_width in KINDS.items():
        for width in WIDTHS:
            sized = replace(base, model=replace(model, width=width, heads=4, base_width=base_width))
            run = lasting(sized, STEPS, f"{kind}-w{width}")
            run = replace(run, train=replace(run.train, eval_every=STEPS, save_every=STEPS))
            runs += rates(run, PEAKS)
    return runs


def summarise(table: Path) -> dict[str, Any]:
    """Read the losses by parametrisation, width and rate.

    Raises:
        UserError: the table is not of this plan.
    """
    cells = read_columns(table).cells
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run, rate, loss, status in zip(
        *(cells[name] for name in ("run", "learning_rate", "loss", "status")), strict=True
    ):
        kind, _, rest = str(run).partition("-w")
        if kind not in KINDS:
            raise UserError(f"{table}: run '{run}' is not of the plan mup_transfer.")
        losses = found.setdefault(kind, {}).setdefault(rest.partition("-")[0], {})
        losses[f"{float(rate):g}"] = float(loss) if status == "done" else float("inf")
    result: dict[str, Any] = {}
    for kind, widths in found.items():
        best = {width: float(min(losses, key=losses.__getitem__)) for width, losses in widths.items()}
        narrow = f"{best[min(best, key=int)]:g}"
        result[kind] = {
            "losses": {w: {r: x if np.isfinite(x) else None for r, x in own.items()} for w, own in widths.items()},
            "best_rate": best,
            "lost_by_the_narrow_rate": {w: own[narrow] - min(own.values()) for w, own in widths.items()},
        }
    return result


def main(table: Path, folder: Path) -> None:
    """Summarise, draw, write."""
    found = summarise(table)
    folder.mkdir(parents=True, exist_ok=True)
    figure, grid = panels(len(found), 4.6, 3.6)
    shades = ("#9ec3e6", "#5b93c9", "#1f5a96", "#0b2e55")
    for axes, (kind, values) in zip(grid[0], found.items(), strict=True):
        for color, (width, losses) in zip(shades, values["losses"].items(), strict=False):
            points = [(float(rate), loss) for rate, loss in losses.items() if loss is not None]
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", color=color, label=f"width {width}")
            least = int(np.argmin(y))
            axes.plot(x[least], y[least], "o", color="#c8452f", markersize=7, zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("peak learning rate")
        axes.set_title({"standard": "standard parametrisation", "mup": "muP, base width 32"}[kind], fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    grid[0][0].set_ylabel("validation loss (nats a character)")
    low = min(min(axes.get_ylim()) for axes in grid[0])
    best = min(loss for v in found.values() for own in v["losses"].values() for loss in own.values() if loss)
    for axes in grid[0]:
        axes.set_ylim(low, best + 1.0)
    figure.savefig(folder / "mup_transfer.png")
    figures = found | {"steps": STEPS, "provenance": provenance()}
    (folder / "mup_transfer.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for kind, values in found.items():
        say(f"{kind}: best rate by width {values['best_rate']}, lost {values['lost_by_the_narrow_rate']}")
    say(f"written: {folder / 'mup_transfer.json'}, {folder / 'mup_transfer.png'}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m experiments.scaling_mup RUNS.csv [FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "results")
