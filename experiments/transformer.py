"""Attention Is All You Need (Vaswani 2017): the paper's models, and small ones for the text that ships with us."""

from __future__ import annotations

from dataclasses import replace

from transformer_jax.config import (
    DecodeConfig,
    Experiment,
    OptimConfig,
    Published,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.translation import ParallelText
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.objectives import Seq2Seq

BASE = TransformerConfig()
BIG = replace(BASE, width=1024, heads=16, feedforward=4096, dropout=0.3)

DEMO = TransformerConfig(
    vocab_size=2000, width=128, heads=4, feedforward=512, encoder_layers=2, decoder_layers=2, dropout=0.2
)

HELP_EN_KO = ParallelText(
    dataset="tjax_parallel/help_en_ko",
    source="en",
    target="ko",
    min_words=2,
    max_words=12,
    max_length=48,
    batch_tokens=1536,
    bucket_lengths=(12, 16, 24, 32, 48),
)


def transformer_base_wmt14_en_de() -> Experiment:
    """The base model, English to German: table 3, first row; sections 5.1 to 5.4."""
    return Experiment(
        name="transformer_base_wmt14_en_de",
        model=BASE,
        objective=Seq2Seq(smoothing=0.1),
        data=ParallelText(dataset="wmt14_translate/de-en", source="en", target="de", batch_tokens=25_000),
        optim=OptimConfig(
            # Equation 3: the peak is width^-0.5 warmup^-0.5.
            schedule=ScheduleConfig(kind="inverse_sqrt", peak=512**-0.5 * 4000**-0.5, warmup=4000, steps=100_000),
            b1=0.9,
            b2=0.98,
            eps=1e-9,
        ),
        train=TrainConfig(steps=100_000, log_every=100, eval_every=1500, save_every=1500, keep=5),
        # The base model averages its last 5 checkpoints, 10 minutes apart (section 6.1).
        decode=DecodeConfig(beam=4, length_penalty=0.6, extra_length=50, average=5),
        published=Published(
            parameters=65_000_000,
            source="Vaswani 2017, table 3: base, 27.3 BLEU (table 2)",
            note="The paper rounds and names no exact vocabulary. 44.1M lie outside the embedding, so 65M stand for "
            "about 40,800 shared tokens, where section 5.1 says about 37,000.",
        ),
    )


def transformer_big_wmt14_en_de() -> Experiment:
    """The big model, English to German: table 3, last row."""
    base = transformer_base_wmt14_en_de()
    return replace(
        base,
        name="transformer_big_wmt14_en_de",
        model=BIG,
        optim=replace(base.optim, schedule=replace(base.optim.schedule, peak=1024**-0.5 * 4000**-0.5, steps=300_000)),
        train=replace(base.train, steps=300_000, keep=20),
        decode=replace(base.decode, average=20),
        published=Published(
            parameters=213_000_000,
            source="Vaswani 2017, table 3: big, 28.4 BLEU (table 2)",
            note="Rounding and vocabulary: 176.3M lie outside the embedding, so 213M stand for about 35,900 tokens.",
        ),
    )


def transformer_base_wmt14_en_fr() -> Experiment:
    """The base model, English to French, 32,000 word pieces (section 5.1)."""
    base = transformer_base_wmt14_en_de()
    return replace(
        base,
        name="transformer_base_wmt14_en_fr",
        model=replace(BASE, vocab_size=32_000),
        data=ParallelText(dataset="wmt14_translate/fr-en", source="en", target="fr", batch_tokens=25_000),
        published=Published(
            parameters=65_000_000,
            source="Vaswani 2017, table 3: base, 38.1 BLEU (table 2)",
            note="The 65M of table 3 are those of the English-German model; here the vocabulary is 32,000.",
        ),
    )


def transformer_big_wmt14_en_fr() -> Experiment:
    """The big model, English to French; dropout 0.1 (section 6.1)."""
    big, fr = transformer_big_wmt14_en_de(), transformer_base_wmt14_en_fr()
    return replace(
        big,
        name="transformer_big_wmt14_en_fr",
        model=replace(BIG, vocab_size=32_000, dropout=0.1),
        data=fr.data,
        published=Published(
            parameters=213_000_000,
            source="Vaswani 2017, table 3: big, 41.8 BLEU (table 2)",
            note="The 213M of table 3 are those of the English-German model; here the vocabulary is 32,000.",
        ),
    )


def transformer_demo_en_ko() -> Experiment:
    """A small one for 2 CPU cores and 8,900 English-Korean sentences of 2 to 12 words; about 5 minutes."""
    steps = 2000
    return Experiment(
        name="transformer_demo_en_ko",
        model=DEMO,
        objective=Seq2Seq(smoothing=0.1),
        data=HELP_EN_KO,
        optim=OptimConfig(schedule=ScheduleConfig(kind="cosine", peak=3e-3, warmup=200, steps=steps), clip_norm=1.0),
        train=TrainConfig(steps=steps, eval_every=200, save_every=200),
    )
