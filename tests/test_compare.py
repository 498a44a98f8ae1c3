"""The comparison: families through the same loop, one report that holds what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.tiny import small, tiny, write_pairs
from transformer_jax import loop, verbs
from transformer_jax.bench.batches import context_of
from transformer_jax.compare import _by_length, compare
from transformer_jax.config import with_changes
from transformer_jax.errors import Interrupted, UserError
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig

RNN = RNNSeq2SeqConfig(vocab_size=306, width=20, embedding=20, encoder_layers=1, decoder_layers=1)


def contestants(pairs):
    base = small(pairs, steps=4, eval_every=2, save_every=4)
    plain = replace(base, name="lstm", model=replace(RNN, reverse_source=True))
    return [plain, base]


@pytest.mark.slow
def test_report_resumes_and_holds_its_parts(tmp_path, capsys):
    experiments = contestants(write_pairs(tmp_path / "pairs.tsv"))
    out = tmp_path / "out"
    markdown, page, figures = compare(experiments, 2, out, lengths=(8, 16), tokens=128)
    result = json.loads(figures.read_text())
    names = [experiment.name for experiment in experiments]
    assert result["scores"].keys() == {*names, "copy the source", "nearest neighbour"}
    for name in names:
        assert len(result["scores"][name]) == 2
        assert len(result["bleu_by_source_words"]["bleu"][name]) == 2
        assert result["tokens_per_second_by_length"][name].keys() == {"8", "16"}
        assert name in markdown.read_text()
    assert sum(result["bleu_by_source_words"]["sentences"]) == result["data"]["pairs"]["test"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert 'src="http' not in text
    assert "<script" not in text
    # Again: nothing is trained, everything is scored the same.
    capsys.readouterr()
    again = json.loads(compare(experiments, 2, out, lengths=(8,), tokens=128)[2].read_text())
    assert capsys.readouterr().err.count("restored step 4 of 4") == 4
    for name in names:
        assert [s["bleu"] for s in again["scores"][name]] == [s["bleu"] for s in result["scores"][name]]
    # A model without attention evaluates without a picture, and says so when asked for one.
    run = out / "runs" / "lstm-seed0"
    assert not (run / "attention.png").exists()
    verbs.evaluate(run)
    translator = verbs.Translator.open(run)
    with pytest.raises(UserError, match="'lstm' has no attention"):
        verbs.draw_attention(translator, "one", "eins", tmp_path / "a.png")


def test_speed_is_measured_within_a_models_context():
    learned = replace(tiny(), model=BertSeq2SeqConfig(context=16))
    assert (context_of(learned), context_of(tiny())) == (16, float("inf"))


def test_different_data_is_no_comparison(tmp_path):
    one = tiny(tmp_path / "a.tsv")
    other = replace(tiny(tmp_path / "b.tsv"), name="other")
    with pytest.raises(UserError, match="'other' and 'tiny' are trained on different data"):
        compare([one, other], 1, tmp_path, lengths=(8,))


def test_a_signal_ends_the_comparison(tmp_path, monkeypatch):
    begun = []

    def stopped(experiment, run):
        begun.append(experiment.name)
        return loop.Outcome(run, 0, 1, "SIGTERM", None, 0.0), None

    monkeypatch.setattr(loop, "run_training", stopped)
    with pytest.raises(Interrupted, match="SIGTERM"):
        compare(contestants(write_pairs(tmp_path / "pairs.tsv")), 2, tmp_path / "out", lengths=(8,))
    assert begun == ["lstm"]


def test_settings_reach_every_experiment_and_its_schedule():
    one = tiny()
    one = replace(one, optim=replace(one.optim, schedule=replace(one.optim.schedule, steps=one.train.steps)))
    data, train = replace(one.data, max_words=3), replace(one.train, steps=5)
    (changed,) = with_changes([one], {"data": data, "train": train})
    assert (changed.data, changed.train) == (data, train)
    assert changed.optim.schedule.steps == 5
    fixed = replace(one, optim=replace(one.optim, schedule=replace(one.optim.schedule, steps=99)))
    (changed,) = with_changes([fixed], {"train": train})
    assert changed.optim.schedule.steps == 99


def test_classes_of_length_hold_every_sentence_once():
    test = [(" ".join(["w"] * n), "r") for n in (1, 1, 2, 3, 5, 8, 13, 13, 21)]
    classes = _by_length([], test, "de")
    assert sum(classes["sentences"]) == len(test)
    assert classes["words"] == sorted(classes["words"])
