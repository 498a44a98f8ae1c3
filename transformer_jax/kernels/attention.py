"""Scaled dot-product attention: one description of the mask, and the backends that honour it.

Letters as in `nn/attention.py`: q_BTNH, k_BSKH, v_BSKH with N = K G (grouped queries, Ainslie 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_segments_BS", "q_segments_BT", "q_positions_BT", "kv_positions_BS"],
    meta_fields=["causal", "window"],
)
@dataclass(frozen=True)
class Mask:
    """Who may see whom, as structure instead of a [T, S] matrix, so that every backend can honour it.

    Segment 0 is padding and is never seen. With query segments, a query sees keys of its own segment only.
    Causal: a query at position t sees keys 0 ... t. Positions are those in the row unless given (decoding with a
    cache); a key at a negative position is an empty place and is never seen.
    """

    kv_segments_BS: jax.Array | None = None
    q_segments_BT: jax.Array | None = None
    q_positions_BT: jax.Array | None = None
    kv_positions_BS: jax.Array | None = None
    causal: bool = False
    window: int = 0
    """How many positions back a query sees, its own included (and as many ahead, unless causal); 0 sees all."""

    def visible(self, t: int, s: int) -> jax.Array | None:
        """Return the mask as booleans that broadcast to [B, T, S], or None if everything is visible."""
        parts = []
        if self.kv_segments_BS is not None:
            kv_B1S = self.kv_segments_BS[:, None, :]
            parts.append(kv_B1S != 0)
            if self.q_segments_BT is not None:
                parts.append(self.q_segments_BT[:, :, None] == kv_B1S)
        if self.kv_positions_BS is not None:
            parts.append(self.kv_positions_BS[:, None, :] >= 0)
        if self.causal or self.window:
            q_BT = jnp.arange(t)[None] if self.q_positions_BT is None else self.q_positions_BT
            kv_BS = jnp.arange(s)[None] if self.kv_positions_BS is None else self.kv_positions_BS
            distance_BTS = q_BT[:, :, None] - kv_BS[:, None, :]
            if self.causal:
                parts.append(distance_BTS >= 0)
            if self.window:
                parts.append(jnp.abs(distance_BTS) < self.window)
        return reduce(jnp.logical_and, parts) if parts else None


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array | None]:
    """Attend: softmax(q k / sqrt(H)) v, softmax in float32 (Vaswani 2017, section 3.2.1).

    With a key, a share `dropout` of the weights is zeroed and the rest scaled up (as in BERT and GPT).

    Returns:
        The output [B, T, N, H], and the weights [B, N, T, S] where the backend forms them (XLA drops them if unused).

    Raises:
        ValueError: the backend is unknown.
    """
    return BACKENDS[chosen(backend)](q_BTNH, k_BSKH, v_BSKH, mask, dropout, key)


def chosen(backend: str) -> str:
    """Name the backend that serves a wish; "auto" takes the fastest that can.

    Raises:
        ValueError: there is no such backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    return "xla" if backend == "auto" else backend


def _xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, dropout: float, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h) * h**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.visible(t, s)
    if visible is not None:
        # Finite, so that a row that sees nothing (padding) stays finite too.
        scores_BKGTS = jnp.where(visible[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    kept_BKGTS = weights_BKGTS
    if key is not None and dropout:
        keep_BKGTS = jax.random.bernoulli(key, 1.0 - dropout, weights_BKGTS.shape)
        kept_BKGTS = jnp.where(keep_BKGTS, weights_BKGTS / (1.0 - dropout), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", kept_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(b, t, n, h), weights_BKGTS.reshape(b, n, t, s)


BACKENDS = {"xla": _xla}
