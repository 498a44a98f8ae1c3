"""The benchmark counts what is there, and cannot be made to report more than the device can do."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny
from transformer_jax import bench
from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
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
    ],
    ids=["transformer", "none", "additive", "general", "maxout", "dot"],
)
def test_forward_flops_are_those_of_the_program(config, slack):
    config.check()
    skeleton = Skeleton.of(config, ComputeConfig(layers="unrolled"))
    source, target = jnp.ones((1, 17), jnp.int32), jnp.ones((1, 13), jnp.int32)
    program = jax.make_jaxpr(lambda params: skeleton.bind(params)(source, target))(skeleton.abstract)
    assert products_of(program.jaxpr) - config.forward_flops({"source": (1, 17), "target": (1, 14)}) == slack


def test_report_adds_up():
    result = bench.bench_train(tiny(), rows=16, length=12, steps=3)
    seconds = result["step_seconds"]
    assert seconds["low"] <= seconds["median"] <= seconds["high"]
    assert result["tokens_per_second"] == pytest.approx(16 * 12 / seconds["median"])
    assert result["model_flops_per_step"] == 3 * tiny().model.forward_flops({"source": (16, 12), "target": (16, 13)})
    assert 0 < result["share_of_matmul_rate"] < 1
    assert {"command", "commit", "device"} <= result["provenance"].keys()


def test_more_than_the_device_can_do_is_an_error(monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda _: 1.0)
    with pytest.raises(UserError, match=r"the step or the clock is broken, no figure is given"):
        bench.bench_train(tiny(), rows=8, length=12, steps=1)


def test_rows_the_mesh_cannot_divide():
    with pytest.raises(UserError, match=r"--rows 12 must be a multiple of data\.rows_multiple=8"):
        bench.bench_train(tiny(), rows=12, length=12)
