"""Where a token stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinusoidal(positions_BT: jax.Array, width: int) -> jax.Array:
    """Position vectors with sines on even and cosines on odd channels (Vaswani 2017, section 3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i / width)), PE(pos, 2i + 1) = cos of the same: [B, T] -> float32 [B, T, D].
    """
    rates = jnp.power(10_000.0, -jnp.arange(0, width, 2) / width)
    angles = positions_BT[..., None].astype(jnp.float32) * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BT.shape, width)
