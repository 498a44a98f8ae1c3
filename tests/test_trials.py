"""Side by side: GPT-1 beside BERT on one task, from pre-training to the report, and the report as a reference."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.bert import bert_small_demo
from experiments.gpt1 import gpt1_sentiment_demo, gpt1_small_demo, sentiment_gpt1_bert
from transformer_jax.config import TrainConfig, differences, flatten
from transformer_jax.curves import against
from transformer_jax.loop import train_to_the_end
from transformer_jax.trials import trials

SHORT = TrainConfig(steps=4, log_every=1, eval_every=2, save_every=4)


def test_gpt1_and_bert_differ_in_what_makes_them():
    """Same size, text, batch, length and peak rate; next tokens are not drawn anew, so dropout and fewer steps."""
    gpt1, bert = dict(flatten(gpt1_small_demo())), dict(flatten(bert_small_demo()))
    for name in ("width", "layers", "heads", "vocab_size", "context", "init_std"):
        assert gpt1[f"model.{name}"] == bert[f"model.{name}"], name
    assert gpt1["data.context"] == bert["data.length"]
    for name in ("data.dataset", "data.batch_rows"):
        assert gpt1[name] == bert[name]
    changed = {k for k in bert if k.startswith("optim.") and gpt1[k] != bert[k]}
    assert changed == {"optim.schedule.steps"}
    assert gpt1["model.dropout"] == 0.1
    assert gpt1["train.steps"] == gpt1["optim.schedule.steps"] < bert["train.steps"]
    assert not gpt1["model.pre_norm"]


def test_the_plan_compares_one_thing_at_a_time():
    gpt1, no_lm, scratch, bert, bert_scratch = sentiment_gpt1_bert()
    assert differences(gpt1, no_lm) == [
        "name: gpt1_sentiment_demo -> gpt1_sentiment_demo_no_lm",
        "objective.lm_weight: 0.5 -> 0.0",
    ]
    for pretrained, anew in ((gpt1, scratch), (bert, bert_scratch)):
        changed = {line.split(":")[0] for line in differences(pretrained, anew)}
        assert changed == {"name", "init.run", "data.tokenizer"}
        assert dict(flatten(anew))["data.tokenizer"] == pretrained.init.run
    assert (gpt1.optim, gpt1.train) == (bert.optim, bert.train)


@pytest.mark.slow
def test_from_pre_training_to_a_report_that_is_a_reference(tmp_path):
    text, reviews = tmp_path / "text.txt", tmp_path / "reviews.tsv"
    text.write_text("\n\n".join(f"Page {i} is about the {i}th thing." for i in range(60)), encoding="utf-8")
    rows = [f"{'good' if i % 3 else 'bad'}\tfilm {i} was {'fine' if i % 3 else 'dull'}" for i in range(90)]
    reviews.write_text("\n".join(["label\ttext", *rows]) + "\n", encoding="utf-8")
    sizes = {"vocab_size": 280, "context": 24, "width": 16, "layers": 1, "heads": 2}
    pretrained = gpt1_small_demo()
    data = replace(pretrained.data, dataset=str(text), boundary="blank_line", context=16, batch_rows=8)
    run = tmp_path / "gpt1_small"
    train_to_the_end(replace(pretrained, model=replace(pretrained.model, **sizes), data=data, train=SHORT), run)
    fine = gpt1_sentiment_demo()
    fine = replace(
        fine,
        model=replace(fine.model, **sizes),
        data=replace(fine.data, dataset=str(reviews), max_length=16, batch_rows=16, bucket_lengths=(16,)),
        train=SHORT,
        init=replace(fine.init, run=str(run)),
    )
    _, page, figures = trials([fine], 2, tmp_path / "out")
    result = json.loads(figures.read_text())
    curves = result["curves"]["gpt1_sentiment_demo"]
    assert curves["steps"] == [2, 4]
    assert curves["validation"].keys() >= {"nll", "lm_nll", "accuracy"}
    assert curves["training"].keys() >= {"nll", "lm_nll", "accuracy", "grad_norm"}
    assert len(result["scores"]["gpt1_sentiment_demo"]["accuracy"]) == 2
    assert page.read_text().count("data:image/png;base64,") == 1
    of_seed = tmp_path / "out" / "runs" / "gpt1_sentiment_demo-seed1"
    assert against(of_seed, figures).reproduces, "a run of the reference itself"
