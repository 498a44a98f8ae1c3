"""BERT (Devlin 2018) and its smaller sizes (Turc 2019): pre-training, and what it is fine-tuned for."""

from __future__ import annotations

from dataclasses import replace

from experiments.glue import GLUE
from transformer_jax.config import (
    ComputeConfig,
    DataConfig,
    DecodeConfig,
    Experiment,
    InitConfig,
    ObjectiveConfig,
    OptimConfig,
    Published,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.span import SpanQA
from transformer_jax.data.translation import ParallelText
from transformer_jax.models.bert import BertConfig, Task
from transformer_jax.models.bert_seq2seq import RENAME, BertSeq2SeqConfig
from transformer_jax.objectives import Classification, MaskedLM, Seq2Seq, SpanExtraction

# Wikipedia and BooksCorpus there (A.2); BooksCorpus cannot be had any more.
WIKIPEDIA = MaskedText(dataset="wikipedia/20230601.en", length=128, batch_rows=256, rows_multiple=256)

# The paper's initial values, N(0, 0.02^2), suit a width of 768; at 128 they make a slow start.
SMALL = BertConfig(vocab_size=2048, context=128, width=128, layers=2, heads=4, dropout=0.0, init_std=0.06)

HEADS_NOTE = (
    "Encoder and pooler alone have {encoder}; ours adds the heads of pre-training, whose output matrix is the "
    "embedding: only a transform, a norm and biases."
)


def bert_base() -> Experiment:
    """BERT-base (Devlin 2018): first phase, length 128, 90 % of 1M steps; the second is `bert_base_512`."""
    steps = 900_000
    return Experiment(
        name="bert_base",
        model=BertConfig(),
        objective=MaskedLM(),
        data=WIKIPEDIA,
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="linear", peak=1e-4, warmup=10_000, steps=steps),
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=5000, save_every=5000),
        compute=ComputeConfig(dtype="bfloat16"),
        published=Published(
            parameters=110_000_000,
            source="Devlin 2018, section 3",
            note=HEADS_NOTE.format(encoder="109,482,240"),
        ),
    )


def bert_base_512() -> Experiment:
    """The second phase of `bert_base`: length 512 for the last 10 % of the steps; give --init.run runs/bert_base."""
    first = bert_base()
    steps = 100_000
    return replace(
        first,
        name="bert_base_512",
        data=replace(WIKIPEDIA, length=512, max_predictions=77),
        optim=replace(first.optim, schedule=ScheduleConfig(kind="linear", peak=1e-5, warmup=1, steps=steps)),
        train=replace(first.train, steps=steps),
    )


def bert_large() -> Experiment:
    """BERT-large (Devlin 2018): 24 layers."""
    base = bert_base()
    return replace(
        base,
        name="bert_large",
        model=BertConfig(width=1024, layers=24, heads=16),
        published=Published(
            parameters=340_000_000,
            source="Devlin 2018, section 3",
            note=HEADS_NOTE.format(encoder="335,141,888") + " The paper rounds up.",
        ),
    )


def bert_base_lamb() -> Experiment:
    """BERT-base in large batches with LAMB (You 2020): 32,768 sequences of 128, 7,038 steps (table 2)."""
    base = bert_base()
    steps = 7038
    return replace(
        base,
        name="bert_base_lamb",
        data=replace(WIKIPEDIA, batch_rows=32_768),
        optim=OptimConfig(
            kind="lamb",
            schedule=ScheduleConfig(kind="linear", peak=5e-3, warmup=2000, steps=steps),
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
        ),
        train=replace(base.train, steps=steps, eval_every=500, save_every=500),
    )


