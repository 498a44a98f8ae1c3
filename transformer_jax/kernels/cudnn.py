"""Flash attention of cuDNN, through JAX's public function: NVIDIA GPUs, 16-bit, without dropout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp

from transformer_jax.errors import UserError
from transformer_jax.kernels.demand import Demand
from transformer_jax.kernels.mask import Mask

LARGEST_HEAD = 128
"""Channels of a head up to which every GPU since Ampere is served."""


def refuses(demand: Demand) -> str:
    """Say why this backend cannot serve; "" if it can."""
    if demand.platform != "gpu":
        return f"needs an NVIDIA GPU, and this runs on {demand.platform}"
    if demand.dtype != "bfloat16":
        return f"computes in 16 bits, and compute.dtype is {demand.dtype}"
    if demand.dropout:
        return f"has no dropout on attention weights, and the model asks for {demand.dropout}"
    if demand.head_size % 8 or demand.head_size > LARGEST_HEAD:
        return f"serves heads of 8, 16, ... {LARGEST_HEAD} channels, not of {demand.head_size}"
    return ""


@cache
def installed() -> bool:
    """Tell whether JAX finds cuDNN here, without which it does not even trace this attention."""
    x_BTNH = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), x_BTNH, x_BTNH, x_BTNH)
    except RuntimeError:
        return False
    return True


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """Attend: the output [B, T, N, H].

    Padding and causality cost nothing: cuDNN takes the lengths of the rows. Documents packed into a row, and windows
    that look ahead, have to be given as an array [B, 1, T, S]; beside it causality still leaves out half of the work.
    """
    b, t = q_BTNH.shape[:2]
    s = k_BSKH.shape[1]
    if mask.q_segments_BT is not None or (mask.window and not mask.causal):
        if t % 2 or s % 2:
            raise UserError(
                f"compute.attention=cudnn serves packed rows of an even number of positions only, not {t} x {s}; pad "
                "them, or set compute.attention=blockwise."
            )
        visible = replace(mask, causal=False).visible(t, s)
        assert visible is not None
        visible = jnp.broadcast_to(visible, (b, t, s))[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=visible, is_causal=mask.causal, implementation="cudnn"
        )
    lengths = None
    if mask.kv_segments_BS is not None:
        # A row of padding alone looks at its first place: with no key at all there is no softmax.
        lengths = jnp.maximum((mask.kv_segments_BS != 0).sum(-1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=mask.causal,
        key_value_seq_lengths=lengths,
        local_window_size=(mask.window - 1, 0) if mask.window else None,
        implementation="cudnn",
    )
