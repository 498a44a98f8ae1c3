"""Who may see whom: one description for every attention backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    Segment 0 is padding, at the end of a row, and is never seen. With query segments, a query sees keys of its own
    segment only. Causal: a query at position t sees keys 0 ... t. Positions are those in the row unless given (decoding
    with a cache, rows dealt out over devices); a key at a negative position is an empty place and is never seen.

    What a query gets that sees nothing (padding) is finite, and differs by backend.
    """

    kv_segments_BS: jax.Array | None = None
    q_segments_BT: jax.Array | None = None
    q_positions_BT: jax.Array | None = None
    """[B, T], or [1, T] for all rows."""
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

    def placed(self, t: int, s: int) -> Mask:
        """Write the positions in the row out where none are given, so that the mask can be cut into blocks."""
        q_BT = jnp.arange(t)[None] if self.q_positions_BT is None else self.q_positions_BT
        kv_BS = jnp.arange(s)[None] if self.kv_positions_BS is None else self.kv_positions_BS
        return replace(self, q_positions_BT=q_BT, kv_positions_BS=kv_BS)

    def cut(self, start: int, end: int) -> Mask:
        """Return the mask of queries `start` to `end` over keys 0 to `end`, of a mask with positions."""

        def part(x: jax.Array | None, first: int) -> jax.Array | None:
            return None if x is None else x[:, first:end]

        return replace(
            self,
            kv_segments_BS=part(self.kv_segments_BS, 0),
            kv_positions_BS=part(self.kv_positions_BS, 0),
            q_segments_BT=part(self.q_segments_BT, start),
            q_positions_BT=part(self.q_positions_BT, start),
        )
