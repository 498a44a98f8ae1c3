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


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotate pairs of channels by angles that grow with the position (RoPE; Su 2021, section 3.2.2).

    Channel i is paired with i + H / 2, as Llama's published weights have it; pair i turns by pos theta^(-2i / H).
    """
    half = x_BTNH.shape[-1] // 2
    rates = jnp.power(theta, -jnp.arange(half) / half)
    angles_BT1H = positions_BT[..., None, None].astype(jnp.float32) * rates
    sin, cos = jnp.sin(angles_BT1H), jnp.cos(angles_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
