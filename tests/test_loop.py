"""Laws of a run: it resumes where it stood, keeps what it has, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.tiny import tiny, write_pairs
from transformer_jax import session, verbs
from transformer_jax.checkpoint import load_params, steps_of
from transformer_jax.config import ComputeConfig, MeshConfig, read_experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import read_metrics
from transformer_jax.nn.module import Skeleton
from transformer_jax.nn.stack import stack_layers
from transformer_jax.sharding import make_mesh
from transformer_jax.train import Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv")


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    verbs.train(tiny(pairs), run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def params_of(run, **compute):
    experiment = read_experiment(run / "experiment.json")
    skeleton = Skeleton.of(experiment.model, replace(experiment.compute, **compute))
    return jax.device_get(stack_layers(load_params(run, skeleton, make_mesh(MeshConfig()))[0]))


def losses(run):
    timing = {"tokens_per_second", "seconds"}
    timeless = [{k: v for k, v in record.items() if k not in timing} for record in read_metrics(run)]
    return [json.dumps(record, sort_keys=True) for record in timeless]


def assert_equal_runs(run, other):
    assert losses(run) == losses(other)
    jax.tree.map(np.testing.assert_array_equal, params_of(run), params_of(other))


def test_run_folder_holds_everything(finished):
    for name in ("checkpoints", "tensorboard", "metrics.jsonl", "experiment.json", "tokenizer.json", "loss.png"):
        assert (finished / name).exists(), name
    (provenance,) = json.loads((finished / "provenance.json").read_text())["sessions"]
    assert {"command", "commit", "versions", "device", "data"} <= provenance.keys()
    assert [r["step"] for r in read_metrics(finished) if r["split"] == "train"] == list(range(1, 13))
    assert list((finished / "tensorboard").glob("events.*"))


def test_stopped_and_resumed_equals_uninterrupted(pairs, finished, tmp_path):
    run = tmp_path / "run"
    for steps in (3, 4, 9, 12):
        outcome = verbs.train(tiny(pairs, steps=steps), run)
        assert outcome.step == steps
    # Saves at other steps evaluate at other steps; compare what both have.
    assert [line for line in losses(run) if '"train"' in line] == [
        line for line in losses(finished) if '"train"' in line
    ]
    jax.tree.map(np.testing.assert_array_equal, params_of(run), params_of(finished))


def test_trained_run_is_restored_and_left_alone(run, pairs):
    before = losses(run)
    outcome = verbs.train(tiny(pairs), run)
    assert (outcome.started_at, outcome.step) == (12, 12)
    assert losses(run) == before


def test_resumes_on_another_mesh_and_in_the_other_layout(pairs, finished, tmp_path):
    run = tmp_path / "run"
    verbs.train(replace(tiny(pairs, steps=8), mesh=MeshConfig(data=8)), run)
    other = replace(tiny(pairs), mesh=MeshConfig(data=2, fsdp=2, tensor=2), compute=ComputeConfig(layers="scan"))
    verbs.train(other, run)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params_of(run), params_of(finished))


def test_one_checkpoint_opens_in_both_layouts_on_one_device(finished):
    experiment = read_experiment(finished / "experiment.json")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trees = []
    for layers in ("scan", "unrolled"):
        skeleton = Skeleton.of(experiment.model, ComputeConfig(layers=layers))
        trees.append(jax.device_get(stack_layers(load_params(finished, skeleton, mesh)[0])))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_average_of_checkpoints(finished, tmp_path):
    experiment = read_experiment(finished / "experiment.json")
    skeleton, mesh = Skeleton.of(experiment.model, experiment.compute), make_mesh(MeshConfig())
    averaged, steps = load_params(finished, skeleton, mesh, average=3)
    assert steps == [12, 8, 4]
    singles = []
    for step in steps:
        alone = tmp_path / str(step) / "checkpoints"
        shutil.copytree(finished / "checkpoints" / str(step), alone / str(step))
        singles.append(load_params(alone.parent, skeleton, mesh)[0])
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *jax.device_get(singles))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(averaged), mean)
    with pytest.raises(UserError, match=r"3 readable checkpoint\(s\), decode\.average=4 wants 4"):
        load_params(finished, skeleton, mesh, average=4)


def test_changed_architecture_is_refused_with_the_differences(run, pairs):
    other = tiny(pairs)
    other = replace(other, model=replace(other.model, feedforward=48, heads=3))
    before = losses(run)
    with pytest.raises(UserError, match=r"model\.feedforward: 40 -> 48; model\.heads: 6 -> 3"):
        verbs.train(other, run)
    assert losses(run) == before


def test_folder_of_another_experiment_is_refused(run, pairs):
    with pytest.raises(UserError, match="holds the experiment 'tiny', not 'other'"):
        verbs.train(replace(tiny(pairs), name="other"), run)


@pytest.mark.parametrize("spoil", ["truncate", "remove", "garble"])
def test_corrupt_checkpoint_falls_back_to_the_one_before(run, pairs, finished, spoil, capsys):
    for path in (run / "checkpoints" / "12" / "params").rglob("*"):
        if path.is_file():
            {
                "truncate": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
                "remove": lambda p: p.unlink(),
                "garble": lambda p: p.write_bytes(b"\x00" * p.stat().st_size),
            }[spoil](path)
    outcome = verbs.train(tiny(pairs), run)
    assert (outcome.started_at, outcome.step) == (8, 12)
    assert "checkpoint 12 cannot be read" in capsys.readouterr().err
    assert (run / "broken" / "12").is_dir()
    assert_equal_runs(run, finished)


def test_no_readable_checkpoint_does_not_start_over(run, pairs):
    for step in steps_of(run):
        shutil.rmtree(run / "checkpoints" / str(step) / "optimizer")
    with pytest.raises(UserError, match=r"none of the checkpoints \[12, 8, 4\] .* can be read; nothing was changed"):
        verbs.train(tiny(pairs), run)
    assert steps_of(run) == [4, 8, 12]


def test_partial_checkpoint_is_ignored(run, pairs, finished):
    checkpoints = run / "checkpoints"
    (checkpoints / "12").rename(checkpoints / "12.orbax-checkpoint-tmp")
    assert verbs.train(tiny(pairs), run).started_at == 8
    assert_equal_runs(run, finished)


def test_full_disk_is_said_before_the_save(pairs, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"has 0\.0 MiB free, a checkpoint needs .* there is no checkpoint yet"):
        verbs.train(tiny(pairs), tmp_path / "run")


def test_nan_stops_with_step_examples_and_last_checkpoint(pairs, tmp_path):
    experiment = tiny(pairs)
    hot = replace(experiment.optim, schedule=replace(experiment.optim.schedule, peak=1e30, warmup=1), clip_norm=0.0)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"loss is nan .*at step 2, on \d+ examples \(\d.*checkpoint is .*checkpoints/1"
    ):
        verbs.train(replace(experiment, optim=hot), run)
    assert steps_of(run) == [1]


def test_best_checkpoint_outlives_the_latest(pairs, tmp_path, monkeypatch):
    scores = iter([5.0, 3.0, 4.0, 4.5, 6.0])
    monkeypatch.setattr(session, "evaluate_loss", lambda *_: {"nll": next(scores)})
    verbs.train(tiny(pairs, keep=1, eval_every=2, save_every=2, steps=10), tmp_path / "run")
    assert steps_of(tmp_path / "run") == [4, 10]


def test_signal_saves_and_says_so(pairs, tmp_path, monkeypatch, finished):
    import os
    import signal

    run = tmp_path / "run"
    taken = []
    put = Trainer.put

    def interrupting(self, batch):
        taken.append(1)
        if len(taken) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, batch)

    monkeypatch.setattr(Trainer, "put", interrupting)
    outcome = verbs.train(tiny(pairs), run)
    assert outcome.stopped_by == "SIGTERM"
    assert steps_of(run)[-1] == outcome.step < 12
    assert verbs.train(tiny(pairs), run).started_at == outcome.step
    assert [line for line in losses(run) if '"train"' in line] == [
        line for line in losses(finished) if '"train"' in line
    ]
    jax.tree.map(np.testing.assert_array_equal, params_of(run), params_of(finished))
