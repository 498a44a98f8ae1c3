"""Splash attention, the Pallas kernel for TPUs that JAX ships: blocks in which nobody sees anybody are left out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas

from transformer_jax.kernels.demand import Demand
from transformer_jax.kernels.mask import Mask

LANES = 128
"""Elements of the last dimension of a TPU's tile. Rows come in multiples of so many positions; they are padded."""

BLOCK = 512
"""Queries, and keys, of a block at most."""


def refuses(demand: Demand) -> str:
    """Say why this backend cannot serve; "" if it can."""
    if demand.platform != "tpu":
        return f"needs a TPU, and this runs on {demand.platform}"
    if demand.dropout:
        return f"has no dropout on attention weights, and the model asks for {demand.dropout}"
    return ""


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, interpret: bool = False
) -> jax.Array:
    """Attend: the output [B, T, N, H].

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: without positions.
        interpret: run the kernel step by step, anywhere, to check it.
    """
    t, n, h = q_BTNH.shape[1:]
    s = k_BSKH.shape[1]
    places_t, places_s = _places(t), _places(s)
    if mask.causal or mask.window:
        places_t = places_s = max(places_t, places_s)  # so that every query, padding too, meets some key
    segments_BT, segments_BS = mask.q_segments_BT, mask.kv_segments_BS
    if segments_BS is None and places_s > s:
        segments_BS = jnp.ones((len(k_BSKH), s), jnp.int32)
    ids = None
    if segments_BS is not None:
        # Equal ids see each other: without segments of the queries, all real places have one.
        if segments_BT is None:
            segments_BT, segments_BS = jnp.ones((len(q_BTNH), t), jnp.int32), (segments_BS != 0).astype(jnp.int32)
        ids = pallas.SegmentIds(_padded(segments_BT, places_t), _padded(segments_BS, places_s))
    kernel = _kernel(n, h, places_t, places_s, mask.causal, mask.window, interpret)
    q, k, v = (
        _padded(x, places).swapaxes(1, 2)
        for x, places in ((q_BTNH * h**-0.5, places_t), (k_BSKH, places_s), (v_BSKH, places_s))
    )
    out_BNTH: jax.Array = jax.vmap(kernel)(q, k, v, ids)
    return out_BNTH.swapaxes(1, 2)[:, :t]


def _kernel(heads: int, size: int, t: int, s: int, causal: bool, window: int, interpret: bool) -> Any:
    seen: Any = pallas.CausalMask((t, s)) if causal else pallas.FullMask((t, s))
    if window:
        seen = pallas.LocalMask((t, s), (window - 1, 0 if causal else window - 1), 0)
    q, kv = _block(t), _block(s)
    # With channels last, heads of 64 would be filled up to 128 lanes, also where remat saves them; positions fill them.
    layout = pallas.QKVLayout.SEQ_MINOR if size % LANES else pallas.QKVLayout.HEAD_DIM_MINOR
    sizes = pallas.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    masks = pallas.MultiHeadMask([seen] * heads)
    return pallas.make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _places(length: int) -> int:
    size = LANES if length <= BLOCK else BLOCK // 2
    return -(-length // size) * size


def _block(places: int) -> int:
    return places if places <= BLOCK else BLOCK if places % BLOCK == 0 else BLOCK // 2


def _padded(x: jax.Array, places: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, places - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
