"""From Kaplan's exponent to Chinchilla's by five switches, thrown one after the other (Porian 2024, figure 1).

    tjax sweep porian_ladder
    python -m experiments.porian_ladder runs/porian_ladder

fits N* ~ C^a on each rung, prints it beside the paper's, and writes both into experiments/results (or the folder
given). The runs of one size at a constant or a far longer schedule are read at all budgets from their curves, as in
the paper; where the schedule ends with the budget, each budget is a run.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from experiments.porian_plans import LADDER, Rung
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.provenance import provenance
from transformer_jax.scaling.bootstrap import interval, weights
from transformer_jax.scaling.files import read_columns
from transformer_jax.scaling.groups import within
from transformer_jax.scaling.isoflop import IsoFlops, along_curves
from transformer_jax.scaling.plots import COLORS, INK, log_axis, panels
from transformer_jax.scaling.runs import DONE, Points

BUDGETS, WIDTH, NEAR, RESAMPLES = 12, 1.25, 2, 4000
"""Values of C at which curves are read; factor in C within which they are one; sizes beside the best; resamples."""


def points_of(table: Path, rung: Rung) -> Points:
    """Read the training curves of a rung, with N and C = 6ND as it counts them.

    Args:
        table: `curves.csv` of the sweep.
        rung: which.

    Raises:
        UserError: no run of the rung is done.
    """
    cells = read_columns(table).cells
    numbers = {
        name: np.asarray([_number(cell) for cell in cells[name]]) for name in ("n_non_embedding", "n_head", "d", "loss")
    }
    mine = np.asarray([str(run).partition("-")[0] == rung.runs for run in cells["run"]])
    mine &= np.asarray([str(status) in DONE for status in cells["status"]])
    if not mine.any():
        raise UserError(f"{table} has no finished run '{rung.runs}-...' of porian_ladder.")
    N = numbers["n_non_embedding"] + (numbers["n_head"] if rung.head else 0)
    run = np.unique(np.asarray(cells["run"])[mine], return_inverse=True)[1]
    N, D = N[mine], numbers["d"][mine]
    return Points(run, N, D, 6 * N * D, numbers["loss"][mine])


def _number(cell: Any) -> float:
    return float(cell) if cell not in ("", None) else math.nan


def fit_rung(curves: Points, rung: Rung) -> dict[str, Any]:
    """Fit N* ~ C^a by parabolas: at the ends of the runs where they are matched to a budget, else along the curves.

    Returns:
        "a", its 95 % "interval" over resampled sizes (None where too few of them have an optimum), and "budgets".

    Raises:
        UserError: fewer than two budgets have an interior minimum.
    """
    if rung.matched_decay:
        points = curves.take(curves.last_of_each())
    else:
        # From where three sizes have begun to where the third largest ends.
        first, last = (
            np.sort([f(curves.C[curves.run == run]) for run in np.unique(curves.run)]) for f in (np.min, np.max)
        )
        points = along_curves(curves, np.geomspace(first[min(2, len(first) - 1)], last[-min(3, len(last))], BUDGETS))
    points = near_the_best(points)
    found = IsoFlops.of(points, WIDTH)
    lines = found.lines(weights(points, "size", RESAMPLES, 0))
    accepted = [budget for budget in found.budgets if not budget.rejected]
    return {
        "a": float(found.line().a[0]),
        "interval": interval(lines.a),
        "budgets": [{"C": b.C, "N": b.N, "loss": b.loss} for b in accepted],
        "rejected": [f"C = {b.C:.3g}: {b.rejected}" for b in found.budgets if b.rejected],
        "sizes": len(np.unique(points.size)),
    }


def near_the_best(points: Points) -> Points:
    """Keep the best size of each budget with `NEAR` on either side: over a wide range, no loss is a parabola."""
    kept = []
    for group in range(int((budget := within(np.log(points.C), np.log(WIDTH))).max()) + 1):
        rows = np.flatnonzero(budget == group)
        rows = rows[np.argsort(points.N[rows])]
        best = int(np.argmin(points.loss[rows]))
        kept.append(rows[max(best - NEAR, 0) : best + NEAR + 1])
    return points.take(np.concatenate(kept))


def climb(table: Path) -> dict[str, dict[str, Any]]:
    """Fit every rung; one that has no exponent has a "reason"."""
    found: dict[str, dict[str, Any]] = {}
    for name, rung in LADDER.items():
        found[name] = {"published": {"RefinedWeb": rung.published[0], "OpenWebText2": rung.published[1]}}
        try:
            found[name] |= fit_rung(points_of(table, rung), rung)
        except UserError as error:
            found[name] |= {"a": None, "reason": str(error)}
    return found


def main(sweep: Path, folder: Path) -> None:
    """Fit, print, draw, write."""
    found = climb(sweep / "curves.csv")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{'':24}{'a':>8}  {'95 % by size':16} Porian 2024: RefinedWeb, OpenWebText2")
    for name, rung in found.items():
        bounds = rung.get("interval")
        shown = "n/a" if rung["a"] is None else f"{rung['a']:.3f}"
        between = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
        say(f"{name:24}{shown:>8}  {between:16} {', '.join(f'{a:.3f}' for a in rung['published'].values())}")
        if rung["a"] is None:
            say(f"  {rung['reason']}")
    path = folder / "porian_ladder.json"
    path.write_text(json.dumps({"rungs": found, "provenance": provenance()}, indent=1) + "\n", encoding="utf-8")
    draw(found, path.with_suffix(".png"))
    say(f"written: {path} and the picture beside it")


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw N* against C of every rung, and the exponents beside the published ones."""
    figure, grid = panels(2, 5.6, 4.2)
    left, right = grid[0]
    for (name, rung), color in zip(found.items(), COLORS.values(), strict=True):
        if rung["a"] is not None:
            C, N = (np.asarray([budget[key] for budget in rung["budgets"]]) for key in ("C", "N"))
            left.plot(C, N, "o-", color=color, markersize=4, label=f"{name}: {rung['a']:.2f}")
    places = np.arange(len(found))
    for source, mark in (("RefinedWeb", "s"), ("OpenWebText2", "D")):
        right.plot(
            places,
            [r["published"][source] for r in found.values()],
            mark,
            color=INK,
            mfc="none",
            label=f"Porian 2024, {source}",
        )
    here = [(i, r) for i, r in zip(places, found.values(), strict=True) if r["a"] is not None]
    for i, rung in here:
        bounds = rung["interval"] or [rung["a"]] * 2
        right.plot([i, i], bounds, color=COLORS["A3"], lw=1.4)
    right.plot([i for i, _ in here], [r["a"] for _, r in here], "o-", color=COLORS["A3"], label="here (95 % by size)")
    right.axhline(0.5, color=COLORS["A1"], lw=1, ls=":")
    right.set_xticks(places, [fill(name, 14, break_on_hyphens=False) for name in found], fontsize=7.5)
    right.set(ylabel=r"exponent a of $N^* \propto C^a$")
    left.set(xlabel="training FLOPs C, as the rung counts them", ylabel="best size N*, as the rung counts it")
    if here:
        log_axis(left, "x")
        log_axis(left, "y")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m experiments.porian_ladder SWEEP_FOLDER [FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "results")
