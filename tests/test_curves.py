"""Learning curves of several seeds, and the answer whether another run reproduces them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.tiny import tiny
from transformer_jax.cli import main
from transformer_jax.curves import Against, against, band, compact_json, draw_numbered, learning_curves
from transformer_jax.errors import UserError

STEPS = list(range(10, 110, 10))


def write_run(folder, seed, shift=0.0, experiment=None, steps=STEPS):
    """A run folder whose validation loss falls as 3 / step, with noise and a shift."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    experiment = experiment or tiny()
    setup = replace(experiment, train=replace(experiment.train, seed=seed))
    (folder / "experiment.json").write_text(setup.to_json(), encoding="utf-8")
    records = []
    for step in steps:
        training = {"split": "train", "tokens": 7.0, "seconds": 1.0}
        records += [{"step": step - 5, "nll": 2.0, **training}, {"step": step, "nll": 4.0, **training}]
        nll = 30 / step + 0.1 * rng.standard_normal() + shift
        records.append({"step": step, "split": "validation", "nll": nll, "accuracy": 0.5, "tokens": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


@pytest.fixture
def reference(tmp_path):
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in range(4)]
    stored = {"curves": {"tiny": learning_curves(runs)}, "experiments": [json.loads(tiny().to_json())]}
    path = tmp_path / "trials.json"
    path.write_text(compact_json(stored), encoding="utf-8")
    return path


def test_curves_hold_every_seed_and_average_what_was_logged_between(reference):
    curves = json.loads(reference.read_text())["curves"]["tiny"]
    assert curves["steps"] == STEPS
    assert np.shape(curves["validation"]["nll"]) == (4, len(STEPS))
    assert curves["training"] == {"nll": [[3.0] * len(STEPS)] * 4}
    assert "\n    " not in reference.read_text().partition('"curves"')[2].partition("[")[2].partition("]")[0]


def test_a_run_evaluated_elsewhere_counts_only_where_all_were(tmp_path):
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, steps=STEPS[1::2])]
    assert learning_curves(runs)["steps"] == STEPS[1::2]


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0.9, 1.0), (8.0, 0.0, 0.02)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_another_seed_reproduces_and_another_model_does_not(seeds, shift, least, most):
    """In units of the deviation between seeds; neighbouring steps of a run are alike."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, seeds + 1, 20))
    runs = noise.copy()
    for i in range(1, 20):
        runs[..., i] = 0.7 * runs[..., i - 1] + np.sqrt(1 - 0.7**2) * noise[..., i]
    answers = []
    for of_trial in runs:
        low, high = band(of_trial[:-1])
        metric = Against("nll", list(range(20)), (of_trial[-1] + shift).tolist(), low.tolist(), high.tolist())
        answers.append(metric.reproduces)
    assert least <= np.mean(answers) <= (most if seeds > 3 or not shift else 0.25)


def test_the_verdict_says_where_a_run_leaves_the_band(reference, tmp_path, capsys):
    assert against(write_run(tmp_path / "like", 9), reference).reproduces
    other = replace(tiny(), optim=replace(tiny().optim, clip_norm=0.5))
    compared = against(write_run(tmp_path / "unlike", 9, shift=2.0, experiment=other), reference)
    assert not compared.reproduces
    assert "nll leaves the 98% band at step 10 (" in compared.verdict()
    assert "outside at 10 of 10 steps" in compared.verdict()
    assert compared.differences == ["optim.clip_norm: 1.0 -> 0.5"]
    for run, code in (("like", 0), ("unlike", 1)):
        with pytest.raises(SystemExit) as stop:
            main(["show", str(tmp_path / run), "--against", str(reference)])
        assert stop.value.code == code
        assert capsys.readouterr().out.startswith(f"{tmp_path / run} {'reproduces' if not code else 'does not'}")
        assert (tmp_path / run / "against.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_reference_is_refused(reference, tmp_path):
    run = write_run(tmp_path / "run", 9)
    stored = json.loads(reference.read_text())
    with pytest.raises(UserError, match=r"absent\.json: there is no such file"):
        against(run, tmp_path / "absent.json")
    for content, message in [
        ("{", "not JSON"),
        ("{}", "has no curves"),
        (json.dumps(stored | {"curves": {"tinny": stored["curves"]["tiny"], "b": {}}}), "Did you mean 'tinny'"),
        (json.dumps(stored | {"curves": {"tiny": learning_curves([run])}}), "one seed, which makes no band"),
    ]:
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            against(run, path)
    with pytest.raises(UserError, match="at none of the steps"):
        against(write_run(tmp_path / "elsewhere", 1, steps=[7, 77]), reference)


def test_what_is_scored_by_number_is_drawn_against_it(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("transformer_jax.curves.panels", lambda lines, *_, **__: drawn.update(lines))
    model = {f"error_after_{k}": {"value": 1.0 / (k + 1)} for k in (10, 9, 0)} | {"nll": {"value": 3.0}}
    path = tmp_path / "by_number.png"
    assert draw_numbered({"model": [model, model], "floor": [{"nll": {"value": 1.0}}]}, path) == [path]
    (line,) = drawn["error after k"]
    assert (line.name, line.x, line.ys) == ("model", [0, 9, 10], [[1.0, 0.1, 1 / 11]] * 2)
    assert draw_numbered({"model": [{"nll": {"value": 3.0}}]}, path) == []
