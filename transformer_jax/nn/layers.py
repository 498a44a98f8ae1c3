"""The leaves of every model: linear maps, embeddings, normalisation, dropout.

Each parameter is an `nnx.Param` that carries its letters ("DNH"); `module.py` checks that none is missing.
Randomness in a forward pass is `key`; `None` means deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.sharding import constrain

Dims = dict[str, int]
"""Named dimensions in order: {"N": 8, "H": 64}."""

Init = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]
"""(key, shape, fan in, fan out) -> initial values."""


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Uniform in +-sqrt(6 / (fan in + fan out)) (Glorot and Bengio 2010, equation 16)."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def split(key: jax.Array | None, n: int) -> list[jax.Array] | list[None]:
    """Split a key into `n`; no key stays no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of the elements and scale up the rest (Srivastava 2014); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Linear(nnx.Module):
    """y = x W + b, from the last dimensions of x to new ones: `Linear(key, {"D": 512}, {"N": 8, "H": 64})`."""

    def __init__(
        self, key: jax.Array, inputs: Dims, outputs: Dims, *, bias: bool = True, init: Init = xavier_uniform
    ) -> None:
        shape = (*inputs.values(), *outputs.values())
        weight = init(key, shape, math.prod(inputs.values()), math.prod(outputs.values()))
        self.weight = nnx.Param(weight, letters="".join([*inputs, *outputs]))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), letters="".join(outputs)) if bias else None
        self.contracted = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last `len(inputs)` axes of x; computes in the dtype of x."""
        y = jnp.tensordot(x, self.weight[...].astype(x.dtype), axes=self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors, read as rows on the way in and as the output projection on the way out (Press and Wolf 2017)."""

    def __init__(self, key: jax.Array, vocab_size: int, width: int) -> None:
        self.table = nnx.Param(jax.random.normal(key, (vocab_size, width)) * width**-0.5, letters="VD")

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Look up vectors: [B, T] -> [B, T, D]."""
        return self.table[...].astype(dtype)[ids_BT]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Score every token of the vocabulary: [B, T, D] -> float32 [B, T, V]."""
        table = self.table[...].astype(x_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BTD, table, preferred_element_type=jnp.float32)


class LayerNorm(nnx.Module):
    """Normalise the last axis to mean 0 and variance 1 in float32, then scale and shift (Ba 2016)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.scale = nnx.Param(jnp.ones((width,)), letters="D")
        self.bias = nnx.Param(jnp.zeros((width,)), letters="D")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x; the result has its dtype."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Residual(nnx.Module):
    """The connection around a sublayer f, with dropout on its output (Vaswani 2017, sections 3.1 and 5.4).

    post-LN, as published: LayerNorm(x + dropout(f(x))). pre-LN: x + dropout(f(LayerNorm(x))).
    """

    def __init__(self, width: int, dropout_rate: float, *, pre_norm: bool) -> None:
        self.norm = LayerNorm(width)
        self.dropout_rate = dropout_rate
        self.pre_norm = pre_norm

    def enter(self, x: jax.Array) -> jax.Array:
        """Return what the sublayer reads."""
        return self.norm(x) if self.pre_norm else x

    def leave(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """Join the stream x with the sublayer's output y."""
        x = x + dropout(y, self.dropout_rate, key)
        return x if self.pre_norm else self.norm(x)


class FeedForward(nnx.Module):
    """Two linear maps with a ReLU between, the same at every position (Vaswani 2017, section 3.3)."""

    def __init__(self, key: jax.Array, width: int, hidden: int) -> None:
        up, down = jax.random.split(key)
        self.up = Linear(up, {"D": width}, {"F": hidden})
        self.down = Linear(down, {"F": hidden}, {"D": width})

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.down(jax.nn.relu(constrain(self.up(x_BTD), "BTF")))
