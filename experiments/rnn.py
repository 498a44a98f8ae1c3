"""Recurrent translation before the Transformer: the papers' models, and three to stand beside the Transformer.

The papers train with Adadelta or SGD on vocabularies of words; all of ours train with Adam on one joint vocabulary of
byte-level BPE. Sizes, clipping, dropout, batches and lengths of training are the papers'; learning rates are ours.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.transformer import DEMO, HELP_EN_KO, transformer_base_wmt14_en_de, transformer_demo_en_ko
from transformer_jax.config import (
    DecodeConfig,
    Experiment,
    OptimConfig,
    Published,
    ScheduleConfig,
    TrainConfig,
)
from transformer_jax.data.translation import ParallelText
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.objectives import Seq2Seq

# Initial values are the library's, where the paper draws orthogonal recurrent matrices and the rest from N(0, 0.01^2).
RNNSEARCH = RNNSeq2SeqConfig(
    vocab_size=30_000,
    width=1000,
    embedding=620,
    cell="gru",
    encoder_layers=1,
    decoder_layers=1,
    bidirectional=True,
    attention="additive",
    maxout=500,
)
SUTSKEVER = RNNSeq2SeqConfig(reverse_source=True, init_scale=0.08)
LUONG = RNNSeq2SeqConfig(
    vocab_size=50_000,
    reverse_source=True,
    attention="general",
    input_feeding=True,
    dropout=0.2,
    init_scale=0.1,
)


def rnnsearch_50() -> Experiment:
    """Attention before the cell (Bahdanau 2015): RNNsearch-50, English to French; section 4.2 and appendices A, B."""
    steps = 288_000
    return Experiment(
        name="rnnsearch_50",
        model=RNNSEARCH,
        objective=Seq2Seq(smoothing=0.0),
        # 80 sentences of at most 50 words (here tokens, and the end of the sentence).
        data=ParallelText(
            dataset="wmt14_translate/fr-en", source="en", target="fr", max_length=51, batch_tokens=80 * 51
        ),
        optim=OptimConfig(
            # There Adadelta; gradients are scaled to a norm of at most 1 there too.
            schedule=ScheduleConfig(kind="cosine", peak=5e-4, warmup=4000, steps=steps),
            b2=0.999,
            eps=1e-8,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=2000, save_every=2000),
        # The paper does not say how wide its beam is.
        decode=DecodeConfig(beam=12, length_penalty=0.0),
    )


def rnnencdec_50() -> Experiment:
    """One context vector that enters every step (Cho 2014), as RNNencdec-50 of Bahdanau 2015, English to French."""
    search = rnnsearch_50()
    return replace(
        search,
        name="rnnencdec_50",
        model=replace(RNNSEARCH, bidirectional=False, attention="none", feed_context=True),
    )


def sutskever_lstm() -> Experiment:
    """Four layers of LSTM and a reversed source (Sutskever 2014), English to French; section 3.4."""
    steps = 700_000  # 7.5 epochs of 12M sentences
    return Experiment(
        name="sutskever_lstm",
        model=SUTSKEVER,
        objective=Seq2Seq(smoothing=0.0),
        # 128 sentences of some 32 tokens.
        data=ParallelText(dataset="wmt14_translate/fr-en", source="en", target="fr", batch_tokens=128 * 32),
        optim=OptimConfig(
            # There SGD, 0.7 halved every half epoch after 5 epochs; clipped at 5, gradients being means over sentences.
            schedule=ScheduleConfig(kind="wsd", peak=5e-4, warmup=4000, steps=steps, decay_fraction=1 / 3),
            b2=0.999,
            eps=1e-8,
            clip_norm=5.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=2000, save_every=2000),
        decode=DecodeConfig(beam=12, length_penalty=0.0),
        published=Published(
            parameters=384_000_000,
            source="Sutskever 2014, section 3.4; one LSTM, reversed, beam 12: 30.59 BLEU (table 1)",
            note="64M in the recurrent layers, as here. Their source vocabulary has 160,000 words and their target "
            "vocabulary 80,000; ours is one of 80,000 for both, so the source embedding is smaller by 80M.",
        ),
    )


def luong_global_general() -> Experiment:
    """Attention after the cells with input feeding (Luong 2015), score general, English to German; section 4.1."""
    steps = 420_000  # 12 epochs of 4.5M sentences
    sutskever = sutskever_lstm()
    return replace(
        sutskever,
        name="luong_global_general",
        model=LUONG,
        data=ParallelText(
            dataset="wmt14_translate/de-en", source="en", target="de", max_length=51, batch_tokens=128 * 32
        ),
        # There SGD, 1.0 halved every epoch after 8.
        optim=replace(sutskever.optim, schedule=replace(sutskever.optim.schedule, steps=steps)),
        train=replace(sutskever.train, steps=steps),
        decode=DecodeConfig(beam=10, length_penalty=0.0),
        published=None,
    )


def luong_global_dot() -> Experiment:
    """The same with the score dot, which has no parameters (Luong 2015, section 3.1)."""
    general = luong_global_general()
    return replace(general, name="luong_global_dot", model=replace(LUONG, attention="dot"))


# For the comparison with the Transformer: LSTM cells, one vocabulary and tied embedding, equal parameter counts. All
# three read both ways with one layer and write with one; they differ in the attention, and in how what it found
# enters the output.
PLAIN = RNNSeq2SeqConfig(encoder_layers=1, decoder_layers=1, bidirectional=True, tied=True, dropout=0.2)
BAHDANAU = replace(PLAIN, attention="additive")
GLOBAL = replace(PLAIN, attention="general", input_feeding=True)


def lstm_demo_en_ko() -> Experiment:
    """No attention, with data, training and parameter count of transformer_demo_en_ko."""
    return replace(
        transformer_demo_en_ko(),
        name="lstm_demo_en_ko",
        model=replace(PLAIN, vocab_size=2000, width=172, embedding=172),
    )


def bahdanau_demo_en_ko() -> Experiment:
    """Attention before the cell (Bahdanau 2015), with data, training and size of transformer_demo_en_ko."""
    return replace(
        lstm_demo_en_ko(),
        name="bahdanau_demo_en_ko",
        model=replace(BAHDANAU, vocab_size=2000, width=140, embedding=140, maxout=140),
    )


def luong_demo_en_ko() -> Experiment:
    """Attention after the cells (Luong 2015), with data, training and parameter count of transformer_demo_en_ko."""
    return replace(
        lstm_demo_en_ko(),
        name="luong_demo_en_ko",
        model=replace(GLOBAL, vocab_size=2000, width=154, embedding=154),
    )


def lstm_wmt14_en_de() -> Experiment:
    """No attention, with data, training and parameter count of transformer_base_wmt14_en_de."""
    transformer = transformer_base_wmt14_en_de()
    return replace(
        transformer,
        name="lstm_wmt14_en_de",
        model=replace(PLAIN, vocab_size=37_000, width=976, embedding=976),
        optim=replace(transformer.optim, clip_norm=1.0),
        published=None,
    )


def bahdanau_wmt14_en_de() -> Experiment:
    """Attention before the cell (Bahdanau 2015), with data, training and size of transformer_base_wmt14_en_de."""
    return replace(
        lstm_wmt14_en_de(),
        name="bahdanau_wmt14_en_de",
        model=replace(BAHDANAU, vocab_size=37_000, width=840, embedding=840, maxout=840),
    )


def luong_wmt14_en_de() -> Experiment:
    """Attention after the cells (Luong 2015), with data, training and size of transformer_base_wmt14_en_de."""
    return replace(
        lstm_wmt14_en_de(),
        name="luong_wmt14_en_de",
        model=replace(GLOBAL, vocab_size=37_000, width=896, embedding=896),
    )


def attention_en_ko() -> list[Experiment]:
    """What attention is worth: LSTM, Bahdanau, Luong, Transformer on sentences of 2 to 24 words."""
    steps = 800
    # Small batches: it takes steps, more than tokens, until attention has found its place.
    data = replace(HELP_EN_KO, max_words=24, max_length=64, batch_tokens=768, bucket_lengths=(16, 32, 64))
    transformer = transformer_demo_en_ko()
    # Post-LN as published is still looking for it when the others are done.
    transformer = replace(transformer, model=replace(DEMO, pre_norm=True))
    return [
        replace(
            experiment,
            data=data,
            optim=replace(experiment.optim, schedule=replace(experiment.optim.schedule, warmup=150, steps=steps)),
            train=replace(experiment.train, steps=steps, eval_every=100, save_every=500),
            decode=replace(experiment.decode, beam=1),
        )
        for experiment in (lstm_demo_en_ko(), bahdanau_demo_en_ko(), luong_demo_en_ko(), transformer)
    ]


def attention_wmt14_en_de() -> list[Experiment]:
    """The same comparison at 63M parameters on WMT14 English to German, for GPU or TPU."""
    return [lstm_wmt14_en_de(), bahdanau_wmt14_en_de(), luong_wmt14_en_de(), transformer_base_wmt14_en_de()]
