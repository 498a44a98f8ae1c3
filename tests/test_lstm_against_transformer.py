"""Laws of the comparison: families differ in model and rate alone, sizes are alike; the report is its tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import lstm_against_transformer as comparison
from transformer_jax.config import differences
from transformer_jax.errors import UserError
from transformer_jax.sweep.counts import counts


def test_families_read_the_same_and_are_of_a_size():
    runs = comparison.lstm_against_transformer()
    assert len({run.name for run in runs}) == len(runs) == 3 * len(comparison.FAMILIES)
    for run in runs:
        changed = {line.partition(":")[0] for line in differences(runs[0], run)}
        assert all(name.startswith("model.") or name in ("name", "optim.schedule.peak") for name in changed)
        run.check()
    for i in range(0, len(runs), len(comparison.FAMILIES)):
        sizes = [counts(run).N_non_embedding for run in runs[i : i + len(comparison.FAMILIES)]]
        assert max(sizes) < 1.25 * min(sizes)


def written(folder, runs):
    folder.mkdir()
    lines = [f"{run},{size},{loss},{status}" for run, size, loss, status in runs]
    (folder / "runs.csv").write_text("\n".join(["run,n_non_embedding,loss,status", *lines]) + "\n")
    return folder


def test_the_report_holds_the_exponent_and_both_ends(tmp_path, monkeypatch):
    sizes = np.array([1000, 4000, 16_000])
    runs = [(f"lstm2-n{n}", n, 5 * n**-0.07, "done") for n in sizes] + [("lstm1-n9", 9000, 2.5, "done")]
    runs += [("lstm4-n9", 9000, "nan", "failed")]
    groups = [{"first": 0, "last": 0, "nll": 3.0}, {"first": 1, "last": 2, "nll": 2.0}]
    monkeypatch.setattr(comparison, "_positions", lambda run: {"test_nll": run.name, "groups": groups})
    comparison.main(written(tmp_path / "sweep", runs), tmp_path / "results")
    found = json.loads((tmp_path / "results" / "lstm_against_transformer.json").read_text())
    assert found["lstm2"]["exponent"] == pytest.approx(0.07)
    assert set(found["lstm2"]["by_position"]) == {"lstm2-n1000", "lstm2-n16000"}
    assert "exponent" not in found["lstm1"]
    assert "lstm4" not in found
    assert (tmp_path / "results" / "lstm_against_transformer.png").read_bytes().startswith(b"\x89PNG")


def test_another_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not of the plan lstm_against_transformer"):
        comparison.summarise(written(tmp_path / "sweep", [("mup-w32", 100, 2.0, "done")]))
