"""Encoders from raw text to answers: pre-train, start from that, label, tag, find, embed, write."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from transformer_jax import verbs
from transformer_jax.checkpoint import load_params, warm_start
from transformer_jax.cli import main
from transformer_jax.config import (
    ComputeConfig,
    DecodeConfig,
    Experiment,
    InitConfig,
    MeshConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.span import SpanQA
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.bert_seq2seq import RENAME, BertSeq2SeqConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.objectives import Classification, MaskedLM, Seq2Seq, SpanExtraction
from transformer_jax.reading import Reader
from transformer_jax.sharding import make_mesh
from transformer_jax.train import Trainer

SIZES = {"vocab_size": 320, "context": 64, "width": 24, "layers": 2, "heads": 6, "dropout": 0.0}
ANIMALS = ("cat", "dog", "owl", "hen", "fox", "bee")


def experiment(name, data, objective, task="pretrain", *, labels=0, run="", steps=6):
    return Experiment(
        name=name,
        model=BertConfig(**SIZES, task=task, labels=labels),
        objective=objective,
        data=data,
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-3, warmup=2), clip_norm=1.0),
        train=TrainConfig(steps=steps, log_every=1, eval_every=steps, save_every=steps),
        init=InitConfig(run=str(run)) if run else InitConfig(),
        compute=ComputeConfig(layers="unrolled"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reading")


@pytest.fixture(scope="module")
def pretrained(folder):
    """A BERT of a few steps on documents about animals."""
    documents = []
    for i in range(60):
        animal = ANIMALS[i % len(ANIMALS)]
        documents.append(f"The {animal} sleeps by day {i}.\nAt night the {animal} looks for food.\nIt eats {i} times.")
    path = folder / "animals.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    data = MaskedText(dataset=str(path), length=32, batch_rows=8)
    run = folder / "pretrained"
    verbs.train(experiment("pretrained", data, MaskedLM()), run)
    return run


@pytest.fixture(scope="module")
def kinds(folder):
    """Which animals are birds."""
    lines = [f"{i} {ANIMALS[i % 6]} sleeps\t{'bird' if i % 6 in (2, 3) else 'other'}" for i in range(200)]
    path = folder / "kinds.tsv"
    path.write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return LabelledText(dataset=str(path), max_length=16, batch_rows=16)


@pytest.fixture(scope="module")
def classifier(folder, pretrained, kinds):
    run = folder / "classifier"
    made = experiment("classifier", kinds, Classification(), "classify", labels=2, run=pretrained, steps=120)
    verbs.train(made, run)
    return run


def params_of(run):
    skeleton = Skeleton.of(Reader.open(run).experiment.model, ComputeConfig(layers="unrolled"))
    return jax.device_get(load_params(run, skeleton, make_mesh(MeshConfig()))[0])


def test_gaps_are_filled_with_probabilities(pretrained):
    reader = Reader.open(pretrained)
    (first, second), (third,) = reader.fill(["The [MASK] sleeps by [MASK].", "At night [MASK]."], best=4)
    for gap in (first, second, third):
        assert len(gap.tokens) == 4
        assert gap.probabilities == sorted(gap.probabilities, reverse=True)
        assert 0 < sum(gap.probabilities) <= 1
    alone = reader.fill(["At night [MASK]."], best=4)[0][0]
    np.testing.assert_allclose(alone.probabilities, third.probabilities, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("no gap here", r"there is no \[MASK\] in"), ("[MASK] " + "owl " * 80, "the model reads 62 at once")],
)
def test_texts_without_a_gap_or_too_long(pretrained, text, message):
    with pytest.raises(UserError, match=message):
        Reader.open(pretrained).fill([text])


def test_vectors_have_length_one_and_know_no_padding(pretrained):
    reader = Reader.open(pretrained)
    texts = ["The cat sleeps.", "At night the owl looks for food, and the fox looks too.", "bee"]
    vectors = reader.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(reader.embed(texts[:1])[0], vectors[0], atol=1e-5)
    assert not np.allclose(reader.embed(texts, pooling="cls"), vectors, atol=1e-3)


def test_a_warm_start_takes_what_is_there_and_draws_the_head(pretrained, kinds):
    start = experiment("start", kinds, Classification(), "classify", labels=2, run=pretrained)
    trainer, said = Trainer.of(start), []
    fresh = jax.device_get(trainer.init())
    state = warm_start(trainer, trainer.init(), said.append)
    source = params_of(pretrained)
    for part in ("embeddings", "encoder", "pooler"):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params[part]), source[part])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params["head"]), fresh.params["head"])
    assert said == [line for line in said if "drawn anew: head" in line]
    assert len(said) == 1


def test_another_vocabulary_or_size_is_one_line(folder, pretrained, kinds):
    start = experiment("start", kinds, Classification(), "classify", labels=2, run=pretrained)
    with pytest.raises(UserError, match=r"embeddings.tokens.table has the shape \(320, 24\) there and \(400, 24\)"):
        verbs.train(replace(start, model=replace(start.model, vocab_size=400)), folder / "never")
    with pytest.raises(UserError, match=r"the data has 2 labels .* set model\.labels=2"):
        verbs.train(replace(start, model=replace(start.model, labels=3)), folder / "never")
    with pytest.raises(UserError, match="holds no checkpoint"):
        verbs.train(replace(start, init=InitConfig(run=str(folder / "nowhere"))), folder / "never")


@pytest.mark.slow
def test_classes_are_learnt_scored_and_named(classifier, capsys):
    outputs = list(Reader.open(classifier).classify(["7 owl sleeps", "8 dog sleeps", "9 hen sleeps"]))
    assert [output.label for output in outputs] == ["bird", "other", "bird"]
    for output in outputs:
        assert sum(output.probabilities.values()) == pytest.approx(1.0)
    report = verbs.evaluate(classifier).report
    assert report["scores"]["accuracy"]["value"] == 1.0
    assert report["floors"]["most frequent class"]["accuracy"]["value"] < 0.9
    with pytest.raises(SystemExit) as stop:
        main(["classify", str(classifier), "7 owl sleeps", "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["label"] == "bird"


@pytest.mark.slow
def test_answers_are_cut_out_of_the_text(folder, pretrained, capsys):
    rows = []
    for i in range(120):
        context = f"At {i} the {ANIMALS[i % 6]} 🦉 먹는다 food."
        answer = ANIMALS[i % 6]
        rows.append(
            {
                "id": str(i),
                "context": context,
                "question": "Who eats?",
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            }
        )
    path = folder / "who.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    data = SpanQA(dataset=str(path), max_length=48, max_query_length=8, doc_stride=8, batch_rows=16)
    run = folder / "answers"
    verbs.train(experiment("answers", data, SpanExtraction(), "span", run=pretrained, steps=100), run)
    context = folder / "context.txt"
    context.write_text("At 500 the fox 🦉 먹는다 food.", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["answer", str(run), "--context", str(context), "--question", "Who eats?", "--json"])
    assert stop.value.code == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert answer["answer"] in context.read_text(encoding="utf-8")
    assert verbs.evaluate(run).report["scores"]["f1"]["value"] > 50


def test_an_encoder_decoder_starts_from_bert_and_translates(folder, pretrained):
    lines = [f"the {ANIMALS[i % 6]} sleeps by day {i}\t{ANIMALS[i % 6]} {i}" for i in range(120)]
    path = folder / "titles.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = ParallelText(
        dataset=str(path), source="text", target="title", max_length=32, batch_tokens=512, bucket_lengths=(32,)
    )
    made = Experiment(
        name="titles",
        model=BertSeq2SeqConfig(**SIZES),
        objective=Seq2Seq(),
        data=data,
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-3, warmup=2)),
        train=TrainConfig(steps=4, eval_every=4, save_every=4),
        init=InitConfig(run=str(pretrained), rename=RENAME),
        decode=DecodeConfig(beam=2, extra_length=4),
        compute=ComputeConfig(layers="unrolled"),
    )
    run = folder / "titles"
    said = []
    trainer = Trainer.of(made)
    warm_start(trainer, trainer.init(), said.append)
    assert said[0].partition("drawn anew: ")[2].split(", ")[:2] == ["bias", "decoder.layers.cross.k"]
    verbs.train(made, run)
    # One line of text in, one out, by BERT's own [CLS] and [SEP].
    (output,) = verbs.translate(run, ["the owl sleeps by day 3"])
    assert output.source == "the owl sleeps by day 3"
    assert np.isfinite(output.score)


def test_a_run_is_asked_only_for_what_it_was_trained_to(pretrained, classifier):
    with pytest.raises(UserError, match="was not trained to label texts"):
        list(Reader.open(pretrained).classify(["x"]))
    with pytest.raises(UserError, match="holds no BERT that fills gaps"):
        Reader.open(classifier).fill(["[MASK]"])
    with pytest.raises(UserError, match="was not trained to answer"):
        Reader.open(classifier).answer("context", ["question?"])
