"""The leaves of every model: linear maps, embeddings, normalisation, dropout.

Each parameter is an `nnx.Param` that carries its letters ("DNH"); `module.py` checks that none is missing.
Randomness in a forward pass is `key`; `None` means deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.kernels.products import widened
from transformer_jax.sharding import constrain, mesh_at_hand

Dims = dict[str, int]
"""Named dimensions in order: {"N": 8, "H": 64}."""

Init = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]
"""(key, shape, fan in, fan out) -> initial values."""


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Uniform in +-sqrt(6 / (fan in + fan out)) (Glorot and Bengio 2010, equation 16)."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal(std: float) -> Init:
    """Normal with a standard deviation that does not depend on the shape (Radford 2018, section 4.1)."""
    return lambda key, shape, _in, _out: jax.random.normal(key, shape) * std


def truncated_normal(std: float) -> Init:
    """Normal with values beyond two standard deviations drawn anew (as BERT was initialised)."""
    return lambda key, shape, _in, _out: jax.random.truncated_normal(key, -2.0, 2.0, shape) * std


def split(key: jax.Array | None, n: int) -> list[jax.Array] | list[None]:
    """Split a key into `n`; no key stays no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of the elements and scale up the rest (Srivastava 2014); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


_LOOPED: ContextVar[bool] = ContextVar("looped", default=False)


