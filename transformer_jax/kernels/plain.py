"""Plain attention: the weights as one array; the only backend that hands them out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.kernels.mask import Mask
from transformer_jax.kernels.products import widened

PIECE, PIECES = 128, 4
"""Least positions of a piece of a causal row, and most pieces: to n of them goes a share (n + 1) / 2n of all scores."""


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    dropout: float,
    key: jax.Array | None,
    joined: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Attend with memory in T S: the output [B, T, N, H] and the weights [B, N, T, S].

    A causal row that looks at itself is cut into pieces of queries, and each looks at no later keys than its own. Each
    of the keys and values may hold several heads side by side, and fill: `joined` of them (`nn.attention.Cache`).
    """
    t, s, scale = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[-1] ** -0.5
    if joined > 1:
        return _attend_joined(q_BTNH, k_BSKH, v_BSKH, mask, dropout, key, joined)
    square = mask.causal and t == s and mask.q_positions_BT is None and mask.kv_positions_BS is None
    pieces = min(t // PIECE, PIECES) if square else 1
    if pieces < 2:
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, dropout, key, scale)
    outs, weights, mask = [], [], mask.placed(t, s)
    for piece in range(pieces):
        start, end = t * piece // pieces, t * (piece + 1) // pieces
        own = None if key is None else jax.random.fold_in(key, piece)
        out_BTNH, weights_BNTS = _attend(
            q_BTNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end], mask.cut(start, end), dropout, own, scale
        )
        outs.append(out_BTNH)
        weights.append(jnp.pad(weights_BNTS, ((0, 0), (0, 0), (0, 0), (0, s - end))))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(weights, axis=2)


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    dropout: float,
    key: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    # Heads before positions, once: every product and its gradients then read rows as they lie.
    q_BKGTH = (q_BTNH * scale).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKGTS = widened(_scores, q_BKGTH, k_BKSH)
    scores_BNTS = scores_BKGTS.reshape(b, n, t, s)
    visible = mask.visible(t, s)
    if visible is not None:
        # In float32 such a sum is -1e30 whatever the score: finite, so that what sees nothing (padding) is finite too.
        scores_BNTS += jnp.where(visible, 0.0, -1e30)[:, None]
    weights_BNTS = softmax(scores_BNTS, v_BSKH.dtype)
    kept_BNTS = weights_BNTS
    if key is not None and dropout:
        keep_BNTS = jax.random.bernoulli(key, 1.0 - dropout, weights_BNTS.shape)
        kept_BNTS = jnp.where(keep_BNTS, weights_BNTS / (1.0 - dropout), 0.0)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", kept_BNTS.reshape(scores_BKGTS.shape), v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h), weights_BNTS


def _attend_joined(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    dropout: float,
    key: jax.Array | None,
    joined: int,
) -> tuple[jax.Array, jax.Array]:
    """Attend to heads that lie side by side: a query is zero but at its own, and takes its part of what comes back.

    That multiplies `joined` times as much, and moves nothing: few queries of a large cache wait for memory.
    """
    b, t, n, h = q_BTNH.shape
    head_N = jnp.arange(n) * (k_BSKH.shape[2] * joined) // n
    own_NZ1 = jax.nn.one_hot(head_N % joined, joined, dtype=q_BTNH.dtype)[..., None]
    wide_BTNH = (q_BTNH[:, :, :, None] * own_NZ1).reshape(b, t, n, joined * h)
    fill = ((0, 0), (0, 0), (0, 0), (0, k_BSKH.shape[-1] - joined * h))
    out_BTNH, weights_BNTS = _attend(jnp.pad(wide_BTNH, fill), k_BSKH, v_BSKH, mask, dropout, key, h**-0.5)
    return (out_BTNH[..., : joined * h].reshape(b, t, n, joined, h) * own_NZ1).sum(3), weights_BNTS


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, **options: Any) -> jax.Array:
    return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, **options)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Take the softmax over the last axis, rounded to `dtype`; its gradient reads, and so keeps, the result only."""
    return jax.nn.softmax(x, axis=-1).astype(dtype)


def _softmax(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    y = softmax(x, dtype)
    return y, y


def _softmax_gradient(_dtype: jnp.dtype, y: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    y, dy = y.astype(jnp.float32), dy.astype(jnp.float32)
    return (y * (dy - (y * dy).sum(-1, keepdims=True)),)


softmax.defvjp(_softmax, _softmax_gradient)
