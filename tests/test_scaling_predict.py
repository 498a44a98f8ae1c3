"""Laws of predictions on record: before the run, once, unchanged, and about that run; and of the transfer of rates."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.scaling_mup import KINDS, PEAKS, WIDTHS, main, mup_transfer
from tests.surface import SURFACES, iso_flops, noisy, write_csv
from tests.test_sweep import base, wsd
from transformer_jax.cli import main as tjax
from transformer_jax.errors import UserError
from transformer_jax.scaling.approaches import Settings
from transformer_jax.scaling.runs import Run, write_runs
from transformer_jax.scaling.table import TableOptions
from transformer_jax.sweep.counts import counts
from transformer_jax.sweep.register import compare, register

pytestmark = pytest.mark.optimised  # fits by the hundred

LAW, THETA = SURFACES["A3"]


def pretend(run, experiment, loss, steps=None):
    """Write what a run of the experiment would have left behind."""
    run.mkdir(parents=True)
    (run / "experiment.json").write_text(experiment.to_json())
    steps = steps or experiment.train.steps
    (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "split": "validation", "nll": loss}) + "\n")


@pytest.mark.slow
def test_a_prediction_comes_before_its_run_and_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6), 0.003, 0)
    write_csv(runs, tmp_path / "runs.csv", "n,d,c,loss")
    experiment = wsd(base(tmp_path), 400_000, "larger")
    record, folder = tmp_path / "prediction.json", tmp_path / "run"
    settings = Settings(bootstraps=60)
    found = register(tmp_path / "runs.csv", TableOptions(), settings, experiment, [folder], record)
    size = counts(experiment)
    assert (found["N"], found["D"], found["C"]) == (size.N, size.D, size.six_nd)
    loss = found["loss"]
    for kind in ("run", "size", "new_run"):
        assert loss[kind][0] < loss["value"] < loss[kind][1]
    assert loss["new_run"][1] - loss["new_run"][0] > loss["run"][1] - loss["run"][0]

    with pytest.raises(UserError, match="a prediction is registered once"):
        register(tmp_path / "runs.csv", TableOptions(), settings, experiment, [folder], record)
    assert compare(record, [folder])["outcomes"] == []
    folder.mkdir()
    (folder / "experiment.json").write_text("{}")  # what a run writes first
    with pytest.raises(UserError, match=r"has begun \(saved up to step 0\)"):
        register(tmp_path / "runs.csv", TableOptions(), settings, experiment, [folder], tmp_path / "late.json")
    (folder / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has begun \(saved up to step 7\)"):
        register(tmp_path / "runs.csv", TableOptions(), settings, experiment, [folder], tmp_path / "late.json")

    seed = replace(experiment, train=replace(experiment.train, seed=5))
    pretend(tmp_path / "a", experiment, loss["value"] * 1.001)
    pretend(tmp_path / "b", seed, loss["new_run"][1] * 1.01)
    pretend(tmp_path / "unfinished", experiment, 9.0, steps=3)
    outcomes = compare(record, [tmp_path / name for name in ("a", "b", "unfinished", "absent")])["outcomes"]
    assert [(o["seed"], o["inside"]) for o in outcomes] == [(0, True), (5, False)]
    assert outcomes[0]["error"] == pytest.approx(0.001)

    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom tests.test_sweep import base, wsd\n"
        "from transformer_jax.config import Experiment\n\n"
        f"def larger() -> Experiment:\n    return wsd(base(Path({str(tmp_path)!r})), 400_000, 'larger')\n"
    )
    with pytest.raises(SystemExit) as stop:
        tjax(["predict", "runs.csv", "--recipe", "mine.py:larger", "--trained", "a", "b", "--out", str(record)])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "trained with seed 0" in out
    assert "+0.10%, inside" in out
    assert "outside" in out

    pretend(tmp_path / "other", replace(experiment, optim=replace(experiment.optim, b2=0.5)), 1.0)
    with pytest.raises(UserError, match=r"optim\.b2: .* -> 0\.5"):
        compare(record, [tmp_path / "other"])
    record.write_text(record.read_text().replace(f'"value": {loss["value"]}', '"value": 1.0'))
    with pytest.raises(UserError, match="was changed after it was written"):
        compare(record, [])


def test_which_rate_is_best_at_every_width(tmp_path):
    """On losses with a known best rate: 8e-3 over the width under the standard, 8e-3 at every width under muP."""
    rows = []
    for experiment in mup_transfer():
        kind, width, rate = (
            experiment.name.partition("-")[0],
            experiment.model.width,
            experiment.optim.schedule.peak,
        )
        best = 8e-3 * (WIDTHS[0] / width if kind == "standard" else 1.0)
        loss = 2.0 + 0.1 * float(np.log2(rate / best)) ** 2
        diverged = rate == PEAKS[-1] and width == WIDTHS[-1]
        row = Run(experiment.name, n=width, d=1, c=1, loss=loss, learning_rate=rate, status="done")
        rows.append(replace(row, status="failed", excluded="NaN") if diverged else row)
    assert len(rows) == len(KINDS) * len(WIDTHS) * len(PEAKS)
    write_runs(rows, tmp_path / "runs.csv")
    main(tmp_path / "runs.csv", tmp_path)
    found = json.loads((tmp_path / "mup_transfer.json").read_text())
    assert found["standard"]["best_rate"] == {"32": 8e-3, "128": 2e-3}
    assert set(found["mup"]["best_rate"].values()) == {8e-3}
    assert found["standard"]["lost_by_the_narrow_rate"]["128"] == pytest.approx(0.4)
    assert found["mup"]["losses"]["128"][f"{PEAKS[-1]:g}"] is None
    assert (tmp_path / "mup_transfer.png").read_bytes().startswith(b"\x89PNG")
