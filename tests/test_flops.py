"""Laws of the FLOPs of a step, against counts by hand."""

from __future__ import annotations

import pytest

from tests.tiny import tiny
from transformer_jax.flops import count, flops, tokens_of
from transformer_jax.models import BertConfig, GPTConfig, RNNSeq2SeqConfig, TransformerConfig

GPT2 = {"tokens": (3, 1024), "targets": (3, 1024)}


def test_conventions_of_gpt2_by_hand():
    found = count(GPTConfig(), GPT2)
    tokens = 3 * 1024
    assert found.tokens == tokens
    assert found.six_n == 6 * 124_439_808 * tokens
    assert found.six_n_non_embedding == 6 * (124_439_808 - 50_257 * 768 - 1024 * 768) * tokens
    assert found.palm == (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024) * tokens
    # Weights of the layers and of the output, and a causal query sees half of 1024 keys.
    weights = 12 * 12 * 768 * 768 + 50_257 * 768
    assert found.matmuls == 3 * tokens * (2 * weights + 4 * 12 * 768 * 512)


@pytest.mark.parametrize(
    ("name", "share"), [("6N total", 0.94), ("6N non-embedding", 0.64), ("PaLM 6N + 12LNHT", 1.07)]
)
def test_conventions_differ_as_published_for_gpt2(name, share):
    found = count(GPTConfig(), GPT2)
    assert found.named()[name] / found.matmuls == pytest.approx(share, abs=0.005)


def test_long_context_is_where_they_part():
    model = GPTConfig(width=2048, layers=16, heads=16, context=131_072)
    found = count(model, {"tokens": (1, 131_072), "targets": (1, 131_072)})
    assert found.six_n / found.matmuls < 0.25
    assert found.palm / found.matmuls > 1.7


def test_bidirectional_attention_counts_in_full_everywhere():
    """Without tables and heads, BERT's matrix products are 6N + 12LNHT exactly."""
    model = BertConfig(vocab_size=7, context=40, width=24, layers=5, heads=4, feedforward=56, task="encode")
    found = count(model, {"tokens": (9, 40)})
    layer = 4 * 24 * 24 + 2 * 24 * 56
    assert found.matmuls == 9 * 40 * (6 * 5 * layer + 12 * 5 * 24 * 40)


def test_two_sides_count_source_and_target():
    model = TransformerConfig(vocab_size=11, width=24, heads=4, feedforward=56, encoder_layers=3, decoder_layers=5)
    found = count(model, {"source": (7, 20), "target": (7, 13 + 1)})
    assert found.tokens == tokens_of({"source": (7, 20), "target": (7, 14)}) == 7 * 13
    pairs = 7 * (3 * 20 * 20 + 5 * 13 * (13 + 20))
    assert found.palm == found.six_n + 12 * 24 * pairs


def test_a_recurrent_model_has_no_attention_stack():
    found = count(RNNSeq2SeqConfig(vocab_size=30), {"source": (4, 9), "target": (4, 8)})
    assert found.palm is None
    assert found.named()["PaLM 6N + 12LNHT"] is None
    assert found.matmuls > 0


def test_an_experiment_counts_its_largest_batch():
    experiment = tiny()
    shapes = {name: shape for name, (shape, _) in experiment.data.batch_shapes().items()}
    assert flops(experiment) == count(experiment.model, shapes)
