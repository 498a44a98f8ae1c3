"""Laws of bad steps: they leave the state alone, are kept, and are answered alike whenever the run is resumed."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_loop import losses, params_of
from tests.tiny import deterministic, small, write_pairs
from transformer_jax import verbs
from transformer_jax.anomalies import SpikeBound, read_anomalies, read_batch
from transformer_jax.checkpoint import steps_of
from transformer_jax.cli import main
from transformer_jax.config import ComputeConfig, TrainConfig
from transformer_jax.diagnosis import diagnose, first_nan
from transformer_jax.errors import UserError
from transformer_jax.logs import read_metrics
from transformer_jax.objectives import Seq2Seq
from transformer_jax.replay import replay
from transformer_jax.sharding import make_mesh
from transformer_jax.train import Guard, Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv", rows=640)  # no text comes twice in a test


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compile for one device, which is faster; several processes have their own test."""
    module = sys.modules["transformer_jax.train"]  # the attribute of that name is the verb
    monkeypatch.setattr(module, "make_mesh", lambda config, devices: make_mesh(config, devices or jax.devices()[:1]))


@dataclass(frozen=True)
class Poisoned(Seq2Seq):
    """Multiplies the loss of every batch that holds one source text; 0 stands for the logarithm of -1."""

    source: tuple[int, ...] = ()
    factor: float = 1.0

    def __call__(self, model, batch, key):
        sums = super().__call__(model, batch, key)
        hit = (batch["source"][:, : len(self.source)] == jnp.array(self.source)).all(1).any()
        factor = jnp.where(hit, self.factor, 1.0) if self.factor else jnp.log(jnp.where(hit, -1.0, jnp.e))
        return {"tokens": sums["tokens"] | {"loss": factor * sums["tokens"]["loss"]}}


def poisoned(pairs, step, factor=0.0, **settings):
    """The tiny experiment with an objective that fails at that step."""
    experiment = small(pairs, **settings)
    iterator = experiment.data.open(306).train_iterator(0)
    batches = [next(iterator) for _ in range(experiment.train.steps)]
    source = batches[step - 1]["source"][0][:12].tolist()
    objective = Poisoned(smoothing=0.1, source=tuple(source), factor=factor)
    assert [n for n, b in enumerate(batches, 1) if (b["source"][:, : len(source)] == source).all(1).any()] == [step]
    return replace(experiment, objective=objective)


def test_a_bad_step_changes_nothing_but_the_count(pairs):
    trainer = Trainer.of(deterministic(small(pairs)))
    step = trainer.train_step()
    batch = trainer.put(next(trainer.experiment.data.open(306).train_iterator(0)))
    state, metrics = step(trainer.init(), batch)
    assert metrics["applied"]
    before = jax.device_get(state)
    for guard in (Guard(np.float32(1e-3)), Guard(np.float32(np.inf), np.bool_(False))):
        state, metrics = step(state, batch, guard)
        assert not metrics["applied"]
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get((state.params, state.opt_state)),
            (before.params, before.opt_state),
        )
    assert state.step == 3
    assert metrics["learning_rate"] == pytest.approx(3e-3 * 2 / 4)  # of the second update, not of the fourth step


@pytest.mark.slow
def test_stopped_at_nan_and_told_to_skip_equals_skipping_at_once(pairs, tmp_path):
    experiment, bad = poisoned(pairs, 6), 6
    run, other = tmp_path / "run", tmp_path / "other"
    skipping = replace(experiment, train=replace(experiment.train, on_nan="skip"))
    with pytest.raises(UserError, match=rf"loss is nan .*at step {bad}, on \d+ examples \(\d.*checkpoints/{bad - 1}"):
        verbs.train(experiment, run)
    (stopped,) = read_anomalies(run)
    assert (stopped.step, stopped.kind, stopped.policy) == (bad, "nan", "stop")
    assert steps_of(run)[-1] == bad - 1
    assert sorted(stopped.examples) == sorted(i for i in read_batch(run, bad)["example"].tolist() if i >= 0)
    norms = json.loads((run / "anomalies" / str(bad) / "norms.json").read_text())["parameters"]
    assert {"encoder.layers.0.attention.q.weight", "decoder.layers.1.attention.q.weight"} <= norms.keys()
    assert all(one["bad_gradients"] and not one["bad_parameters"] for one in norms.values())

    assert verbs.train(skipping, run).started_at == bad - 1
    verbs.train(skipping, other)
    assert [a.step for a in read_anomalies(other)] == [a.step for a in read_anomalies(run)[1:]]
    trained = [[line for line in losses(folder) if '"train"' in line] for folder in (run, other)]
    assert trained[0] == trained[1]
    jax.tree.map(np.testing.assert_array_equal, params_of(run), params_of(other))


