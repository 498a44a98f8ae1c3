"""Laws of the loss by position: its sums are the objective's, each token stands where its document says."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.models.test_gpt import GPT2, packed_batch
from tests.tiny import tiny
from transformer_jax import evaluate
from transformer_jax.by_position import ByPosition, by_position, next_tokens
from transformer_jax.cli import main
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.loop import run_training
from transformer_jax.models.rnn_lm import RNNLMConfig
from transformer_jax.objectives import CausalLM, cross_entropy
from transformer_jax.train import Trainer

T = 13


def experiment(chunk: int = 0) -> Experiment:
    return Experiment(
        name="tiny",
        model=GPT2,
        objective=CausalLM(chunk=chunk),
        data=PackedText("none", context=T, batch_rows=8),
        optim=OptimConfig(),
        train=TrainConfig(),
        compute=ComputeConfig(layers="unrolled"),
        mesh=MeshConfig(2, 2, 2),
    )


def test_it_is_the_loss_of_each_token_by_hand():
    """In chunks that do not divide the row, on a mesh: as NumPy has it from the logits of one device."""
    trainer = Trainer.of(experiment(chunk=5))
    params, batches = trainer.init().params, [packed_batch(8, T, seed) for seed in (0, 1)]
    found = by_position(trainer, params, batches)
    model = trainer.skeleton.bind(jax.device_put(jax.device_get(params)))
    nll_XT, tokens_XT = np.zeros((2, T)), np.zeros((2, T))
    for x, batch in enumerate(batches):
        logits = jax.jit(model)(batch["tokens"], batch["segments"], batch["positions"])
        nll_BT = np.asarray(cross_entropy(logits, np.maximum(batch["targets"], 0)))
        for row, place in np.argwhere(batch["targets"] >= 0):
            nll_XT[x, batch["positions"][row, place]] += nll_BT[row, place]
            tokens_XT[x, batch["positions"][row, place]] += 1
    np.testing.assert_array_equal(found.tokens_XT, tokens_XT)
    np.testing.assert_allclose(found.nll_XT, nll_XT, rtol=1e-5)
    # All positions together are the objective.
    sums, weights = jax.device_get(trainer.eval_step()(params, trainer.put(batches[0])))
    np.testing.assert_allclose(found.nll_XT[0].sum(), sums["tokens"]["nll"], rtol=1e-5)
    assert found.tokens_XT[0].sum() == weights["tokens"]


def test_groups_double_and_hold_every_token():
    rng = np.random.default_rng(0)
    tokens_XT = rng.integers(1, 9, (7, T)).astype(float)
    tokens_XT[:, 11] = 0
    found = ByPosition(tokens_XT * rng.uniform(1, 3, (7, T)), tokens_XT)
    groups = found.groups()
    assert [(g["first"], g["last"]) for g in groups] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 12)]
    assert sum(g["tokens"] for g in groups) == tokens_XT.sum()
    for g in groups:
        places = slice(g["first"], g["last"] + 1)
        assert g["nll"] == pytest.approx(found.nll_XT[:, places].sum() / tokens_XT[:, places].sum())
        assert g["interval"][0] < g["nll"] < g["interval"][1]
    assert found.nll[11] is None
    assert ByPosition(found.nll_XT[:1], tokens_XT[:1]).groups()[0]["interval"] is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recurrent run that has learnt to count the letters of a short word."""
    folder = tmp_path_factory.mktemp("by_position")
    text = folder / "text.txt"
    text.write_text("\n\n".join("abcdefgh" * 3 for _ in range(300)))
    setup = replace(
        experiment(),
        model=RNNLMConfig(vocab_size=20, context=16, width=12, layers=1, tied=True, dropout=0.0),
        data=PackedText(
            str(text),
            boundary="blank_line",
            tokenizer="characters",
            context=16,
            batch_rows=8,
            separate=False,
            threads=0,
        ),
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-2, warmup=3)),
        train=TrainConfig(steps=60, eval_every=60, save_every=60),
        mesh=MeshConfig(),
    )
    run_training(setup, folder / "run")
    return folder / "run"


def exit_code(*argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code


def test_a_run_is_scored_by_position(run, capsys):
    """The first letter of a row cannot be told from what stood before; the later ones can."""
    assert exit_code("evaluate", str(run), "--by-position", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    groups = report["by_position"]
    assert groups[0]["nll"] > 2 * groups[-1]["nll"]
    stored = json.loads((run / "by_position.json").read_text())
    assert stored["groups"] == groups
    mean = np.dot(stored["nll"], stored["tokens"]) / np.sum(stored["tokens"])
    assert mean == pytest.approx(report["scores"]["nll"]["value"], rel=1e-5)
    assert (run / "by_position.png").read_bytes().startswith(b"\x89PNG")
    assert exit_code("evaluate", str(run), "--by-position") == 0
    printed = capsys.readouterr().out
    assert "tokens before" in printed
    assert "8 to 15" in printed


def test_a_recurrent_run_completes_text(run, capsys):
    assert exit_code("generate", str(run), "abcdefgh", "--temperature", "0", "--max-tokens", "4", "--json") == 0
    assert "abcd" in capsys.readouterr().out


def test_verbs_for_other_models_say_what_it_is(run, capsys):
    for verb, message in (("attention", "is trained on PackedText, it does not translate"), ("fill", "use `tjax")):
        assert exit_code(verb, str(run), "abc") == 2
        assert message in capsys.readouterr().err


def test_only_next_tokens_have_a_position():
    with pytest.raises(UserError, match=r"--by-position scores next tokens, but 'tiny' is trained by Seq2Seq"):
        next_tokens(tiny())


def test_evaluate_says_so_before_it_opens_data(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_jax.verbs.load_meta", lambda _: (tiny(), ""))
    with pytest.raises(UserError, match="--by-position scores next tokens"):
        evaluate(tmp_path, by_position=True)
