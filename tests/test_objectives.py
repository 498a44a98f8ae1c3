"""A loss that is a sum of several means is the same however the batch is cut up."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny
from transformer_jax.config import MeshConfig
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import Classification, MaskedLM, SpanExtraction, means
from transformer_jax.train import Trainer

B, T, M, V = 8, 13, 5, 47
BERT = BertConfig(vocab_size=V, context=16, width=20, layers=1, heads=5, feedforward=28, dropout=0.0)
GPT = GPTConfig(vocab_size=V, context=16, width=20, layers=1, heads=5, feedforward=28, task="classify", labels=3)


@pytest.fixture(scope="module")
def batch():
    """Rows with 0 to 5 gaps each, and one row of padding: halves of the batch differ in every count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, V, (B, T))
    segments = (np.arange(T) < rng.integers(6, T + 1, (B, 1))).astype(np.int32)
    segments[-1] = 0
    gaps = np.arange(M) < rng.integers(0, M + 1, (B, 1))
    gaps[-1] = False
    start = rng.integers(0, 5, B)
    return {
        "tokens": tokens.astype(np.int32),
        "types": (np.arange(T) > 4).astype(np.int32)[None].repeat(B, 0),
        "segments": segments,
        "positions_masked": rng.integers(1, 6, (B, M)).astype(np.int32),
        "targets": np.where(gaps, rng.integers(5, V, (B, M)), -1).astype(np.int32),
        "next": np.where(np.arange(B) < B - 1, rng.integers(0, 2, B), -1).astype(np.int32),
        "label": np.where(np.arange(B) < B - 1, rng.integers(0, 3, B), -1).astype(np.int32),
        "start": np.where(np.arange(B) < B - 1, start, -1).astype(np.int32),
        "end": np.where(np.arange(B) < B - 1, start + 1, -1).astype(np.int32),
    }


CASES = {
    "pretraining": (BERT, MaskedLM()),
    "classes": (replace(BERT, task="classify", labels=3), Classification()),
    "span": (replace(BERT, task="span"), SpanExtraction()),
    "auxiliary": (GPT, Classification(lm_weight=0.5)),
}


def after_one_step(model, objective, batch, accumulate):
    base = tiny()
    trainer = Trainer.of(
        replace(
            base,
            model=model,
            objective=objective,
            mesh=MeshConfig(data=1),
            train=replace(base.train, accumulate=accumulate),
            # Some biases have no gradient but rounding, which Adam would blow up to a step.
            optim=replace(base.optim, eps=1e-2),
        ),
        jax.devices()[:1],
    )
    if isinstance(model, GPTConfig):
        following = np.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        real = np.pad(batch["segments"][:, 1:], ((0, 0), (0, 1))) != 0
        batch = batch | {"targets": np.where(real, following, -1).astype(np.int32)}
    state, metrics = trainer.train_step()(trainer.init(), batch)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case, batch):
    model, objective = CASES[case]
    whole, cut = (after_one_step(model, objective, batch, n) for n in (1, 4))
    for name, value in whole[1].items():
        np.testing.assert_allclose(cut[1][name], value, rtol=3e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cut[0], whole[0])


def test_means_add_up_what_has_one_name():
    sums = {"masked": {"loss": jnp.float32(6), "mlm": jnp.float32(6)}, "pairs": {"loss": jnp.float32(1)}}
    result = means(sums, {"masked": jnp.float32(3), "pairs": jnp.float32(4), "tokens": jnp.float32(9)})
    assert float(result["loss"]) == 2.25
    assert float(result["mlm"]) == 2.0


def test_gaps_that_are_none_and_rows_of_padding_do_not_count(batch):
    model, objective = CASES["pretraining"]
    trainer = Trainer.of(replace(tiny(), model=model, objective=objective, mesh=MeshConfig(data=1)), jax.devices()[:1])
    evaluate, params = trainer.eval_step(), trainer.init().params
    sums, weights = jax.device_get(evaluate(params, batch))
    assert weights["masked"] == (batch["targets"] >= 0).sum()
    assert weights["pairs"] == B - 1
    # Other positions where there is no gap, other tokens in the row of padding: nothing changes.
    other = {name: value.copy() for name, value in batch.items()}
    other["positions_masked"][batch["targets"] < 0] = 3
    other["tokens"][-1] = 7
    again, _ = jax.device_get(evaluate(params, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, sums)