def _turc(name: str, published: int, *, layers: int, width: int) -> Experiment:
    base = bert_base()
    return replace(
        base,
        name=name,
        model=BertConfig(width=width, layers=layers, heads=width // 64),
        published=Published(parameters=published, source="Turc 2019, the released checkpoints", note="Rounded there."),
    )


def bert_tiny() -> Experiment:
    """BERT of 2 layers of width 128 (Turc 2019)."""
    return _turc("bert_tiny", 4_400_000, layers=2, width=128)


def bert_mini() -> Experiment:
    """BERT of 4 layers of width 256 (Turc 2019)."""
    return _turc("bert_mini", 11_300_000, layers=4, width=256)


def bert_small() -> Experiment:
    """BERT of 4 layers of width 512 (Turc 2019)."""
    return _turc("bert_small", 29_100_000, layers=4, width=512)


def bert_medium() -> Experiment:
    """BERT of 8 layers of width 512 (Turc 2019)."""
    return _turc("bert_medium", 41_700_000, layers=8, width=512)


def bert_small_demo() -> Experiment:
    """A small BERT for 2 CPU cores and the pages of LibreOffice Help; about 10 minutes."""
    steps = 7000
    return Experiment(
        name="bert_small_demo",
        model=SMALL,
        objective=MaskedLM(),
        data=MaskedText(dataset="tjax_text/help_en", length=64, max_predictions=10, batch_rows=32),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="linear", peak=3e-3, warmup=200, steps=steps),
            b2=0.98,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, eval_every=300, save_every=1000),
    )


# Fine-tuning (section 4): a new head on a pre-trained encoder, 3 epochs, one learning rate for all.


