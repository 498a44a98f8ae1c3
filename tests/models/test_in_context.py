"""Laws of the decoder that reads vectors, and that it learns from its context by the same verbs as everything else."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.in_context import garg_linear_20d, in_context_linear_5d
from transformer_jax import verbs
from transformer_jax.cli import main
from transformer_jax.completion import Completer
from transformer_jax.config import ComputeConfig, MeshConfig, TrainConfig
from transformer_jax.data.linear_functions import LinearFunctions
from transformer_jax.errors import UserError
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.in_context import InContextGPTConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.objectives import InContextRegression, means
from transformer_jax.train import Trainer

B, P, Z = 8, 6, 3
CONFIG = InContextGPTConfig(context=2 * P - 1, width=24, layers=2, heads=4, feedforward=40, inputs=Z, init_std=0.3)
DATA = LinearFunctions(dimension=Z, points=P, batch_rows=B, held_out_rows=16, threads=0)
EXPERIMENT = replace(
    in_context_linear_5d(),
    name="tiny_in_context",
    model=CONFIG,
    data=DATA,
    train=TrainConfig(steps=4, log_every=2, eval_every=2, save_every=4),
)


def model_of(config=CONFIG):
    skeleton = Skeleton.of(config, ComputeConfig(layers="unrolled"))
    return skeleton.bind(jax.jit(skeleton.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def batch():
    return {k: v for k, v in next(DATA.open(0).train_iterator(0)).items() if k != "example"}


def test_a_prediction_sees_its_input_and_what_came_before(batch):
    model = model_of()

    def predicted(inputs_BPZ, values_BP):
        return model.predict(inputs_BPZ, values_BP, batch["segments"]).sum(0)

    by_input, by_value = jax.jit(jax.jacobian(predicted, argnums=(0, 1)))(batch["inputs"], batch["values"])
    distance_PP = np.subtract.outer(np.arange(P), np.arange(P))
    np.testing.assert_array_equal((np.asarray(by_input) != 0).any((1, 3)), distance_PP >= 0)
    np.testing.assert_array_equal((np.asarray(by_value) != 0).any(1), distance_PP > 0)


def test_fewer_examples_are_a_prefix(batch):
    """Padding, as the curriculum makes it, changes nothing; neither does its absence."""
    predict = jax.jit(model_of().predict)
    whole = predict(batch["inputs"], batch["values"], batch["segments"])
    short = predict(*(batch[name][:, :4] for name in ("inputs", "values", "segments")))
    padded = predict(batch["inputs"], batch["values"], (np.arange(P) < 4) * batch["segments"])
    np.testing.assert_allclose(short, whole[:, :4], atol=1e-5)
    np.testing.assert_allclose(padded[:, :4], whole[:, :4], atol=1e-5)


def test_a_decoder_of_tokens_reads_embedded_ones_too():
    """What a decoder of tokens and pictures needs: vectors in the place of tokens, by the same blocks."""
    skeleton = Skeleton.of(GPTConfig(vocab_size=37, context=12, width=24, layers=2, heads=4), ComputeConfig())
    gpt = skeleton.bind(jax.jit(skeleton.init)(jax.random.key(1)))
    tokens_BT = np.random.default_rng(0).integers(0, 37, (5, 11))
    x_BTD = gpt.embedding(tokens_BT, jnp.float32)
    of_vectors = jax.jit(lambda x_BTD: gpt.logits(gpt.decode(x_BTD)[0]))(x_BTD)
    np.testing.assert_allclose(of_vectors, jax.jit(gpt)(tokens_BT), atol=1e-6)


def test_the_objective_is_the_squared_error_by_number_of_examples(batch):
    class Zero:
        def predict(self, inputs_BPZ, values_BP, segments_BP, *, key):
            return jnp.zeros_like(values_BP)

    objective = InContextRegression()
    values = means(objective(Zero(), batch, None), objective.weights(batch))
    assert values["nll"] == pytest.approx(np.square(batch["values"]).mean(), rel=1e-5)
    assert all(values[f"error_after_{k}"] == pytest.approx(1.0, rel=1e-5) for k in range(P))
    assert objective.weights(batch)["tokens"] == 2 * B * P


def test_sharded_equals_single_device_and_scanned_equals_unrolled(batch):
    losses = []
    for layers, mesh, devices in (
        ("unrolled", MeshConfig(), 1),
        ("scan", MeshConfig(data=2, fsdp=2, tensor=2), 8),
    ):
        compute = ComputeConfig(layers=layers)
        trainer = Trainer.of(replace(EXPERIMENT, mesh=mesh, compute=compute), jax.devices()[:devices])
        params = trainer.init().params
        sums, weights = trainer.eval_step()(params, trainer.put(batch))
        losses.append({name: float(value) for name, value in means(sums, weights).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_published_count_holds_a_table_that_nothing_reads():
    shown = verbs.show(garg_linear_20d())
    assert shown["parameters"].keys() >= {"read_in", "read_out", "positions", "norm"}
    assert shown["parameters"]["total"] + 50_257 * 256 == pytest.approx(22.4e6, rel=2e-3)


def test_it_runs_by_the_same_verbs(tmp_path, capsys):
    run = tmp_path / "run"
    verbs.train(EXPERIMENT, run)
    assert not (run / "tokenizer.json").exists()
    report = verbs.evaluate(run)
    assert {path.name for path in report.files} == {"evaluation.json", "evaluation.png"}
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["scores"].keys() >= {"nll", *(f"error_after_{k}" for k in range(P))}
    assert scores["floors"]["least squares"][f"error_after_{Z}"]["value"] < 1e-6
    noisy = verbs.evaluate(run, "noisy")
    assert noisy.report["floors"]["least squares"][f"error_after_{Z + 1}"]["value"] > 0.01
    assert (run / "evaluation-noisy.png").exists()
    with pytest.raises(SystemExit):
        main(["train", str(run)])
    assert "nothing to train" in capsys.readouterr().err
    with pytest.raises(UserError, match="no decoder-only model"):
        Completer.open(run)
    with pytest.raises(UserError, match="there are no functions 'nosy'"):
        verbs.evaluate(run, "nosy")


def test_bad_settings_are_one_clear_line(batch):
    with pytest.raises(UserError, match=r"6 examples take 11 positions, but model\.context=9"):
        model_of(replace(CONFIG, context=9)).predict(batch["inputs"], batch["values"], batch["segments"])
    with pytest.raises(UserError, match=r"inputs of 3 numbers, but model\.inputs=4"):
        model_of(replace(CONFIG, inputs=4)).predict(batch["inputs"], batch["values"], batch["segments"])
    with pytest.raises(UserError, match=r"model\.vocab_size must be 0"):
        replace(CONFIG, vocab_size=5).check()
    with pytest.raises(UserError, match=r"model\.vocab_size must be at least 1"):
        GPTConfig(vocab_size=0).check()