@contextmanager
def looped() -> Iterator[None]:
    """Say that what is traced within is the body of a loop (`recomputed`)."""
    token = _LOOPED.set(True)
    try:
        yield
    finally:
        _LOOPED.reset(token)


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Let the gradient of a cheap function compute it again from what it reads.

    Else everything that it computes on the way is kept: half a dozen arrays of a GELU, each written to memory and read
    again. The body of a loop has no backward pass beside it that a compiler could merge with the forward pass; where
    there is no loop, a barrier keeps it from doing so.
    """

    @wraps(f)
    def call(*inputs: jax.Array) -> jax.Array:
        out: jax.Array = jax.checkpoint(f, prevent_cse=not _LOOPED.get())(*inputs)
        return out

    return call


def rows(x: jax.Array) -> jax.Array:
    """Merge all axes but the last, [B, T, D] -> [B T, D]; on a mesh, which divides them apart, leave x as it is.

    What is added along the stream of residuals is then what products read (`product`), and XLA's CPU compiler keeps it.
    Else it adds the whole stream up again for every reader.
    """
    return x if mesh_at_hand().size > 1 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(x: jax.Array, weight: jax.Array, axes: int = 1, **options: Any) -> jax.Array:
    """Contract the last axes of x with the first of a weight; on one device as matrices, as CPUs are fast at."""
    if mesh_at_hand().size > 1:
        return jnp.tensordot(x, weight, axes, **options)
    kept, inner = x.shape[: x.ndim - axes], math.prod(weight.shape[:axes])
    matrix = jnp.dot(x.reshape(math.prod(kept), inner), weight.reshape(inner, -1), **options)
    return matrix.reshape(*kept, *weight.shape[axes:])


def tied(integers: jax.Array, x: jax.Array) -> jax.Array:
    """Return integers as they are, but known only with x: else compilers make floats of them once, before a loop."""
    if mesh_at_hand().size > 1:  # an element of x would have to travel to all devices
        return jax.lax.optimization_barrier((integers, x))[0]
    return integers ^ jnp.isnan(x.ravel()[0]).astype(integers.dtype)  # 0 wherever the result is a number


class Linear(nnx.Module):
    """y = x W + b, from the last dimensions of x to new ones: `Linear(key, {"D": 512}, {"N": 8, "H": 64})`."""

    def __init__(
        self, key: jax.Array, inputs: Dims, outputs: Dims, *, bias: bool = True, init: Init = xavier_uniform
    ) -> None:
        shape = (*inputs.values(), *outputs.values())
        weight = init(key, shape, math.prod(inputs.values()), math.prod(outputs.values()))
        self.weight = nnx.Param(weight, letters="".join([*inputs, *outputs]))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), letters="".join(outputs)) if bias else None
        self.scale: nnx.Param[jax.Array] | None = None  # of each output, where the weight is held as int8 (weights.py)
        self.contracted = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last `len(inputs)` axes of x; computes in the dtype of x."""
        if self.scale is None:
            y = product(x, self.weight[...].astype(x.dtype), self.contracted)
        else:
            weight = tied(self.weight[...], x).astype(x.dtype)
            y = product(x, weight, self.contracted, preferred_element_type=jnp.float32)
            y = (y * self.scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors, read as rows on the way in and as the output projection on the way out (Press and Wolf 2017)."""

    def __init__(self, key: jax.Array, rows: int, width: int, *, init: Init | None = None, letters: str = "VD") -> None:
        """Draw from N(0, 1 / width) unless `init` says otherwise; "TD" is a table of positions, "ZD" of few kinds."""
        self.table = nnx.Param((init or normal(width**-0.5))(key, (rows, width), rows, width), letters=letters)
        self.scale: nnx.Param[jax.Array] | None = None  # of each row, where the table is held as int8 (weights.py)

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Look up vectors: [B, T] -> [B, T, D]."""
        if self.scale is None:
            return self.table[...].astype(dtype)[ids_BT]
        return (self.table[...][ids_BT] * self.scale[...][ids_BT][..., None]).astype(dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Score every token of the vocabulary: [B, T, D] -> float32 [B, T, V]."""
        # Left to itself, XLA lays BERT's gaps out so that on a 2 x 2 x 2 mesh their gradient comes out wrong.
        x_BTD, table = constrain(x_BTD, "BTD"), self.table[...]
        table = (table if self.scale is None else tied(table, x_BTD)).astype(x_BTD.dtype)
        logits_BTV = widened(product, x_BTD, table.T)
        return logits_BTV if self.scale is None else logits_BTV * self.scale[...]


class LayerNorm(nnx.Module):
    """Normalise the last axis to mean 0 and variance 1 in float32, then scale and shift (Ba 2016)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.scale = nnx.Param(jnp.ones((width,)), letters="D")
        self.bias = nnx.Param(jnp.zeros((width,)), letters="D")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x; the result has its dtype."""

        @recomputed
        def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            y = x.astype(jnp.float32)
            y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            return (y * scale + bias).astype(x.dtype)

        return normalised(rows(x), self.scale[...], self.bias[...]).reshape(x.shape)


class RMSNorm(nnx.Module):
    """Divide the last axis by its root mean square in float32, then scale (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5, letters: str = "D") -> None:
        self.scale = nnx.Param(jnp.ones((width,)), letters=letters)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x; the result has its dtype."""

        @recomputed
        def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
            return (y * scale).astype(x.dtype)

        return normalised(rows(x), self.scale[...]).reshape(x.shape)


Norm = LayerNorm | RMSNorm
NORMS: dict[str, type[Norm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": recomputed(partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": recomputed(partial(jax.nn.gelu, approximate=True)),
    "silu": recomputed(jax.nn.silu),
}
"""GELU exact (BERT) or by its tanh approximation (GPT): Hendrycks and Gimpel 2016. SiLU gates in SwiGLU."""


class Residual(nnx.Module):
    """The connection around a sublayer f, with dropout on its output (Vaswani 2017, sections 3.1 and 5.4).

    post-LN, as published: LayerNorm(x + dropout(f(x))). pre-LN: x + dropout(f(LayerNorm(x))).
    """

    def __init__(self, norm: Norm, dropout_rate: float, *, pre_norm: bool) -> None:
        self.norm = norm
        self.dropout_rate = dropout_rate
        self.pre_norm = pre_norm

    def enter(self, x: jax.Array) -> jax.Array:
        """Return what the sublayer reads."""
        return self.norm(x) if self.pre_norm else x

    def leave(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """Join the stream x with the sublayer's output y."""
        x = (rows(x) + rows(dropout(y, self.dropout_rate, key))).reshape(x.shape)
        return x if self.pre_norm else self.norm(x)


class FeedForward(nnx.Module):
    """Two linear maps with a nonlinearity between, the same at every position (Vaswani 2017, section 3.3).

    Gated: the nonlinearity of a third map multiplies the first (Shazeer 2020): with SiLU it is SwiGLU.
    """

    def __init__(
        self,
        key: jax.Array,
        width: int,
        hidden: int,
        *,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        init: Init = xavier_uniform,
        residual_init: Init = xavier_uniform,
    ) -> None:
        up, down, gate = jax.random.split(key, 3)
        self.up = Linear(up, {"D": width}, {"F": hidden}, bias=bias, init=init)
        self.gate = Linear(gate, {"D": width}, {"F": hidden}, bias=bias, init=init) if gated else None
        self.down = Linear(down, {"F": hidden}, {"D": width}, bias=bias, init=residual_init)
        self.activation = activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        h_BTF = constrain(self.up(x_BTD), "BTF")
        activate = ACTIVATIONS[self.activation]
        h_BTF = activate(h_BTF) if self.gate is None else activate(constrain(self.gate(x_BTD), "BTF")) * h_BTF
        return self.down(h_BTF)