def _fine_tune(
    name: str, data: DataConfig, objective: ObjectiveConfig, steps: int, *, task: Task, labels: int = 0
) -> Experiment:
    """BERT-base with the head of a task; give --init.run, a run of `bert_base` or what `tjax convert` imported."""
    base = bert_base()
    return replace(
        base,
        name=name,
        model=BertConfig(task=task, labels=labels),
        objective=objective,
        data=data,
        optim=replace(base.optim, schedule=ScheduleConfig(kind="linear", peak=3e-5, warmup=steps // 10, steps=steps)),
        train=TrainConfig(steps=steps, eval_every=max(steps // 6, 1), save_every=max(steps // 3, 1)),
        published=None,
    )


def _glue(task: str) -> Experiment:
    facts = GLUE[task]
    data = LabelledText(dataset=f"glue/{task}", kind=facts.kind, max_length=128, batch_rows=32)
    objective = Classification(kind=facts.kind)
    return _fine_tune(f"bert_glue_{task}", data, objective, facts.steps, task="classify", labels=facts.labels)


def bert_glue_cola() -> Experiment:
    """Is it a grammatical sentence? (GLUE, Wang 2019; Matthews correlation)."""
    return _glue("cola")


def bert_glue_sst2() -> Experiment:
    """Is the review positive? (GLUE; accuracy)."""
    return _glue("sst2")


def bert_glue_mrpc() -> Experiment:
    """Do two sentences say the same? (GLUE; F1, accuracy)."""
    return _glue("mrpc")


def bert_glue_qqp() -> Experiment:
    """Do two questions ask the same? (GLUE; F1, accuracy)."""
    return _glue("qqp")


def bert_glue_stsb() -> Experiment:
    """How alike are two sentences, from 0 to 5? (GLUE; Pearson, Spearman)."""
    return _glue("stsb")


def bert_glue_mnli() -> Experiment:
    """Does the first sentence imply the second, contradict it, or neither? (GLUE; accuracy)."""
    return _glue("mnli")


def bert_glue_qnli() -> Experiment:
    """Does the sentence answer the question? (GLUE; accuracy)."""
    return _glue("qnli")


def bert_glue_rte() -> Experiment:
    """Does the first text imply the second? (GLUE; accuracy)."""
    return _glue("rte")


def bert_squad() -> Experiment:
    """Questions about Wikipedia, the answer a span (SQuAD 1.1, Rajpurkar 2016); 3 epochs as in section 4.2."""
    data = SpanQA(dataset="squad", max_length=384, doc_stride=128, batch_rows=32)
    return _fine_tune("bert_squad", data, SpanExtraction(), 3 * 88_000 // 32, task="span")


def bert_squad_v2() -> Experiment:
    """The same, and some have no answer (SQuAD 2.0, Rajpurkar 2018); section 4.3."""
    data = SpanQA(dataset="squad/v2.0", max_length=384, doc_stride=128, batch_rows=48)
    return _fine_tune("bert_squad_v2", data, SpanExtraction(), 2 * 132_000 // 48, task="span")


def bert2bert_cnn_dailymail() -> Experiment:
    """Summaries of news by an encoder and a decoder that both start from BERT (Rothe 2020, BERT2BERT)."""
    base, steps = bert_base(), 100_000
    return replace(
        base,
        name="bert2bert_cnn_dailymail",
        model=BertSeq2SeqConfig(),
        objective=Seq2Seq(smoothing=0.1),
        data=ParallelText(
            dataset="cnn_dailymail", source="article", target="highlights", max_length=512, batch_tokens=65_536
        ),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="linear", peak=5e-5, warmup=4000, steps=steps), b2=0.999, eps=1e-6
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=2000, save_every=2000),
        init=InitConfig(rename=RENAME),
        decode=DecodeConfig(beam=4, length_penalty=1.0, extra_length=0),
        published=None,
    )


# The same on the text that ships with us, from bert_small_demo.


def _demo(name: str, experiment: Experiment, steps: int, peak: float) -> Experiment:
    demo = bert_small_demo()
    return replace(
        experiment,
        name=name,
        optim=replace(demo.optim, schedule=ScheduleConfig(kind="linear", peak=peak, warmup=steps // 10, steps=steps)),
        train=TrainConfig(steps=steps, eval_every=steps // 5, save_every=steps // 5),
        compute=demo.compute,
        init=replace(experiment.init, run="runs/bert_small_demo"),
        published=None,
    )


def bert_sentiment_demo() -> Experiment:
    """Is the film review good? From bert_small_demo; about a minute on 2 CPU cores."""
    model = replace(SMALL, task="classify", labels=2, dropout=0.1)
    data = LabelledText(dataset="tjax_tasks/sentiment", max_length=48, batch_rows=32)
    experiment = replace(bert_small_demo(), model=model, objective=Classification(), data=data)
    return _demo("bert_sentiment_demo", experiment, 400, 5e-4)


def bert_qa_demo() -> Experiment:
    """Questions about glosses of WordNet, the answer a span; from bert_small_demo."""
    model = replace(SMALL, task="span", dropout=0.1)
    data = SpanQA(dataset="tjax_tasks/wordnet_qa", max_length=128, max_query_length=24, doc_stride=64, batch_rows=16)
    experiment = replace(bert_small_demo(), model=model, objective=SpanExtraction(), data=data)
    return _demo("bert_qa_demo", experiment, 400, 1e-3)


def bert_titles_demo() -> Experiment:
    """Titles for pages of LibreOffice Help, by an encoder and a decoder that both start from bert_small_demo."""
    sizes = {name: getattr(SMALL, name) for name in ("vocab_size", "context", "width", "layers", "heads", "init_std")}
    experiment = replace(
        bert_small_demo(),
        model=BertSeq2SeqConfig(**sizes, dropout=0.1),
        objective=Seq2Seq(smoothing=0.1),
        data=ParallelText(
            dataset="tjax_tasks/titles", source="text", target="title", max_length=128, batch_tokens=2048
        ),
        init=InitConfig(rename=RENAME),
        decode=DecodeConfig(beam=4, extra_length=0),
    )
    return _demo("bert_titles_demo", experiment, 600, 1e-3)


def scratch(experiment: Experiment) -> Experiment:
    """The same, all parameters drawn anew; the tokenizer stays that of the pre-trained run."""
    data = replace(experiment.data, tokenizer=experiment.init.run)  # type: ignore[call-arg]
    return replace(experiment, name=f"{experiment.name}_scratch", data=data, init=InitConfig())


def pretraining_sentiment() -> list[Experiment]:
    """What pre-training is worth for classification: film reviews, from bert_small_demo and from scratch."""
    return [bert_sentiment_demo(), scratch(bert_sentiment_demo())]


def pretraining_qa() -> list[Experiment]:
    """What pre-training is worth for question answering: glosses, from bert_small_demo and from scratch."""
    return [bert_qa_demo(), scratch(bert_qa_demo())]


def pretraining_titles() -> list[Experiment]:
    """What pre-training is worth for summaries: titles of pages, from bert_small_demo and from scratch."""
    return [bert_titles_demo(), scratch(bert_titles_demo())]
