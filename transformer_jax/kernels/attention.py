"""Scaled dot-product attention: one description of the mask, and the backends that honour it.

Letters as in `nn/attention.py`: q_BTNH, k_BSKH, v_BSKH with N = K G (grouped queries, Ainslie 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_segments_BS", "q_segments_BT", "q_positions_BT"],
    meta_fields=["causal"],
)
@dataclass(frozen=True)
class Mask:
    """Who may see whom, as structure instead of a [T, S] matrix, so that every backend can honour it.

    Segment 0 is padding and is never seen. With query segments, a query sees keys of its own segment only.
    Causal: a query at position t sees keys 0 ... t; positions are 0 ... T-1 unless given (decoding with a cache).
    """

    kv_segments_BS: jax.Array | None = None
    q_segments_BT: jax.Array | None = None
    q_positions_BT: jax.Array | None = None
    causal: bool = False

    def visible(self, t: int, s: int) -> jax.Array | None:
        """Return the mask as booleans that broadcast to [B, T, S], or None if everything is visible."""
        seen = None
        if self.kv_segments_BS is not None:
            kv_B1S = self.kv_segments_BS[:, None, :]
            seen = kv_B1S != 0
            if self.q_segments_BT is not None:
                seen &= self.q_segments_BT[:, :, None] == kv_B1S
        if self.causal:
            positions = jnp.arange(t)[None] if self.q_positions_BT is None else self.q_positions_BT
            past = positions[:, :, None] >= jnp.arange(s)
            seen = past if seen is None else seen & past
        return seen


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, backend: str = "auto"
) -> tuple[jax.Array, jax.Array | None]:
    """Attend: softmax(q k / sqrt(H)) v, softmax in float32 (Vaswani 2017, section 3.2.1).

    Returns:
        The output [B, T, N, H], and the weights [B, N, T, S] where the backend forms them (XLA drops them if unused).

    Raises:
        ValueError: the backend is unknown.
    """
    return BACKENDS[chosen(backend)](q_BTNH, k_BSKH, v_BSKH, mask)


def chosen(backend: str) -> str:
    """Name the backend that serves a wish; "auto" takes the fastest that can.

    Raises:
        ValueError: there is no such backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    return "xla" if backend == "auto" else backend


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h) * h**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.visible(t, s)
    if visible is not None:
        # Finite, so that a row that sees nothing (padding) stays finite too.
        scores_BKGTS = jnp.where(visible[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(b, t, n, h), weights_BKGTS.reshape(b, n, t, s)


BACKENDS = {"xla": _xla}
