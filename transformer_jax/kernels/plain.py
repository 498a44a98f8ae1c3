"""Plain attention: the weights as one array; the only backend that hands them out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer_jax.kernels.mask import Mask


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, dropout: float, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Attend with memory in T S: the output [B, T, N, H] and the weights [B, N, T, S]."""
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
