"""Multi-head attention, and the legend of the letters.

    B batch   T query/target length   S key/source length   D model width   N query heads   K key/value heads
    G groups (N = K G)   H head size   F feed-forward width   V vocabulary   L layers   M beams   R rows (B x M)
    Z gates of a recurrent cell

The same letters name the axes of a layout (`sharding.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.kernels.attention import Mask, attention
from transformer_jax.nn.layers import Linear
from transformer_jax.sharding import constrain


class KeysValues(NamedTuple):
    """Keys and values of one attention layer: of the memory, or of the past (the cache)."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def write(self, new: KeysValues, position_B: jax.Array) -> KeysValues:
        """Put one new position [B, 1, K, H] into each row at its own place."""
        rows = jnp.arange(len(position_B))
        return KeysValues(*(old.at[rows, position_B].set(x[:, 0]) for old, x in zip(self, new, strict=True)))


class Attended(NamedTuple):
    """Output of an attention layer, with its weights where the backend forms them."""

    out_BTD: jax.Array
    weights_BNTS: jax.Array | None


class Attention(nnx.Module):
    """Project to heads, attend, project back (Vaswani 2017, section 3.2.2)."""

    def __init__(self, key: jax.Array, width: int, heads: int, *, bias: bool, backend: str) -> None:
        q, k, v, out = jax.random.split(key, 4)
        size = width // heads
        self.q = Linear(q, {"D": width}, {"N": heads, "H": size}, bias=bias)
        self.k = Linear(k, {"D": width}, {"K": heads, "H": size}, bias=bias)
        self.v = Linear(v, {"D": width}, {"K": heads, "H": size}, bias=bias)
        self.out = Linear(out, {"N": heads, "H": size}, {"D": width}, bias=bias)
        self.backend = backend

    def keys_values(self, x_BSD: jax.Array) -> KeysValues:
        """Project what is looked at: [B, S, D] -> two of [B, S, K, H]."""
        return KeysValues(constrain(self.k(x_BSD), "BSKH"), constrain(self.v(x_BSD), "BSKH"))

    def __call__(self, x_BTD: jax.Array, seen: KeysValues, mask: Mask) -> Attended:
        """Let x look at keys and values: [B, T, D] -> [B, T, D]."""
        q_BTNH = constrain(self.q(x_BTD), "BTNH")
        out_BTNH, weights_BNTS = attention(q_BTNH, *seen, mask, backend=self.backend)
        return Attended(self.out(constrain(out_BTNH, "BTNH")), weights_BNTS)