@pytest.mark.slow
def test_rolled_back_and_killed_equals_rolled_back(pairs, tmp_path, monkeypatch):
    experiment = poisoned(pairs, 6, on_nan="rollback")
    run, other = tmp_path / "run", tmp_path / "other"
    assert verbs.train(experiment, run).step == 12
    anomalies = read_anomalies(run)
    assert [(a.step, a.policy, a.base) for a in anomalies] == [(6, "rollback", 4)]
    assert [record["step"] for record in read_metrics(run) if record["split"] == "train"] == list(range(1, 13))

    put = Trainer.put

    def killing(self, batch):
        if read_anomalies(other):
            raise MemoryError("killed at the first batch behind the rollback")
        return put(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "put", killing)
        with pytest.raises(MemoryError):
            verbs.train(experiment, other)
    verbs.train(experiment, other)
    assert (other / "anomalies.jsonl").read_text() == (run / "anomalies.jsonl").read_text()
    assert losses(other) == losses(run)
    jax.tree.map(np.testing.assert_array_equal, params_of(other), params_of(run))


@pytest.mark.slow
def test_rollbacks_come_to_an_end(pairs, tmp_path):
    experiment = small(pairs, on_nan="rollback", max_rollbacks=2)
    hot = replace(experiment.optim, schedule=replace(experiment.optim.schedule, peak=1e30, warmup=1), clip_norm=0.0)
    with pytest.raises(UserError, match=r"at step 2, .* after 2 rollback\(s\)"):
        verbs.train(replace(experiment, optim=hot), tmp_path / "run")
    anomalies = read_anomalies(tmp_path / "run")
    assert [a.policy for a in anomalies] == ["rollback", "rollback", "stop"]
    assert len({tuple(a.examples) for a in anomalies}) == 3  # other data each time


@pytest.mark.slow
def test_spike_is_skipped_and_replayed(pairs, tmp_path, capsys):
    experiment = poisoned(pairs, 9, factor=40.0, on_spike="skip", spike_window=8, eval_every=12)
    run = tmp_path / "run"
    verbs.train(experiment, run)
    before = sorted(path for path in run.rglob("*") if path.is_file())
    (spike,) = read_anomalies(run)
    assert (spike.step, spike.kind, spike.policy) == (9, "spike", "skip")
    assert spike.loss > 3 * spike.limit
    with pytest.raises(SystemExit, match="0"):
        main(["replay", str(run), "9", "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["checkpoint"] == 8
    assert again["loss"] == pytest.approx(spike.loss, rel=1e-5)
    assert again["grad_norm"] == pytest.approx(spike.grad_norm, rel=1e-4)
    assert again["first_nan"] is None
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


@pytest.mark.slow
def test_replay_finds_the_operation_behind_steps_trained_again(pairs, tmp_path):
    experiment = poisoned(pairs, 7, on_nan="skip")
    run = tmp_path / "run"
    verbs.train(experiment, run)
    found = replay(run, 7)
    assert found.checkpoint == 4
    assert np.isnan(found.diagnosis.loss)
    assert "nan generated by primitive: log" in found.first_nan
    assert re.search(r"log at \S*test_resilience.py:.*\n  called at ", found.first_nan)
    with pytest.raises(UserError, match=r"keeps no batch of step 99; it has those of 7"):
        replay(run, 99)
    with pytest.raises(UserError, match="has met no NaN and no spike"):
        replay(tmp_path)


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_norms_by_layer_add_up(pairs, layers):
    experiment = deterministic(small(pairs))
    trainer = Trainer.of(replace(experiment, compute=ComputeConfig(layers=layers)))
    batch = next(experiment.data.open(306).train_iterator(0))
    state = trainer.init()
    found = diagnose(trainer, state, batch)
    layers = found.layers()
    assert {"encoder.layers.0", "decoder.layers.1", "embedding"} <= layers.keys()
    assert np.linalg.norm([one.gradient for one in layers.values()]) == pytest.approx(found.grad_norm, rel=1e-5)
    whole = float(optax.tree.norm(state.params))
    assert np.linalg.norm([one.parameter for one in found.parameters.values()]) == pytest.approx(whole, rel=1e-5)
    assert first_nan(trainer, state, batch) == ""


def test_spike_bound_knows_losses_up_to_two_steps_before():
    settings = TrainConfig(on_spike="skip", spike_window=8, spike_deviations=3.0)
    usual = [2.0, 2.1, 1.9, 2.2, 1.8, 2.05, 1.95, 2.15, 2.0]
    bound = SpikeBound(settings)
    bounds = []
    for step, loss in enumerate(usual, 1):
        bounds.append(bound.at(step))
        bound.add(step, loss)
    assert bounds[:5] == [np.inf] * 5  # step 6 is the first with half a window known
    assert 2.2 < bounds[-1] < 3.0
    again = SpikeBound(settings, json.loads(json.dumps(bound.losses)))
    assert again.at(10) == bound.at(10)
    bound.add(10, 100.0)
    assert again.at(11) == bound.at(11)  # not known yet when step 11 is launched
    bound.add(11, float("nan"))
    assert bound.at(12) < 4.0  # one spike does not raise it
    assert SpikeBound(replace(settings, on_spike="ignore"), bound.losses).at(12) == np.inf


@pytest.mark.parametrize("values", [{"spike_window": 4}, {"spike_deviations": 0.0}, {"steps": 0}])
def test_settings_that_cannot_be(values):
    with pytest.raises(UserError, match=f"train.{next(iter(values))} must be"):
        TrainConfig(**values).check()
