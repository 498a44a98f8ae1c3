"""Multi-head attention, and the legend of the letters.

    B batch   T query/target length   S key/source length   D model width   N query heads   K key/value heads
    G groups (N = K G)   H head size   F feed-forward width   V vocabulary   L layers   M beams   R rows (B x M)
    E experts   C places of an expert   Z few kinds: gates of a recurrent cell, sentences of a pair, choices of a token

The same letters name the axes of a layout (`sharding.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.kernels.attention import Mask, attention
from transformer_jax.nn.layers import Init, Linear, RMSNorm, xavier_uniform
from transformer_jax.nn.positions import rotary
from transformer_jax.sharding import constrain, mesh_at_hand

LANES = 128
"""Numbers that a TPU's memory has side by side; shorter rows are padded."""


class KeysValues(NamedTuple):
    """Keys and values that one attention layer looks at."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


class Cache(NamedTuple):
    """The past of one attention layer: places for keys and values, and which position each of them holds.

    Position p goes to place p mod S. So with as many places as positions nothing is lost, and with fewer the last S
    are kept, which is all that a sliding window sees. Heads come before places, as products of attention read them. On
    TPUs those that a device holds are joined, side by side (`plain.attend` tells them apart): each alone, a place of 64
    numbers would be padded to 128, and the whole cache copied into the order of the loop that writes, and back.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    """-1: empty."""

    @staticmethod
    def empty(rows: int, places: int, heads: int, size: int, dtype: jnp.dtype) -> Cache:
        """Make room for `places` positions of `rows` rows."""
        joined = _joined(heads)
        width = size if joined == 1 else -(-joined * size // LANES) * LANES
        zeros = jnp.zeros((rows, heads // joined, places, width), dtype)
        return Cache(zeros, zeros, jnp.full((rows, places), -1, jnp.int32))

    @property
    def seen(self) -> KeysValues:
        """What an attention layer looks at."""
        return KeysValues(self.k_BKSH.swapaxes(1, 2), self.v_BKSH.swapaxes(1, 2))

    def write(self, new: KeysValues, positions_BT: jax.Array) -> Cache:
        """Put new positions [B, T, K, H] in their places; those at a negative position are left out."""
        if positions_BT.size == 1:  # a scatter of one place XLA's CPU compiler does twice, each in a copy of the cache
            positions_BT = jnp.pad(positions_BT, ((0, 0), (0, 1)), constant_values=-1)
            new = KeysValues(*(jnp.pad(x_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0))) for x_BTKH in new))
        (rows, heads, places, width), length = self.k_BKSH.shape, positions_BT.shape[1]
        if new.k_BSKH.shape[2] > heads:
            new = KeysValues(*(x_BTKH.reshape(rows, length, heads, -1) for x_BTKH in new))
            short = ((0, 0), (0, 0), (0, 0), (0, width - new.k_BSKH.shape[3]))
            new = KeysValues(*(jnp.pad(x_BTKH, short) for x_BTKH in new))
        rows_B1 = jnp.arange(len(positions_BT))[:, None]
        # Of several positions that share a place, the last one stays; the others, and empty ones, go nowhere.
        last_B1 = positions_BT.max(axis=1, keepdims=True)
        kept_BT = (positions_BT >= 0) & (positions_BT > last_B1 - places)
        place_BT = jnp.where(kept_BT, positions_BT % places, places)
        return Cache(
            self.k_BKSH.at[rows_B1, :, place_BT].set(new.k_BSKH, mode="drop"),
            self.v_BKSH.at[rows_B1, :, place_BT].set(new.v_BSKH, mode="drop"),
            self.positions_BS.at[rows_B1, place_BT].set(positions_BT, mode="drop"),
        )


def _joined(heads: int) -> int:
    """Heads that a cache joins."""
    shards = mesh_at_hand().shape.get("tensor", 1)
    return heads // shards if jax.default_backend() == "tpu" and heads % shards == 0 else 1


class Attended(NamedTuple):
    """Output of an attention layer, with its weights where the backend forms them."""

    out_BTD: jax.Array
    weights_BNTS: jax.Array | None


class Attention(nnx.Module):
    """Project to heads, attend, project back (Vaswani 2017, section 3.2.2).

    Fewer key/value heads than query heads are shared by groups of them (Ainslie 2023). With `rope_theta`, queries and
    keys are rotated by their positions (Su 2021). With `qk_norm`, they are normalised by head (Henry 2020).
    """

    def __init__(
        self,
        key: jax.Array,
        width: int,
        heads: int,
        *,
        kv_heads: int,
        head_size: int,
        bias: bool,
        backend: str,
        rope_theta: float = 0.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        query_scale: float = 1.0,
        init: Init = xavier_uniform,
        residual_init: Init = xavier_uniform,
    ) -> None:
        q, k, v, out = jax.random.split(key, 4)
        self.q = Linear(q, {"D": width}, {"N": heads, "H": head_size}, bias=bias, init=init)
        self.k = Linear(k, {"D": width}, {"K": kv_heads, "H": head_size}, bias=bias, init=init)
        self.v = Linear(v, {"D": width}, {"K": kv_heads, "H": head_size}, bias=bias, init=init)
        self.out = Linear(out, {"N": heads, "H": head_size}, {"D": width}, bias=bias, init=residual_init)
        self.q_norm = RMSNorm(head_size, norm_eps, letters="H") if qk_norm else None
        self.k_norm = RMSNorm(head_size, norm_eps, letters="H") if qk_norm else None
        self.kv_heads = kv_heads
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.query_scale = query_scale
        self.backend = backend

    def keys_values(self, x_BSD: jax.Array, positions_BS: jax.Array | None = None) -> KeysValues:
        """Project what is looked at: [B, S, D] -> two of [B, S, K, H]; positions matter to RoPE only."""
        k_BSKH = self._place(constrain(self.k(x_BSD), "BSKH"), self.k_norm, positions_BS)
        return KeysValues(k_BSKH, constrain(self.v(x_BSD), "BSKH"))

    def __call__(
        self,
        x_BTD: jax.Array,
        seen: KeysValues,
        mask: Mask,
        positions_BT: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Attended:
        """Let x look at keys and values: [B, T, D] -> [B, T, D]."""
        q_BTNH = self._place(constrain(self.q(x_BTD), "BTNH"), self.q_norm, positions_BT)
        q_BTNH = q_BTNH if self.query_scale == 1.0 else q_BTNH * self.query_scale
        joined = self.kv_heads // seen.k_BSKH.shape[2]
        out_BTNH, weights_BNTS = attention(
            q_BTNH, *seen, mask, dropout=self.dropout, key=key, backend=self.backend, joined=joined
        )
        return Attended(self.out(constrain(out_BTNH, "BTNH")), weights_BNTS)

    def _place(self, x_BTNH: jax.Array, norm: RMSNorm | None, positions_BT: jax.Array | None) -> jax.Array:
        x_BTNH = x_BTNH if norm is None else norm(x_BTNH)
        if not self.rope_theta:
            return x_BTNH
        if positions_BT is None:
            positions_BT = jnp.arange(x_BTNH.shape[1])[None]
        return rotary(x_BTNH, positions_BT, self.rope_theta)
