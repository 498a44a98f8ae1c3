"""Laws of sweeps: a killed one makes the same table, branches equal runs from the start, a failure ends nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from transformer_jax import logs
from transformer_jax.checkpoint import steps_of
from transformer_jax.cli import main
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig, with_changes
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.logs import read_metrics
from transformer_jax.loop import run_training
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.moe import ExpertsConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.optim import schedule
from transformer_jax.scaling.files import read_columns
from transformer_jax.sweep import board
from transformer_jax.sweep import row as sweep_row
from transformer_jax.sweep import run as sweep_run
from transformer_jax.sweep.board import Board
from transformer_jax.sweep.cost import Speed, costs
from transformer_jax.sweep.counts import counts
from transformer_jax.sweep.grid import iso_flops, rates, short
from transformer_jax.sweep.row import failed, planned, write_row
from transformer_jax.sweep.run import _Folder, part, sweep
from transformer_jax.sweep.trunk import families, stable_steps

ROOT = Path(__file__).parent.parent
GPT = GPTConfig(vocab_size=40, context=16, width=12, layers=2, heads=3, feedforward=20)


def base(folder: Path) -> Experiment:
    """A decoder that learns the letters of a few lines in a blink."""
    text = folder / "text.txt"
    if not text.exists():
        numbers = np.random.default_rng(0).integers(0, 1000, 400)
        text.write_text("\n\n".join(f"the number {n} is {'even' if n % 2 == 0 else 'odd'}" for n in numbers))
    return Experiment(
        name="tiny",
        model=GPT,
        objective=CausalLM(),
        data=PackedText(str(text), boundary="blank_line", tokenizer="characters", context=16, batch_rows=8, threads=0),
        optim=OptimConfig(schedule=ScheduleConfig(kind="wsd", peak=1e-2, warmup=3, decay_fraction=0.25)),
        train=TrainConfig(log_every=1),
        compute=ComputeConfig(layers="unrolled"),
    )


def grid(folder: Path) -> list[Experiment]:
    """Two sizes x three budgets, with trunks."""
    models = [GPT, replace(GPT, width=18)]
    per_step = 6 * counts(replace(base(folder), train=TrainConfig(steps=1))).N * 8 * 16
    return iso_flops(base(folder), models, [12 * per_step, 20 * per_step, 32 * per_step], fewest_steps=3)


def wsd(experiment: Experiment, steps: int, name: str) -> Experiment:
    plan = replace(experiment.optim.schedule, steps=steps)
    rhythm = replace(experiment.train, steps=steps, eval_every=5, save_every=5)
    return replace(experiment, name=name, optim=replace(experiment.optim, schedule=plan), train=rhythm)


def comparable(path: Path) -> list[tuple]:
    """Return the cells of a table that do not depend on the clock."""
    cells = read_columns(path).cells
    return list(zip(*(cells[name] for name in cells if name not in ("seconds", "mfu", "code")), strict=True))


def test_a_grid_spends_its_budgets(tmp_path):
    runs = grid(tmp_path)
    assert len(runs) == 6 == len({e.name for e in runs})
    by_model = {e.model.width: [counts(x).six_nd for x in runs if x.model == e.model] for e in runs}
    for spent in by_model.values():
        np.testing.assert_allclose(spent, by_model[12], rtol=0.05)  # whole steps
    for e in runs:
        assert e.optim.schedule.steps == e.train.steps
        e.check()
    assert len({e.optim.schedule.warmup for e in runs}) == 1
    with pytest.raises(UserError, match="no model 50 steps"):
        iso_flops(base(tmp_path), [GPT], [1e3])
    assert [short(x) for x in (999, 12_345, 123_456, 1_300_000, 2.5e9)] == ["999", "12.3k", "123k", "1.3m", "2.5b"]


def test_counts_by_hand(tmp_path):
    e = wsd(base(tmp_path), 7, "seven")
    found = counts(e)
    d, f, v, t, layers = 12, 20, 40, 16, 2
    block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    assert v * d + t * d + layers * block + 2 * d == found.N
    assert found.N_non_embedding == layers * block + 2 * d
    assert found.N_head == v * d
    assert 7 * 8 * t == found.D
    per_token = layers * (2 * (4 * d * d + 2 * d * f) + 2 * d * t) + 2 * d * v
    assert found.exact == 3 * per_token * found.D
    ramped = counts(replace(e, data=replace(e.data, batch_rows=16, ramp=((8, 3),))))
    assert (3 * 8 + 4 * 16) * t == ramped.D
    assert ramped.exact == found.exact * ramped.D // found.D


def test_of_experts_those_count_that_a_token_takes(tmp_path):
    """N, and so 6ND, is that of a dense model of as much work; the rest is in N_total."""
    e = wsd(base(tmp_path), 7, "experts")
    dense, sparse = counts(e), counts(replace(e, model=replace(GPT, experts=ExpertsConfig(count=8, chosen=1))))
    router = 2 * 12 * 8
    assert dense.N + router == sparse.N
    one_expert = (dense.N_non_embedding - 2 * (4 * 12 * 12 + 4 * 12 + 4 * 12) - 2 * 12) // 2
    assert sparse.N_total == sparse.N + 2 * 7 * one_expert
    assert dense.N_total == dense.N
    assert sparse.six_nd / dense.six_nd == pytest.approx(sparse.exact / dense.exact, rel=0.05)
    row = planned(replace(e, model=replace(GPT, experts=ExpertsConfig(count=8, chosen=1))), None)
    assert (row.n, row.n_total, row.c) == (sparse.N, sparse.N_total, sparse.six_nd)


def test_stable_steps_are_those_of_the_schedule(tmp_path):
    for steps, warmup, fraction in ((20, 3, 0.25), (7, 5, 0.5), (11, 1, 0.1), (40, 0, 0.2)):
        e = wsd(base(tmp_path), steps, "x")
        plan = replace(e.optim.schedule, warmup=warmup, decay_fraction=fraction)
        e = replace(e, optim=replace(e.optim, schedule=plan))
        endless, own = schedule(replace(plan, kind="constant")), schedule(plan)
        same = [n for n in range(steps) if float(own(n)) == float(endless(n))]
        shared = stable_steps(e)
        assert same[:shared] == list(range(shared))
        assert shared >= len(same) - 1  # the first step of the fall is still at the peak
    assert stable_steps(replace(e, optim=OptimConfig(schedule=ScheduleConfig(kind="cosine")))) == 0


def test_families_are_runs_that_begin_alike(tmp_path):
    e = base(tmp_path)
    short_run, long_run, rate = wsd(e, 8, "a"), wsd(e, 20, "b"), rates(wsd(e, 20, "c"), [2e-2])[0]
    seed = replace(short_run, name="d", train=replace(short_run.train, seed=1))
    cosine = replace(short_run, name="e", optim=OptimConfig(schedule=ScheduleConfig(kind="cosine")))
    found = families([long_run, rate, short_run, seed, cosine, replace(cosine, name="f")])
    names = [[b.experiment.name for b in family.branches] for family in found]
    assert names == [["a", "b"], ["c-lr0.02"], ["d"], ["e"], ["f"]]
    assert [b.shared for b in found[0].branches] == [6, 0]
    assert (found[0].name, found[1].name) == ("b", None)


def test_shares_are_a_partition(tmp_path):
    found = families(grid(tmp_path) + rates(wsd(base(tmp_path), 9, "r"), [1e-3, 2e-3, 4e-3]))
    for n in (1, 2, 3, 7):
        parts = [part(found, (k, n)) for k in range(1, n + 1)]
        assert sorted(f.trunk.name for p in parts for f in p) == sorted(f.trunk.name for f in found)
    with pytest.raises(UserError, match="--share 3/2"):
        part(found, (3, 2))


@pytest.mark.slow
def test_a_branch_equals_a_run_from_the_start(tmp_path):
    e = base(tmp_path)
    runs = [wsd(e, 16, "long"), wsd(e, 8, "short"), wsd(e, 12, "middle")]
    swept = sweep("s", runs, tmp_path / "swept")
    assert [row.status for row in swept.rows] == ["done"] * 3
    assert {row.trunk for row in swept.rows} == {"long"}
    for run, row in zip(runs, swept.rows, strict=True):
        run_training(run, tmp_path / "alone" / run.name)
        alone, branched = (read_metrics(tmp_path / kind / run.name) for kind in ("alone", "swept/runs"))
        last = {(r["step"], r["split"]): (r["nll"], r.get("grad_norm")) for r in branched}
        for r in alone:
            assert last[r["step"], r["split"]] == (r["nll"], r.get("grad_norm")), r
        assert row.loss == alone[-1]["nll"]
    # A branch that leaves where the trunk has already passed starts from an older checkpoint, or anew: the same again.
    early = wsd(e, 6, "early")
    again = sweep("s", [*runs, early], tmp_path / "swept")
    run_training(early, tmp_path / "alone" / "early")
    assert again.rows[-1].loss == read_metrics(tmp_path / "alone" / "early")[-1]["nll"]


PLAN = """\
from pathlib import Path
from tests.test_sweep import base, grid
from transformer_jax.config import Experiment

