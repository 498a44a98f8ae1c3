"""sweep, predict: from a plan to a table of runs, and from the table to a loss on record before its run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from transformer_jax import distributed
from transformer_jax.cli.verb import Verb, out
from transformer_jax.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, with_changes
from transformer_jax.errors import UserError
from transformer_jax.logs import print_json, say
from transformer_jax.recipes import find_experiments, find_recipe
from transformer_jax.scaling.approaches import Settings
from transformer_jax.scaling.report import bounds, number
from transformer_jax.scaling.runs import Run
from transformer_jax.scaling.study import plain
from transformer_jax.scaling.table import TableOptions
from transformer_jax.storage import folder_here
from transformer_jax.sweep.cost import duration, foresee
from transformer_jax.sweep.register import compare, register
from transformer_jax.sweep.run import sweep


@dataclass(frozen=True)
class SweepOptions:
    """Train the runs of a plan, one after another, into a table that `tjax fit` reads; says first what it takes.

    PLAN is a function that returns a list of experiments. Runs that differ only in when their learning rate begins to
    fall (schedule wsd) are trained once up to there. Typed again, it goes on where it stood; a run that fails is
    recorded with its reason, and the next begins. What is set here holds for all runs of the plan.
    """

    data: DataConfig
    train: TrainConfig
    compute: ComputeConfig
    mesh: MeshConfig
    out: str = ""
    """Folder of the table and the runs; by default runs/PLAN."""
    share: str = "1/1"
    """K/N: train the K-th of N parts of about equal cost; processes that share a folder can do so at the same time."""
    retry: bool = False
    """Train again what has failed."""
    dry_run: bool = False
    """Only say what it takes."""
    on: str = ""
    """Only say what it takes there: a TPU slice (v5e-16) or GPUs (h100-8), by the estimate of `tjax plan`."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class PredictOptions(Settings, TableOptions):
    """Put on record what a run will reach before it is trained; typed again once it is, compare.

    RUNS is the table that the law is fitted to (approach 3), as for `tjax fit`.
    """

    recipe: str = ""
    """What will be trained, by `tjax train RECIPE`."""
    trained: tuple[str, ...] = ()
    """Run folders of it, which may differ in train.seed; by default runs/RECIPE."""
    out: str = ""
    """File of the record; by default prediction-RECIPE.json beside the table."""
    json: bool = False
    """Print one JSON object."""


def _predict(target: str, options: PredictOptions) -> int:
    if not options.recipe:
        raise UserError("which run? --recipe RECIPE names what will be trained.")
    experiment = find_recipe(options.recipe)
    table, runs = Path(target), [Path(run) for run in options.trained or (f"runs/{experiment.name}",)]
    record = Path(options.out) if options.out else table.with_name(f"prediction-{experiment.name}.json")
    known = record.exists()
    found = compare(record, runs) if known else register(table, options, options, experiment, runs, record)
    if options.json:
        print_json(found)
        return 0
    loss = found["loss"]
    out().print(
        f"{found['experiment']}: N {found['N']:.3g}, D {found['D']:.3g}, {found['C']:.3g} FLOPs, "
        f"{found['times_the_largest_run_known']:.3g} times the largest run known\n"
        f"predicted loss {loss['value']:.4f}; 95 %: law {bounds(loss['run'], 4)}, one new run "
        f"{bounds(loss['new_run'], 4)}\nregistered {found['provenance']['time']}, sha256 {found['sha256'][:16]}",
        markup=False,
    )
    for outcome in found.get("outcomes", []):
        inside = "inside" if outcome["inside"] else "outside"
        out().print(
            f"trained with seed {outcome['seed']}: {outcome['loss']:.4f}, {outcome['error']:+.2%}, {inside} the "
            f"interval ({outcome['run']})",
            markup=False,
        )
    if not found.get("outcomes"):
        what = "not trained yet" if known else f"written: {record}"
        say(f"{what}; next: tjax train {options.recipe}, then this again")
    return 0


def _sweep_default(plan: str) -> SweepOptions:
    first = find_experiments(plan)[0]
    return SweepOptions(first.data, first.train, first.compute, first.mesh)


def _sweep(plan: str, options: SweepOptions) -> int:
    planned = find_experiments(plan)
    if options.train.steps != planned[0].train.steps:
        raise UserError("train.steps is what a plan decides for each of its runs; write a plan of your own.")
    settings = {node: getattr(options, node) for node in ("data", "train", "compute", "mesh")}
    experiments = with_changes(planned, settings)
    name = plan.rsplit(":", maxsplit=1)[-1]
    if options.on or options.dry_run:
        runs = foresee(name, experiments, options.on)
        if options.json:
            print_json({"runs": runs})
        else:
            _print_costs(runs)
        return 0
    k, _, n = options.share.partition("/")
    if not (k.isdigit() and n.isdigit()):
        raise UserError(f"--share {options.share}: write K/N, as 2/4.")
    folder = folder_here(options.out or f"runs/{name}", "a sweep")
    distributed.initialize()
    swept = sweep(name, experiments, folder, share=(int(k), int(n)), retry=options.retry)
    states = Counter(row.status for row in swept.rows)
    if options.json:
        rows = [plain(asdict(row)) for row in swept.rows]
        print_json({"table": str(swept.table), "curves": str(swept.curves), "runs": rows})
    else:
        _print_rows(swept.rows)
    say(", ".join(f"{count} {state}" for state, count in states.items()) + f": {swept.table}")
    say(f"next: tjax fit {swept.table}  (with training curves: tjax fit {swept.curves})")
    return 1 if states["failed"] else 0


def _print_rows(runs: Sequence[Run]) -> None:
    rows = Table("run", "N", "D", "FLOPs (6ND)", "exact", "loss", "state", box=None, pad_edge=False)
    for run in runs:
        loss = "" if math.isnan(run.loss) else f"{run.loss:.4f}"
        exact = "" if run.c_exact is None else number(run.c_exact, 3)
        state = f"{run.status}{f': {run.excluded}' if run.excluded else ''}"
        rows.add_row(run.run, number(run.n, 3), number(run.d, 3), number(run.c, 3), exact, loss, state)
    out().print(rows)


def _print_costs(runs: Sequence[dict[str, Any]]) -> None:
    rows = Table("run", "N", "D", "FLOPs (6ND)", "exact", "trained", "time", box=None, pad_edge=False)
    for run in runs:
        sizes = (number(run[name], 3) for name in ("n", "d", "c", "c_exact"))
        rows.add_row(run["run"], *sizes, f"{run['trained']:.0%}", duration(run["seconds"]))
    out().print(rows)


VERBS = {
    "sweep": Verb(
        "PLAN",
        "train the runs of a plan into a table for `tjax fit`, or go on",
        SweepOptions,
        _sweep_default,
        _sweep,
    ),
    "predict": Verb(
        "RUNS",
        "a loss on record before its run is trained, and compared after it",
        PredictOptions,
        lambda _: PredictOptions(),
        _predict,
    ),
}
