"""Laws of the ladder: each rung changes what it says and no more; on a known surface it finds the known exponent."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from experiments import porian_ladder as analysis
from experiments.porian_plans import (
    DECAY,
    FOUR_EPOCHS,
    HEAD,
    KAPLAN,
    LADDER,
    TUNED,
    WARMUP,
    porian_ladder,
    porian_ladder_gpu,
    porian_ladder_gpu_rates,
    porian_ladder_rates,
    porian_ladder_tpu,
    porian_ladder_tpu_rates,
)
from tests.surface import SURFACES
from transformer_jax.config import differences
from transformer_jax.errors import UserError
from transformer_jax.scaling.isoflop import along_curves
from transformer_jax.scaling.laws import frontier, predict
from transformer_jax.scaling.runs import Points
from transformer_jax.sweep.counts import counts

LAW, THETA = SURFACES["A3"]
EXPONENT = float(frontier(LAW, THETA[None]).a[0])


def changed(before: str, after: str) -> set[str]:
    runs = {run.name.removesuffix("-c4e11"): run for run in porian_ladder()}
    lines = differences(runs[f"{before}-w32"], runs[f"{after}-w32"])
    return {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize(
    ("before", "after", "fields"),
    [
        ("kaplan", "warmup", {"name", "optim.schedule.warmup"}),
        # Of a run that ends with its schedule only the end counts.
        ("warmup", "decay", {"name", "optim.schedule.steps", "train.eval_every"}),
        (
            "decay",
            "tuned",
            {
                *("name", "optim.b2", "optim.schedule.kind", "optim.schedule.peak", "optim.schedule.steps"),
                # Smaller batches, so more steps to the same budget.
                *("data.batch_rows", "data.rows_multiple", "train.steps", "train.eval_every", "train.save_every"),
                "optim.schedule.warmup",
            },
        ),
    ],
)
def test_a_rung_changes_what_it_says(before, after, fields):
    assert changed(before, after) == fields


def test_counting_the_head_changes_no_run():
    assert HEAD.runs == KAPLAN.runs
    assert replace(HEAD, head=False, published=KAPLAN.published) == KAPLAN


def test_runs_end_at_their_budgets_or_with_the_text_and_warm_up_as_long_as_they_are_large():
    runs = porian_ladder()
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        found = counts(run)
        N = found.N_non_embedding + found.N_head
        assert found.N == N  # one table for input and output
        budget = float(run.name.partition("-c")[2].replace("e", "e+") or 4e11)
        D = min(budget / (6 * N), FOUR_EPOCHS if run.name.count("-") == 1 else math.inf)
        assert abs(found.D / D - 1) <= 0.5 / run.train.steps * 1.01
        assert FOUR_EPOCHS + found.batch / 2 >= found.D
        warmup = run.optim.schedule.warmup * found.batch
        if run.name.startswith("kaplan"):
            assert warmup == 300 * 2048
        else:
            assert abs(warmup - N) <= found.batch / 2
    long = {run.optim.schedule.steps for run in runs if run.name.startswith(("kaplan", "warmup"))}
    assert long == {max(run.train.steps for run in runs if run.name.startswith("kaplan"))}
    assert {run.optim.schedule.kind for run in runs if run.name.startswith("tuned")} == {"constant"}


@pytest.mark.parametrize("plan", [porian_ladder, porian_ladder_gpu, porian_ladder_tpu])
def test_the_head_weighs_less_the_larger_the_model(plan):
    """Else its count could not change the exponent: d log(N without it) / d log N is 1 + the least slope asked here."""
    found = [counts(run) for run in plan() if run.name.startswith("kaplan")]
    log_N, log_share = (np.log([f(c) for c in found]) for f in (lambda c: c.N, lambda c: c.N_non_embedding / c.N))
    assert np.polyfit(log_N, log_share, 1)[0] > 0.1


@pytest.mark.parametrize("plan", [porian_ladder_rates, porian_ladder_gpu_rates, porian_ladder_tpu_rates])
def test_a_run_that_tries_a_rate_reaches_it_early(plan):
    for run in plan():
        assert run.optim.schedule.warmup <= 0.26 * run.train.steps


def test_the_rates_are_those_of_the_tuned_rung():
    for run in porian_ladder_rates():
        assert run.optim.schedule.kind == "constant"
        assert f"lr{run.optim.schedule.peak:.2g}-rows{run.data.batch_rows}-b2{run.optim.b2:g}" in run.name


WIDTHS = (3, 4, 6, 8, 12, 16, 24, 32, 48)


def table(path, rungs, widths=WIDTHS, first=0.01):
    """Curves on the known surface of models with 36 w^2 parameters and 300 w in the head, each to 1e12 FLOPs."""
    rows = []
    for rung in rungs:
        for width in widths:
            body, head = 36 * width**2, 300 * width
            ends = 1e12 * np.geomspace(1, first, 4) if rung == "decay" else [1e12]
            for end in ends:
                N, C = float(body + head), end * (np.geomspace(first, 1, 40) if rung != "decay" else np.array([0.5, 1]))
                D = C / 6 / N
                loss = np.exp(predict(LAW, THETA[None], np.full(len(D), N), D))[0]
                name = f"{rung}-w{width}-c{end:.3g}"
                rows += [(name, body, head, d, x, "done") for d, x in zip(D, loss, strict=True)]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["run", "n_non_embedding", "n_head", "d", "loss", "status"])
        writer.writerows(rows)
    return path


def test_a_known_surface_gives_its_exponent_and_a_smaller_count_a_larger_one(tmp_path):
    """Without the head, small models look smaller than they are: the exponent rises (Pearce and Song 2024)."""
    found = analysis.climb(table(tmp_path / "curves.csv", ("kaplan", "decay")))
    assert found["+ head counted"]["a"] == pytest.approx(EXPONENT, abs=0.02)
    assert found["+ decay matched"]["a"] == pytest.approx(EXPONENT, abs=0.02)
    assert found["as Kaplan"]["a"] > EXPONENT + 0.08
    low, high = found["+ head counted"]["interval"]
    assert low < EXPONENT < high
    for name in ("+ short warm-up", "+ tuned, constant rate"):
        assert found[name]["a"] is None
        assert "no finished run" in found[name]["reason"]


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    table(tmp_path / "curves.csv", ("kaplan", "warmup", "decay", "tuned"))
    analysis.main(tmp_path, tmp_path / "results")
    stored = json.loads((tmp_path / "results" / "porian_ladder.json").read_text())["rungs"]
    printed = capsys.readouterr().err
    for name, rung in stored.items():
        assert f"{rung['a']:.3f}" in printed
        assert tuple(rung["published"].values()) == LADDER[name].published
    assert (tmp_path / "results" / "porian_ladder.png").read_bytes().startswith(b"\x89PNG")


def test_a_rung_without_an_optimum_says_why(tmp_path):
    """The smallest model is best at every budget: no interior minimum, so no exponent."""
    path = table(tmp_path / "curves.csv", ("tuned",), widths=(96, 128, 192, 256))
    with pytest.raises(UserError, match="A2 needs two budgets with an interior minimum"):
        analysis.fit_rung(analysis.points_of(path, TUNED), TUNED)


def test_curves_are_read_where_they_are():
    """A power law between two evaluations is read exactly; outside a curve there is nothing."""
    C = np.array([1.0, 4.0, 64.0, 2.0, 32.0])
    curves = Points(np.array([0, 0, 0, 1, 1]), np.repeat([3.0, 5.0], [3, 2]), C, C, 2 * C**-0.1)
    read = along_curves(curves, np.array([0.5, 2.0, 8.0, 40.0]))
    np.testing.assert_array_equal(read.run, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(read.C, [2.0, 8.0, 40.0, 2.0, 8.0])
    np.testing.assert_allclose(read.loss, 2 * read.C**-0.1)
    np.testing.assert_allclose(6 * read.N * read.D, read.C)


def test_rungs_are_thrown_one_at_a_time():
    flags = [
        [r.head, r.short_warmup, r.matched_decay or r.tuned, r.tuned] for r in (KAPLAN, HEAD, WARMUP, DECAY, TUNED)
    ]
    assert [sum(row) for row in flags] == [0, 1, 2, 3, 4]
