"""The sweep: trains what has not been trained, family by family, and keeps the table of runs up to date.

Everything it knows stands in the folders of the runs: a row where a run has ended, checkpoints where one has begun. So
the same command goes on after any interruption, and several processes can each take a share of the same folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from transformer_jax.checkpoint import check_same_run, load_meta, steps_of
from transformer_jax.config import Experiment
from transformer_jax.data.cache import fingerprint
from transformer_jax.errors import Interrupted, UserError
from transformer_jax.logs import say
from transformer_jax.loop import run_training
from transformer_jax.provenance import provenance
from transformer_jax.scaling.runs import Run, write_runs
from transformer_jax.storage import whole
from transformer_jax.sweep.board import Board
from transformer_jax.sweep.cost import Speed, announce, costs, measured, summary, where_measured
from transformer_jax.sweep.counts import step_flops
from transformer_jax.sweep.row import curve, failed, finished, forget_row, planned, read_row, write_row
from transformer_jax.sweep.trunk import Family, families, fork


@dataclass(frozen=True)
class Swept:
    """What a sweep has made."""

    rows: list[Run]
    """Of all runs, in the order of the plan."""
    table: Path
    """A row a run."""
    curves: Path
    """A row for every validation."""


def sweep(
    name: str, experiments: Sequence[Experiment], out: Path, *, share: tuple[int, int] = (1, 1), retry: bool = False
) -> Swept:
    """Train every experiment that has not been trained in `out`; a run that fails is recorded, and the next begins.

    Args:
        name: what to call the sweep.
        experiments: with different names.
        out: folder of the table, with the runs in `runs/`.
        share: (K, N): train the K-th of N parts, which several processes (or machines, on a folder that they share)
            do at the same time.
        retry: train the failed ones again.

    Raises:
        UserError: two experiments of one name, bad settings, or a folder that holds other experiments.
        Interrupted: a signal ended it while a run was trained, which has been saved; the same call goes on. (Between
            runs there is nothing to save, and SIGTERM ends the process as it always does.)
    """
    check(experiments)
    found = sorted(families(experiments), key=_flops)
    mine = part(found, share)
    here = _Folder(out, experiments, found)
    here.check()
    speed = here.speed() or measured(experiments)
    cost = costs(found, speed.of, speed.start)
    announce(name, summary(list(cost.values())), speed.where)
    names = [branch.experiment.name for family in mine for branch in family.branches]
    if retry:
        here.forget_failed(names)
    rows = {row.run: row for row in here.rows()}
    shown = [rows[branch.experiment.name] for family in found for branch in family.branches]
    board = Board(shown, cost, names)
    if share[1] > 1:
        say(f"share {share[0]} of {share[1]}: {len(names)} runs")
    begun = {"name": name, "estimate": summary(list(cost.values())), "speed": vars(speed), "provenance": provenance()}
    here.begin(begun)
    with board.shown():
        for family in mine:
            _train(family, here, board)
    return here.swept()


def check(experiments: Sequence[Experiment]) -> None:
    """Raise `UserError` if the experiments cannot make a sweep."""
    twice = [name for name, count in Counter(e.name for e in experiments).items() if count > 1]
    if twice:
        raise UserError(f"the plan has several experiments called '{twice[0]}'; each run needs a name of its own.")
    for experiment in experiments:
        experiment.check()


def part(found: Sequence[Family], share: tuple[int, int]) -> list[Family]:
    """Return the K-th of N parts of about equal cost; a family stays together.

    Raises:
        UserError: K is not one of 1 ... N.
    """
    k, n = share
    if not 1 <= k <= n:
        raise UserError(f"--share {k}/{n}: write K/N with K from 1 to N.")
    loads, parts = [0.0] * n, list[list[Family]]([] for _ in range(n))
    for family in sorted(found, key=_flops, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _flops(family)
        parts[lightest].append(family)
    return [family for family in found if family in parts[k - 1]]


def _flops(family: Family) -> float:
    return float(sum(b.experiment.train.steps - b.shared for b in family.branches)) * step_flops(family.trunk)


class _Folder:
    """The folder of a sweep."""

    def __init__(self, out: Path, experiments: Sequence[Experiment], found: Sequence[Family]) -> None:
        self.out = out
        self.experiments = {e.name: e for e in experiments}
        trunk = {b.experiment.name: family.name for family in found for b in family.branches}
        self.planned = {e.name: planned(e, trunk[e.name]) for e in experiments}
        self.table, self.curves = out / "runs.csv", out / "curves.csv"

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def check(self) -> None:
        """Refuse a folder with other experiments of the same names, before anything begins."""
        for name, experiment in self.experiments.items():
            if steps_of(self.run(name)):
                check_same_run(load_meta(self.run(name))[0], experiment, self.run(name))

    def ended(self, name: str) -> Run | None:
        """Return the row of a run that has ended as it is planned now."""
        row = read_row(self.run(name))
        return row if row is not None and row.config == self.planned[name].config else None

    def rows(self) -> list[Run]:
        return [self.ended(name) or row for name, row in self.planned.items()]

    def forget_failed(self, names: Sequence[str]) -> None:
        """Let runs that have failed count as not trained."""
        for name in names:
            if (row := self.ended(name)) and row.status == "failed":
                forget_row(self.run(name))

    def end(self, row: Run) -> None:
        """Keep the row of a run that has ended, and write the tables anew."""
        if jax.process_index() == 0:
            write_row(row, self.run(row.run))
        self.swept()

    def swept(self) -> Swept:
        """Write both tables (one process of a job does), from the rows of all runs that have ended."""
        rows, written = self.rows(), list[str | None]()
        # Again if meanwhile another share has ended a run: else the older table of two could be the last one written.
        while (states := [row.status for row in rows]) != written and jax.process_index() == 0:
            over = [row for row in rows if row.status != "planned"]
            points = [point for row in over for point in curve(row, self.run(row.run))]
            for some, path in ((over, self.table), (points, self.curves)):
                with whole(path) as scratch:
                    write_runs(some, scratch)
            rows, written = self.rows(), states
        return Swept(rows, self.table, self.curves)

    def plan(self) -> str:
        """Return a hash that stands for all experiments."""
        return fingerprint([e.to_json() for e in self.experiments.values()])

    def speed(self) -> Speed | None:
        """Return what was measured when the same plan was begun on the same devices."""
        path = self.out / "sweep.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        same = stored["plan"] == self.plan() and stored["speed"]["where"] == where_measured()
        return Speed(**stored["speed"]) if same else None

    def begin(self, begun: dict[str, Any]) -> None:
        """Keep the estimate."""
        if jax.process_index() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(begun | {"plan": self.plan()}, indent=2)
            with whole(self.out / "sweep.json") as scratch:
                scratch.write_text(text + "\n", encoding="utf-8")


def _train(family: Family, here: _Folder, board: Board) -> None:
    """Train the runs of a family: the trunk up to each branch, that branch to its end, at last the trunk's own end."""
    for branch in family.branches:
        experiment, row = branch.experiment, board.rows[branch.experiment.name]
        run = here.run(row.run)
        if row.status in ("done", "failed"):
            continue
        board.begin(row.run)
        try:
            if branch.shared:
                _advance(family.trunk, branch.shared, here)
                fork(here.run(family.trunk.name), experiment, branch.shared, run)
            outcome, data = run_training(experiment, run)
            if outcome.stopped_by:
                raise Interrupted(outcome.stopped_by)
            row = finished(here.planned[row.run], experiment, run, data.summary())
        except (UserError, jax.errors.JaxRuntimeError) as error:
            row = failed(here.planned[row.run], " ".join(str(error).split())[:300])
        here.end(row)
        board.end(row)


def _advance(trunk: Experiment, steps: int, here: _Folder) -> None:
    """Train the trunk up to a step, unless it is there already or cannot get there."""
    run = here.run(trunk.name)
    failed_before = (row := here.ended(trunk.name)) is not None and row.status == "failed"
    if failed_before or max(steps_of(run), default=0) >= steps:
        return
    outcome, _ = run_training(replace(trunk, train=replace(trunk.train, steps=steps)), run)
    if outcome.stopped_by:
        raise Interrupted(outcome.stopped_by)
