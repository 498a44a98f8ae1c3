"""fit, next: from a table of runs to a law, and to the next run; and the verbs of sweeping.py, which make the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from transformer_jax.cli import sweeping
from transformer_jax.cli.verb import Verb, out
from transformer_jax.logs import print_json, say
from transformer_jax.scaling.approaches import APPROACHES, Approach, Settings
from transformer_jax.scaling.bootstrap import KINDS
from transformer_jax.scaling.next_run import next_run
from transformer_jax.scaling.planner import Target
from transformer_jax.scaling.report import bounds, number, write_study
from transformer_jax.scaling.study import study
from transformer_jax.scaling.table import TableOptions


@dataclass(frozen=True)
class FitOptions(Settings, TableOptions):
    """Fit scaling laws to a table of runs: Chinchilla's approaches 1, 2 and 3, Kaplan's form, over-training.

    RUNS is a CSV, TSV, JSONL or Parquet file, one row a run (or a row of its training curve). Each approach comes with
    95 % intervals by run and by model size; the report has diagnostics, decisions, and what was left out and why.
    """

    approaches: tuple[Approach, ...] = tuple(APPROACHES)
    """Which; one that the table cannot support is left out, with the reason."""
    budgets: tuple[float, ...] = ()
    """FLOPs (6ND) to decide for; by default the largest of the table, and 10 and 100 times that."""
    scipy_starts: int = 0
    """Also time SciPy's L-BFGS on so many of the 4,500 starts of A3 (4500: all)."""
    out: str = ""
    """Folder of the report; by default runs/fit-NAME."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class NextOptions(Settings, TableOptions):
    """Propose the next run (N, D): the one after which the interval of a target is expected to be narrowest.

    With --width, also the cheapest grid of runs that reaches it, runs of one size sharing a trunk at constant learning
    rate from which each branches off with a cooldown.
    """

    budget: float = 0.0
    """FLOPs (6ND) of the next run at most; with --width, of the whole grid."""
    target: Target = "exponent"
    """What is to be known better: the exponent a of N* ~ C^a, or the loss of the best run at --at FLOPs."""
    at: float = 0.0
    """FLOPs of that run; by default 100 times the largest of the table."""
    width: float = 0.0
    """Wanted width of the 95 % interval (of a, or of log loss)."""
    show: int = 10
    """Lines of the ranking to print; --json has all of it."""
    json: bool = False
    """Print one JSON object."""


def _fit(target: str, options: FitOptions) -> int:
    found = study(Path(target), options, options, options.approaches, options.budgets, options.scipy_starts)
    folder = Path(options.out or f"runs/fit-{Path(target).stem}")
    page, *_ = write_study(found, folder)
    if options.json:
        print_json(found.figures | {"report": str(page)})
    else:
        _print(found.figures)
    say(f"report: {page}  (report.md, fit.json, runs.csv and pictures beside it)")
    return 0


def _print(figures: dict[str, Any]) -> None:
    console = out()
    rows = Table("approach", "a", "95 % by run", "95 % by size", box=None, pad_edge=False)
    for name, e in figures["approaches"].items():
        rows.add_row(name, f"{e['a']:.3f}", *(bounds(e["intervals"][kind]["a"]) for kind in KINDS))
    console.print(rows)
    console.print()
    for name, e in figures["approaches"].items():
        by_run = {key: bound for key, bound in e["intervals"]["run"].items() if key not in ("a", "b", "k")}
        if by_run:
            values = [f"{key} {number(e[key])} ({bounds(bound)})" for key, bound in by_run.items()]
            console.print(f"{name}: {', '.join(values)}", markup=False)
    console.print()
    rows = Table("budget", "by", "N*", "D*", "loss", "95 % of one new run", box=None, pad_edge=False)
    for by in figures["decisions"]:
        for name in figures["approaches"]:
            what = by[name]
            loss = what.get("loss", {"value": None, "new_run": None})
            ends = (number(loss["value"]), bounds(loss["new_run"], 4)) if what.get("loss") else ("", "")
            rows.add_row(f"{by['C']:.3g}", name, number(what["N"]["value"], 3), number(what["D"]["value"], 3), *ends)
    console.print(rows)
    for warning in figures.get("diagnostics", {}).get("warnings", []):
        say(f"warning: {warning}")


def _next(target: str, options: NextOptions) -> int:
    found = next_run(Path(target), options, options, options.budget, options.target, options.at, options.width)
    if options.json:
        print_json(found)
        return 0
    console = out()
    goal = "exponent a" if options.target == "exponent" else f"log loss at {found['at']:.3g} FLOPs"
    console.print(f"95 % interval of the {goal}: width {found['width']:.4g}")
    rows = Table("N", "D", "D/N", "FLOPs", "width after it", "narrower by", box=None, pad_edge=False)
    for run in found["ranking"][: options.show]:
        rows.add_row(
            number(run["N"], 3),
            number(run["D"], 3),
            number(run["D"] / run["N"], 3),
            number(run["C"], 3),
            number(run["width"]),
            f"{run['shrinks']:.1%}",
        )
    console.print(rows)
    if plan := found.get("plan"):
        console.print()
        reached = "reaches" if plan["reached"] else "does not reach"
        console.print(
            f"cheapest grid: {len(plan['runs'])} runs, {plan['cost']:.3g} FLOPs, width {plan['width']:.4g} "
            f"({reached} {options.width:g})"
        )
        rows = Table("N", "D", "FLOPs it adds", "width after it", box=None, pad_edge=False)
        for run in plan["runs"]:
            rows.add_row(number(run["N"], 3), number(run["D"], 3), number(run["cost"], 3), number(run["width"]))
        console.print(rows)
    return 0


VERBS = {
    "fit": Verb(
        "RUNS",
        "scaling laws of a table of runs, with intervals, diagnostics, decisions and a report",
        FitOptions,
        lambda _: FitOptions(),
        _fit,
    ),
    "next": Verb(
        "RUNS",
        "the next run to buy: the one that shrinks the interval most",
        NextOptions,
        lambda _: NextOptions(),
        _next,
    ),
} | sweeping.VERBS
