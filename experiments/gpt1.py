"""GPT-1 (Radford 2018): pre-training, and what it is fine-tuned for; in small beside BERT."""

from __future__ import annotations

from dataclasses import replace

from experiments.bert import SMALL, bert_sentiment_demo, bert_small_demo, scratch
from experiments.glue import GLUE
from transformer_jax.config import (
    Experiment,
    InitConfig,
    OptimConfig,
    Published,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.labelled_layout import LayoutName
from transformer_jax.data.packed import PackedText
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM, Classification

GPT1 = GPTConfig(vocab_size=40_478, context=512, pre_norm=False, dropout=0.1, scaled_residual=False)


def gpt1() -> Experiment:
    """GPT-1 (Radford 2018, section 4.1), 117M: post-LN, context 512, BPE of 40,000 merges."""
    steps = 1_800_000  # 100 epochs of BooksCorpus, in batches of 64 x 512
    return Experiment(
        name="gpt1",
        model=GPT1,
        objective=CausalLM(),
        data=PackedText(dataset="lm1b", context=512, batch_rows=64, rows_multiple=64),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=2.5e-4, warmup=2000, steps=steps),
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=5000, save_every=5000),
        published=Published(
            parameters=117_000_000,
            source="Radford 2018, section 4.1 (the count is that of Radford 2019, table 2)",
            note="BooksCorpus cannot be had any more; lm1b stands in. 40,478 tokens: 40,000 merges, 477 bytes and "
            "letters, and the end of the text.",
        ),
    )


# Fine-tuning (section 4.1): 3 epochs in batches of 32, half the loss of the language model beside.


def _glue(task: str) -> Experiment:
    """GPT-1 with a head; give --init.run, a run of `gpt1`."""
    first, facts = gpt1(), GLUE[task]
    layout: LayoutName = "gpt_both" if facts.similarity else "gpt"
    steps = facts.steps
    return replace(
        first,
        name=f"gpt1_glue_{task}",
        model=replace(GPT1, task="classify", labels=facts.labels),
        objective=Classification(kind=facts.kind, lm_weight=0.5),
        data=LabelledText(dataset=f"glue/{task}", kind=facts.kind, layout=layout, max_length=128, batch_rows=32),
        optim=replace(
            first.optim,
            schedule=ScheduleConfig(kind="linear", peak=6.25e-5, warmup=max(round(0.002 * steps), 1), steps=steps),
        ),
        train=TrainConfig(steps=steps, eval_every=max(steps // 6, 1), save_every=max(steps // 3, 1)),
        published=None,
    )


def gpt1_glue_cola() -> Experiment:
    """Is it a grammatical sentence? (GLUE, Wang 2019; Matthews correlation)."""
    return _glue("cola")


def gpt1_glue_sst2() -> Experiment:
    """Is the review positive? (GLUE; accuracy)."""
    return _glue("sst2")


def gpt1_glue_mrpc() -> Experiment:
    """Do two sentences say the same? (GLUE; F1, accuracy)."""
    return _glue("mrpc")


def gpt1_glue_qqp() -> Experiment:
    """Do two questions ask the same? (GLUE; F1, accuracy)."""
    return _glue("qqp")


def gpt1_glue_stsb() -> Experiment:
    """How alike are two sentences, from 0 to 5? (GLUE; Pearson, Spearman)."""
    return _glue("stsb")


def gpt1_glue_mnli() -> Experiment:
    """Does the first sentence imply the second, contradict it, or neither? (GLUE; accuracy)."""
    return _glue("mnli")


def gpt1_glue_qnli() -> Experiment:
    """Does the sentence answer the question? (GLUE; accuracy)."""
    return _glue("qnli")


def gpt1_glue_rte() -> Experiment:
    """Does the first text imply the second? (GLUE; accuracy)."""
    return _glue("rte")


# GPT-1 beside BERT in small: the sizes, text, batches and peak rate of `bert_small_demo`. Gaps are drawn anew in every
# epoch, next tokens are not: so it has GPT-1's dropout, and stops before it learns the pages by heart.


def gpt1_small_demo() -> Experiment:
    """A small GPT-1 for 2 CPU cores and the pages of LibreOffice Help, the size of `bert_small_demo`; 6 minutes."""
    bert, steps = bert_small_demo(), 2000
    sizes = {name: getattr(SMALL, name) for name in ("vocab_size", "context", "width", "layers", "heads", "init_std")}
    return replace(
        bert,
        name="gpt1_small_demo",
        model=replace(GPT1, **sizes),
        objective=CausalLM(),
        data=PackedText(dataset="tjax_text/help_en", context=64, batch_rows=32),
        optim=replace(bert.optim, schedule=replace(bert.optim.schedule, steps=steps)),
        train=replace(bert.train, steps=steps),
    )


def gpt1_sentiment_demo() -> Experiment:
    """Is the film review good? From gpt1_small_demo, with the language model's loss; a minute on 2 CPU cores."""
    small, bert = gpt1_small_demo(), bert_sentiment_demo()
    return replace(
        bert,
        name="gpt1_sentiment_demo",
        model=replace(small.model, task="classify", labels=2, dropout=0.1),  # type: ignore[call-arg]
        objective=Classification(lm_weight=0.5),
        data=replace(bert.data, layout="gpt"),  # type: ignore[call-arg]
        init=InitConfig(run="runs/gpt1_small_demo"),
    )


def gpt1_sentiment_demo_no_lm() -> Experiment:
    """The same without the language model's loss."""
    return replace(gpt1_sentiment_demo(), name="gpt1_sentiment_demo_no_lm", objective=Classification())


def sentiment_gpt1_bert() -> list[Experiment]:
    """GPT-1 and BERT of one size: film reviews, pre-trained and from scratch, with and without GPT-1's second loss."""
    gpt1, bert = gpt1_sentiment_demo(), bert_sentiment_demo()
    return [gpt1, gpt1_sentiment_demo_no_lm(), scratch(gpt1), bert, scratch(bert)]