def plan() -> list[Experiment]:
    return grid(Path("."))[:4]
"""


def _start(folder: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    program = "from transformer_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "sweep", "plans.py:plan", *options]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch, number: int) -> list[int]:
    """End the process in the middle of its number-th write; returns the count of writes so far."""
    count = [0]

    def patch(owner, name, half) -> None:
        write = getattr(owner, name)

        def killable(*args, **options):
            count[0] += 1
            if count[0] == number:
                half(*args)
                raise Killed
            return write(*args, **options)

        monkeypatch.setattr(owner, name, killable)

    text = Path.write_text
    patch(Path, "write_text", lambda path, content, *_: text(path, content[: len(content) // 2]))
    patch(Path, "replace", lambda *_: None)
    patch(Path, "rename", lambda *_: None)
    patch(shutil, "copytree", lambda _, there, *rest: Path(there).mkdir(parents=True))
    patch(sweep_run, "write_runs", lambda _, path: text(path, "run,n"))
    return count


def pretend(experiment, run):
    """Leave behind what a training does, from its newest checkpoint on, without training.

    The state is a number that each step changes by its learning rate, so a branch from a wrong place ends elsewhere.
    """
    assert not (run / "row.json").exists(), f"{run.name} is trained again"
    first = max(steps_of(run), default=0)
    value = float((run / "checkpoints" / str(first) / "state").read_text()) if first else float(experiment.model.width)
    run.mkdir(parents=True, exist_ok=True)
    known = [record for record in read_metrics(run) if record["step"] <= first]
    fixed, steps, last = stable_steps(experiment), experiment.train.steps, experiment.optim.schedule.steps
    with (run / "metrics.jsonl").open("w") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in known)
    for step in range(first + 1, steps + 1):
        value = 0.9 * value + min(1.0, (last - step + 1) / (last - fixed))
        record = {"step": step, "nll": value, "seconds": float(step), "tokens_per_second": 1.0}
        with (run / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps(record | {"split": split}) + "\n" for split in ("train", "validation"))
        if step % experiment.train.save_every == 0 or step == steps:
            scratch = run / "checkpoints" / "incomplete"
            (scratch / "meta").mkdir(parents=True, exist_ok=True)
            meta = {"experiment": experiment.to_json(), "tokenizer": "", "labels": []}
            for name, content in (("meta/metadata", json.dumps(meta)), ("state", repr(value))):
                (scratch / name).write_bytes(content.encode())
            scratch.rename(run / "checkpoints" / str(step))
    return SimpleNamespace(stopped_by=""), SimpleNamespace(summary=lambda: {"tokenizer": "t", "fingerprint": "f"})


@pytest.mark.slow
def test_killed_three_times_at_any_write_it_makes_the_same_table(tmp_path, monkeypatch):
    """In the middle of each file that a sweep writes, a row, a table or a branch among them; no run is made twice."""
    e = base(tmp_path)
    runs = [wsd(e, 10, "long"), wsd(e, 6, "short"), replace(wsd(e, 5, "other"), model=replace(GPT, width=18))]
    where = {"commit": "c", "devices": 1, "device": "cpu"}
    monkeypatch.setattr(sweep_run, "run_training", pretend)
    monkeypatch.setattr(sweep_run, "measured", lambda _: Speed(0.0, 1e-9, 0.1, "here"))
    for module in (sweep_run, sweep_row):
        monkeypatch.setattr(module, "provenance", lambda: where)

    def tables(out: Path) -> list:
        return [comparable(out / name) for name in ("runs.csv", "curves.csv")]

    with monkeypatch.context() as context:
        writes = killed_at(context, 0)
        assert [row.status for row in sweep("s", runs, tmp_path / "whole").rows] == ["done"] * 3
    whole = tables(tmp_path / "whole")
    assert [len(table) for table in whole] == [3, 10 + 6 + 5]
    for number in range(1, writes[0] + 1):
        out = tmp_path / f"killed-{number}"
        for _ in range(3):
            with monkeypatch.context() as context:
                killed_at(context, number)
                with contextlib.suppress(Killed):
                    sweep("s", runs, out)
        sweep("s", runs, out)
        assert tables(out) == whole, f"killed three times at write {number}"
        assert len(steps_of(out / "runs" / "long")) == len(steps_of(tmp_path / "whole" / "runs" / "long"))


@pytest.mark.slow
def test_killed_three_times_it_makes_the_same_table(tmp_path):
    (tmp_path / "plans.py").write_text(PLAN)
    base(tmp_path)

    def progress() -> int:
        return sum(len(read_metrics(run)) for run in (tmp_path / "runs" / "plan" / "runs").glob("*"))

    before = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        started = _start(tmp_path)
        deadline = time.monotonic() + 120
        while started.poll() is None and progress() < before + 15 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.poll() is None, started.communicate()[1].decode()
        started.send_signal(number)
        _, err = started.communicate(timeout=300)
        assert started.returncode in (-number, 128 + signal.SIGTERM), err.decode()
        before = progress()
    last = _start(tmp_path, "--json")
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err.decode()
    assert len(json.loads(out)["runs"]) == 4
    assert b"tjax fit runs/plan/runs.csv" in err
    whole = _start(tmp_path, "--out", "whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err.decode()
    for table in ("runs.csv", "curves.csv"):
        rows, uninterrupted = comparable(tmp_path / "runs" / "plan" / table), comparable(tmp_path / "whole" / table)
        assert rows == uninterrupted


def test_a_run_that_another_share_ends_meanwhile_is_in_the_table(tmp_path, monkeypatch):
    """Of two shares that write the tables at once, the last one writes the runs of both; each has its own scratch."""
    runs = [wsd(base(tmp_path), steps, name) for steps, name in ((6, "mine"), (8, "theirs"))]
    here = _Folder(tmp_path / "out", runs, families(runs))
    here.begin({})
    write, scratch = sweep_run.write_runs, []

    def slowly(rows, path):
        write_row(failed(here.planned["theirs"], "theirs"), here.run("theirs"))
        scratch.append(path.name)
        write(rows, path)

    monkeypatch.setattr(sweep_run, "write_runs", slowly)
    here.end(failed(here.planned["mine"], "mine"))
    assert read_columns(here.table).cells["run"] == read_columns(here.curves).cells["run"] == ["mine", "theirs"]
    assert len(set(scratch)) == len(scratch) == 4
    assert sorted(path.name for path in here.out.iterdir()) == ["curves.csv", "runs", "runs.csv", "sweep.json"]


@pytest.mark.slow
def test_a_failure_is_recorded_and_the_next_run_begins(tmp_path, capsys):
    e = base(tmp_path)
    bad = replace(wsd(e, 6, "bad"), data=replace(e.data, dataset=str(tmp_path / "absent.txt")))
    nan = rates(wsd(e, 6, "nan"), [1e30])[0]
    good = replace(wsd(e, 6, "good"), train=replace(wsd(e, 6, "good").train, seed=3))
    swept = sweep("s", [bad, nan, good], tmp_path / "out")
    assert [row.status for row in swept.rows] == ["failed", "failed", "done"]
    assert "absent.txt" in swept.rows[0].excluded
    assert "gradient norm" in swept.rows[1].excluded
    cells = read_columns(swept.table).cells
    assert cells["status"] == ["failed", "failed", "done"]
    assert "absent.txt" in cells["excluded"][0]
    capsys.readouterr()
    again = sweep("s", [bad, nan, good], tmp_path / "out")  # nothing is tried again
    assert "step" not in capsys.readouterr().err
    assert comparable(again.table) == comparable(swept.table)
    longer = replace(wsd(e, 9, "longer"), data=bad.data)
    assert [row.status for row in sweep("s", [bad, longer, nan, good], tmp_path / "out").rows][:2] == ["failed"] * 2
    (tmp_path / "absent.txt").write_text((tmp_path / "text.txt").read_text())
    retried = sweep("s", [bad, longer, nan, good], tmp_path / "out", retry=True)
    assert [row.status for row in retried.rows] == ["done", "done", "failed", "done"]
    # A trunk that had failed is a trunk again: what both have trained was trained once.
    branch, trunk = (read_metrics(tmp_path / "out" / "runs" / name) for name in ("bad", "longer"))
    assert branch[0] == trunk[0]  # its seconds too


def test_the_live_table_and_the_bar_of_a_run_share_a_terminal(tmp_path, monkeypatch):
    page = io.StringIO()
    console = Console(file=page, force_terminal=True, width=120, color_system=None)
    for module in (logs, board):
        monkeypatch.setattr(module, "console", console)
    runs = grid(tmp_path)
    rows = [planned(e, None) for e in runs]
    cost = costs(families(runs), lambda e: 1.0, 5.0)
    shown = Board(rows, cost, [row.run for row in rows])
    assert shown.left() == sum(c.seconds for c in cost.values())
    with shown.shown():
        shown.begin(rows[0].run)
        with logs.meter(0, 3) as bar:
            bar.update(2, "loss 1.234")
            logs.say("a line above")
        shown.end(replace(rows[0], status="done", loss=1.25, seconds=6.0))
        shown.end(failed(rows[1], "NaN"))
    text = page.getvalue()
    for part_of in ("a line above", "loss 1.234", "1.2500", "2 of 6 ended, 1 failed"):
        assert part_of in text
    assert rows[0].run in text
    assert shown.left() < sum(c.seconds for c in cost.values())


def test_bad_plans_end_before_anything_begins(tmp_path):
    e = wsd(base(tmp_path), 6, "a")
    with pytest.raises(UserError, match="several experiments called 'a'"):
        sweep("s", [e, e], tmp_path / "out")
    with pytest.raises(UserError, match="does not divide"):
        sweep("s", [replace(e, model=replace(GPT, heads=5))], tmp_path / "out")
    changed = with_changes([e, wsd(e, 9, "b")], {"train": replace(e.train, seed=4)})
    assert [(x.train.seed, x.train.steps) for x in changed] == [(4, 6), (4, 9)]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans.py").write_text(PLAN)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "plans.py:plan", "--dry-run", "--json"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    runs = json.loads(out)["runs"]
    assert len(runs) == 4
    trained = sum(run["trained"] * run["c"] for run in runs)
    assert f"{trained:.3g} by 6ND" in err
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "plans.py:plan", "--train.steps", "9"])
    assert stop.value.code == 2
    assert "train.steps is what a plan decides" in capsys.readouterr().err
    assert trained < sum(run["c"] for run in runs)
    assert all(run["seconds"] > 0 for run in runs)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "plans.py:plan", "--on", "v5e-1x"])
    assert stop.value.code == 2
    assert steps_of(tmp_path / "runs") == []
    assert jax.device_count() == 8
