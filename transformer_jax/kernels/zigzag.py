"""The order of positions in which causal attention gives every device of a ring the same work.

Of n devices, device i holds parts i and 2n - 1 - i of 2n: an early one, which few look back from, and a late one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.kernels.mask import Mask
from transformer_jax.sharding import CONTEXT, mesh_at_hand, spec


def balanced(
    stack: Callable[..., tuple[jax.Array, Any]],
    x_BTD: jax.Array,
    mask: Mask,
    positions_BT: jax.Array | None,
    *inputs: Any,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Run causal layers, `stack(x_BTD, mask, positions_BT, *inputs, key=key)`, in an order that balances the work.

    They return the stream, and what they tell beside it. Without a mesh that divides positions, or if they do not
    divide evenly, in their own order.
    """
    zigzag = Zigzag(mesh_at_hand().shape.get(CONTEXT, 1))
    length = x_BTD.shape[1]
    if zigzag.devices == 1 or length % (2 * zigzag.devices):
        return stack(x_BTD, mask, positions_BT, *inputs, key=key)
    order_T = zigzag.order(length)

    def moved(x_BT: jax.Array | None) -> jax.Array | None:
        return None if x_BT is None else x_BT[:, order_T]

    if positions_BT is None:
        positions_BT = jnp.arange(length)[None]
    mask = replace(
        mask,
        q_segments_BT=moved(mask.q_segments_BT),
        kv_segments_BS=moved(mask.kv_segments_BS),
        q_positions_BT=jnp.asarray(order_T)[None],
        kv_positions_BS=jnp.asarray(order_T)[None],
    )
    x_BTD, told = stack(zigzag.enter(x_BTD), mask, moved(positions_BT), *inputs, key=key)
    return zigzag.leave(x_BTD), told


@dataclass(frozen=True)
class Zigzag:
    """The order for so many devices."""

    devices: int

    def order(self, length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return which position stands where: [T]."""
        parts = np.arange(length, dtype=np.int32).reshape(2 * self.devices, -1)
        return np.concatenate([parts[[i, -1 - i]].reshape(-1) for i in range(self.devices)])

    def enter(self, x_BTD: jax.Array) -> jax.Array:
        """Move parts to their devices, half of each device's share at a time: [B, T, D] in order -> in zigzag."""
        return self._exchanged(x_BTD, self._enter)

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        """Undo `enter`."""
        return self._exchanged(x_BTD, self._leave)

    def _exchanged(self, x_BTD: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
        moved: jax.Array = jax.shard_map(local, in_specs=spec("BTD"), out_specs=spec("BTD"), check_vma=False)(x_BTD)
        return moved

    def _owner(self, part: int) -> int:
        return min(part, 2 * self.devices - 1 - part)

    # In order, device i holds parts 2i and 2i + 1. Parts of even number go to the first place on even devices and to
    # the second on odd ones, since 2n - 1 - part is then odd; so both moves are permutations of the devices.

    def _enter(self, x_BTD: jax.Array) -> jax.Array:
        even, odd = (
            jax.lax.ppermute(x, CONTEXT, [(i, self._owner(2 * i + r)) for i in range(self.devices)])
            for r, x in enumerate(jnp.split(x_BTD, 2, axis=1))
        )
        first = jax.lax.axis_index(CONTEXT) % 2 == 0
        return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis=1)

    def _leave(self, x_BTD: jax.Array) -> jax.Array:
        early, late = jnp.split(x_BTD, 2, axis=1)
        first = jax.lax.axis_index(CONTEXT) % 2 == 0
        parts = jnp.where(first, early, late), jnp.where(first, late, early)
        home = [
            jax.lax.ppermute(x, CONTEXT, [(self._owner(2 * i + r), i) for i in range(self.devices)])
            for r, x in enumerate(parts)
        ]
        return jnp.concatenate(home, axis=1)
