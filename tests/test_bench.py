"""The FLOPs that utilisation is a share of are those of the program."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from transformer_jax.config import ComputeConfig
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.nn.module import Skeleton

RNN = RNNSeq2SeqConfig(vocab_size=307, width=32, embedding=24, encoder_layers=2, decoder_layers=3, bidirectional=True)


def products_of(jaxpr, times=1):
    """Count the FLOPs of every matrix product in a program, loops unrolled, without asking the compiler."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            depth = 1
            for axis in contracted:
                depth *= left.shape[axis]
            total += 2 * out.size * depth * times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else [value]:
                program = getattr(part, "jaxpr", part)
                if hasattr(program, "eqns"):
                    total += products_of(program, inner)
    return total


@pytest.mark.parametrize(
    ("config", "slack"),
    [
        # All of the causal scores are computed, half of them count: L_decoder x 2 width T^2.
        (TransformerConfig(307, 32, 4, 96, 2, 3), 3 * 2 * 32 * 13 * 13),
        # First states from the encoder's last: once a sentence.
        (replace(RNN, attention="none"), 2 * 64 * 3 * 2 * 32),
        (replace(RNN, attention="additive"), 2 * 32 * 3 * 2 * 32),
        (replace(RNN, attention="general", input_feeding=True), 2 * 64 * 3 * 2 * 32),
        (replace(RNN, attention="additive", maxout=24), 2 * 32 * 3 * 2 * 32),
        (replace(RNN, attention="dot", bidirectional=False, encoder_layers=3, cell="gru"), 0),
        # And the context vector, once a sentence too; what it adds to the gates is counted.
        (replace(RNN, bidirectional=False, feed_context=True, maxout=24), 2 * 32 * 3 * 2 * 32 + 2 * 32 * 32),
    ],
    ids=["transformer", "none", "additive", "general", "maxout", "dot", "context"],
)
def test_forward_flops_are_those_of_the_program(config, slack):
    config.check()
    skeleton = Skeleton.of(config, ComputeConfig(layers="unrolled"))
    source, target = jnp.ones((1, 17), jnp.int32), jnp.ones((1, 13), jnp.int32)
    program = jax.make_jaxpr(lambda params: skeleton.bind(params)(source, target))(skeleton.abstract)
    assert products_of(program.jaxpr) - config.forward_flops({"source": (1, 17), "target": (1, 14)}) == slack
