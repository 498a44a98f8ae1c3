"""Laws of attention backends: each gives what the plain one gives, with gradients, whatever the mask."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny
from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels import blockwise, cudnn, plain, splash
from transformer_jax.kernels.attention import BACKENDS, Demand, Mask, attention, chosen, refusal
from transformer_jax.train import Trainer

B, T, S, N, K, H = 3, 36, 26, 6, 2, 8
LENGTHS = (T, 21, 5)

PLACE = np.arange(T)[None]
LENGTH = np.array(LENGTHS)[:, None]
PADDED = np.where(LENGTH > PLACE, 1, 0)
PACKED = np.where(LENGTH > PLACE, 1 + (PLACE >= LENGTH // 3) + (PLACE >= LENGTH // 2), 0)

MASKS = {
    "all": Mask(),
    "padding": Mask(PADDED),
    "causal": Mask(causal=True),
    "causal, padding": Mask(PADDED, causal=True),
    "packed": Mask(PACKED, PACKED, causal=True),
    "packed, both directions": Mask(PACKED, PACKED),
    "window": Mask(PADDED, window=5),
    "causal window": Mask(causal=True, window=7),
    "packed causal window": Mask(PACKED, PACKED, causal=True, window=4),
    "memory": Mask(PADDED[:, :S]),
}


@cache
def given(mask: str) -> tuple[jax.Array, ...]:
    """Queries, keys and values; what stands on padding weighs nothing."""
    keys = jax.random.split(jax.random.key(0), 4)
    s = S if mask == "memory" else T
    q, k, v = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(B, T, N, H), *[(B, s, K, H)] * 2], strict=False)
    )
    weight = jax.random.normal(keys[3], (B, T, N, H))
    return q, k, v, weight * (PADDED[:, :, None, None] if s == T else 1)


def outcome(attend, mask: str, dtype=jnp.float32):
    """Output on real places, and the gradients of a weighted sum of it."""
    q, k, v, weight = given(mask)

    def loss(q, k, v):
        out = attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), MASKS[mask]).astype(jnp.float32)
        return (out * weight).sum(), jnp.where(weight == 0, 0, out)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def through_plain(q, k, v, mask):
    return plain.attend(q, k, v, mask, 0.0, None)[0]


def through_blocks(q, k, v, mask):
    return blockwise.attend(q, k, v, mask, 0.0, None)


expected = cache(partial(outcome, through_plain))


def assert_same(actual, right, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max())), actual, right)


@pytest.mark.parametrize("mask", MASKS)
def test_blocks(mask, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    assert_same(outcome(through_blocks, mask), expected(mask))


@pytest.mark.parametrize("mask", MASKS)
def test_cudnn_is_asked_for_the_same(mask, monkeypatch):
    """What cuDNN is told, computed by XLA: there is no GPU here."""
    asked = []
    original = jax.nn.dot_product_attention

    def instead(*arguments, implementation, **options):
        asked.append(implementation)
        return original(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    assert_same(outcome(cudnn.attend, mask), expected(mask))
    assert asked == ["cudnn"]


@pytest.mark.parametrize(
    "mask", [mask if mask in ("packed", "memory") else pytest.param(mask, marks=pytest.mark.slow) for mask in MASKS]
)
def test_splash_step_by_step(mask):
    assert_same(outcome(partial(splash.attend, interpret=True), mask), expected(mask))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "size"),
    [(Mask(causal=True), H), (Mask(causal=True, window=130), splash.LANES)],
    ids=["causal", "window, heads that fill the lanes"],
)
def test_splash_over_several_blocks(mask, size, monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 256)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 300, n, size)) for i, n in enumerate((2, 1, 1)))

    def both(attend):
        return jax.value_and_grad(lambda q, k, v: jnp.square(attend(q, k, v, mask)).sum(), argnums=(0, 1, 2))(q, k, v)

    assert_same(both(partial(splash.attend, interpret=True)), both(through_plain))


def test_half_precision_keeps_the_softmax_in_float32(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    out = outcome(through_blocks, "packed", jnp.bfloat16)
    assert_same(out, expected("packed"), tolerance=3e-2)


def test_memory_of_blocks_grows_with_length_alone():
    """Four times the positions: four times the memory, with gradients; plain takes sixteen times."""

    def taken(attend, length):
        row = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        gradient = jax.grad(lambda q, k, v: attend(q, k, v, Mask(causal=True)).sum(), argnums=(0, 1, 2))
        memory = jax.jit(gradient).lower(row, row, row).compile().memory_analysis()
        return memory.temp_size_in_bytes

    short, long = taken(through_blocks, 4096), taken(through_blocks, 16384)
    assert long < 4.2 * short
    assert long < 40 * 16384 * 2 * 16 * 4
    assert taken(through_plain, 4096) > 4096 * 4096 * 2 * 4


def test_dropout_of_blocks(monkeypatch):
    """Each weight is kept or not, the rest scaled up; the gradient sees the same choice."""
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    q, k, v, weight = given("causal")
    mask, rate = MASKS["causal"], 0.25

    @jax.jit
    def out(v, key):
        return blockwise.attend(q, k, v, mask, rate, key)

    # Values that name their key show the weights themselves.
    one_hot = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, K, T))
    shown = jnp.stack([out(one_hot, key) for key in jax.random.split(jax.random.key(1), 40)])
    weights = plain.attend(q, k, v, mask, 0.0, None)[1].swapaxes(1, 2)
    ratio = (shown / jnp.where(weights == 0, 1, weights))[:, weights > 0]
    values, counts = np.unique(np.round(ratio, 3), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], atol=2e-3)
    assert abs(counts[0] / counts.sum() - rate) < 0.005
    # Linear in v, so its gradient is the transposed map of the same choice.
    key = jax.random.key(2)
    d_v = jax.jit(jax.grad(lambda v: (out(v, key) * weight).sum()))(v)
    by_hand = jnp.einsum("BTNS,BTNH->BSNH", out(one_hot, key), weight).reshape(B, T, K, N // K, H).sum(3)
    np.testing.assert_allclose(d_v, by_hand, atol=1e-4)
    # And a small step of the queries changes the output as their gradient says.
    value = jax.jit(jax.value_and_grad(lambda q: (blockwise.attend(q, k, v, mask, rate, key) * weight).sum()))
    step = 1e-2 * weight
    np.testing.assert_allclose((value(q + step)[0] - value(q - step)[0]) / 2, (value(q)[1] * step).sum(), rtol=1e-2)


def test_positions_of_a_cache_are_served_whatever_was_asked_for():
    """Decoding: one query a row, at its own position, looks back at the places of a cache."""
    q, k, v = (x[:, :n] for x, n in zip(given("all")[:3], (1, S, S), strict=True))
    positions = np.where(np.arange(S) < LENGTH, np.arange(S), -1)
    mask = Mask(causal=True, q_positions_BT=np.array([[20], [9], [4]]), kv_positions_BS=positions)
    right = through_plain(q, k, v, mask)
    for backend in BACKENDS:
        np.testing.assert_allclose(attention(q, k, v, mask, backend=backend)[0], right, atol=1e-5)


CPU, GPU, TPU = (Demand(platform, "bfloat16", 64, 0.0, length=1024) for platform in ("cpu", "gpu", "tpu"))


@pytest.mark.parametrize(
    ("demand", "backend"),
    [
        (CPU, "xla"),
        (GPU, "cudnn"),
        (TPU, "splash"),
        (replace(TPU, dtype="float32"), "splash"),
        (replace(TPU, length=512), "xla"),
        (replace(GPU, dtype="float32"), "xla"),
        (replace(GPU, head_size=100), "xla"),
        (replace(GPU, dropout=0.1), "xla"),
        (replace(TPU, dropout=0.1), "xla"),
        (replace(TPU, context=4), "blockwise"),
        (replace(CPU, context=2, dropout=0.1), "blockwise"),
    ],
)
def test_auto_takes_the_fastest_that_serves(demand, backend):
    assert chosen("auto", demand) == backend
    assert not refusal(backend, demand)


@pytest.mark.parametrize(
    ("backend", "demand", "message"),
    [
        ("cudnn", CPU, "compute.attention=cudnn needs an NVIDIA GPU, and this runs on cpu; set --compute.attention"),
        ("splash", GPU, "needs a TPU, and this runs on gpu"),
        ("cudnn", replace(GPU, dropout=0.1), "no dropout on attention weights, and the model asks for 0.1"),
        ("cudnn", replace(GPU, dtype="float32"), "computes in 16 bits, and compute.dtype is float32"),
        ("cudnn", replace(GPU, head_size=100), "heads of 8, 16, ... 128 channels, not of 100"),
        ("xla", replace(CPU, context=4), "sees whole rows, and mesh.context=4 divides them"),
        ("splsh", TPU, r"no attention backend 'splsh'. Did you mean 'splash'\?"),
    ],
)
def test_what_cannot_serve_is_refused(backend, demand, message):
    with pytest.raises(UserError, match=message):
        chosen(backend, demand)


def test_the_trainer_refuses_before_it_compiles_and_names_what_runs():
    with pytest.raises(UserError, match="cudnn needs an NVIDIA GPU, and this runs on cpu"):
        Trainer.of(replace(tiny(), compute=ComputeConfig(attention="cudnn")))
    for asked, runs in (("auto", "xla"), ("blockwise", "blockwise")):
        assert f"attention by {runs}," in Trainer.of(replace(tiny(), compute=ComputeConfig(attention=asked))).describe()


def test_odd_rows_are_too_much_for_packing_by_cudnn():
    q, k, v = (x[:, :35] for x in given("packed")[:3])
    with pytest.raises(UserError, match="even number of positions only, not 35 x 35"):
        cudnn.attend(q, k, v, Mask(PACKED[:, :35], PACKED[:, :35], causal=True))
