"""The block that every Transformer of this library repeats: attention and feed-forward, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.nn.attention import Attention, Cache, KeysValues
from transformer_jax.nn.layers import NORMS, FeedForward, Init, Residual, split, xavier_uniform
from transformer_jax.nn.moe import DENSE, Experts, ExpertsConfig

Weights = dict[str, jax.Array | None]
"""Attention weights [B, N, T, S] of one block, "self" and "cross", where the backend forms them.

With experts also "routing", what is summed of it (`nn/moe.py`).
"""


@dataclass(frozen=True)
class BlockConfig:
    """What a block is made of; every family's own configuration translates itself into this."""

    width: int
    heads: int
    feedforward: int
    kv_heads: int = 0
    """0: as many as heads."""
    head_size: int = 0
    """0: width / heads."""
    activation: str = "relu"
    gated: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    pre_norm: bool = False
    attention_bias: bool = True
    feedforward_bias: bool = True
    dropout: float = 0.0
    """On the output of each sublayer."""
    attention_dropout: float = 0.0
    """On the attention weights."""
    rope_theta: float = 0.0
    """Base of the rotary angles; 0: no rotation."""
    qk_norm: bool = False
    base_width: int = 0
    """muP (Yang 2022): the width that rates were tuned at; 0: standard parametrisation."""
    init: Init = xavier_uniform
    residual_init: Init = xavier_uniform
    """Of the matrices whose output is added to the stream."""
    experts: ExpertsConfig = DENSE
    """In place of the one feed-forward layer."""

    @property
    def kv(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.head_size or self.width // self.heads

    @property
    def width_multiplier(self) -> float:
        """Width over base width; 1 without one."""
        return self.width / self.base_width if self.base_width else 1.0

    @property
    def query_scale(self) -> float:
        """What muP multiplies queries by: scores of q k 8 / H, which are the usual q k / sqrt(H) for heads of 64."""
        return (64 / self.size) ** 0.5 if self.base_width else 1.0

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        if self.base_width < 0:
            raise UserError(f"model.base_width must not be negative, got {self.base_width}; 0 switches muP off.")
        for name in ("width", "heads", "feedforward"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if not self.head_size and self.width % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.width={self.width}.")
        if self.heads % self.kv:
            raise UserError(f"model.kv_heads={self.kv} does not divide model.heads={self.heads}.")
        if self.rope_theta and self.size % 2:
            raise UserError(f"RoPE turns pairs of channels, but a head has {self.size} of them.")
        self.experts.check()
        if self.experts.count and self.base_width:
            raise UserError("model.base_width: the rates of muP are not known for a router; set model.experts.count 0.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} must lie in [0, 1), got {getattr(self, name)}.")

    def forward_flops(self, t: int, s: int = 0, *, causal: bool, window: int = 0) -> int:
        """FLOPs of the matrix products of one block that reads `t` positions, and a memory of `s` if there is one.

        Two a weight and position; attention 4 N H a query and key that sees it (a causal query sees half of them). Of
        experts, those that are chosen, and the router.
        """
        heads = self.heads * self.size
        projections = 2 * self.width * (2 * heads + 2 * self.kv * self.size)
        attention = (2 if causal else 4) * heads * t * t
        if window and window < t:
            # A causal query sees `window` keys, those near the start fewer.
            seen = window * t - window * (window - 1) // 2 if causal else (2 * window - 1) * t - window * (window - 1)
            attention = 4 * heads * seen
        total = t * projections + attention
        if s:
            total += 2 * self.width * heads * 2 * t + 2 * self.width * self.kv * self.size * 2 * s + 4 * heads * t * s
        read = self.experts.chosen if self.experts.count else 1
        router = 2 * self.width * self.experts.count
        return total + t * (read * (6 if self.gated else 4) * self.width * self.feedforward + router)


class Block(nnx.Module):
    """Self-attention, attention over a memory if `cross`, feed-forward; post-LN as published in 2017, or pre-LN."""

    def __init__(self, key: jax.Array, config: BlockConfig, compute: ComputeConfig, *, cross: bool = False) -> None:
        attention, memory, feedforward = jax.random.split(key, 3)
        self.attention = _attention(attention, config, compute)
        self.attention_residual = _residual(config)
        self.cross = _attention(memory, replace(config, rope_theta=0.0), compute) if cross else None
        self.cross_residual = _residual(config) if cross else None
        self.feedforward = _feedforward(feedforward, config)
        self.feedforward_residual = _residual(config)

    def __call__(
        self,
        x_BTD: jax.Array,
        mask: Mask,
        positions_BT: jax.Array | None = None,
        memory: tuple[jax.Array, jax.Array] | None = None,
        window: int = 0,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Weights]:
        """Read a row: [B, T, D] -> the new stream, and the attention weights.

        Args:
            x_BTD: the stream.
            mask: who sees whom in the row.
            positions_BT: where each token stands, for RoPE; by default its place in the row.
            memory: what cross-attention looks at: [B, S, D], and its segments [B, S] (0 is padding).
            window: of this layer, over that of the mask; 0 leaves the mask as it is.
            key: for dropout; None is deterministic.
        """
        h_BTD = self.attention_residual.enter(x_BTD)
        seen = self.attention.keys_values(h_BTD, positions_BT)
        mask = replace(mask, window=window) if window else mask
        remembered = None
        if self.cross is not None and memory is not None:
            remembered = self.cross.keys_values(memory[0]), memory[1]
        return self._sublayers(x_BTD, h_BTD, seen, mask, positions_BT, remembered, key)

    def extend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        past: Cache,
        memory: tuple[KeysValues, jax.Array] | None = None,
        window: int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Decode: write the positions into the past, then let them look back at it; [B, T, D] -> the same.

        All positions must fit into the cache together with what they are to see.
        """
        h_BTD = self.attention_residual.enter(x_BTD)
        past = past.write(self.attention.keys_values(h_BTD, positions_BT), positions_BT)
        mask = Mask(causal=True, window=window, q_positions_BT=positions_BT, kv_positions_BS=past.positions_BS)
        return self._sublayers(x_BTD, h_BTD, past.seen, mask, positions_BT, memory, None)[0], past

    def _sublayers(
        self,
        x_BTD: jax.Array,
        h_BTD: jax.Array,
        seen: KeysValues,
        mask: Mask,
        positions_BT: jax.Array | None,
        memory: tuple[KeysValues, jax.Array] | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Weights]:
        """The sublayers, given the stream as attention reads it and everything that is looked at."""
        keys = split(key, 5)
        attended = self.attention(h_BTD, seen, mask, positions_BT, key=keys[0])
        x_BTD = self.attention_residual.leave(x_BTD, attended.out_BTD, keys[1])
        weights = {"self": attended.weights_BNTS}
        if self.cross is not None and self.cross_residual is not None and memory is not None:
            h_BTD = self.cross_residual.enter(x_BTD)
            crossed = self.cross(h_BTD, memory[0], Mask(kv_segments_BS=memory[1]), key=keys[2])
            x_BTD = self.cross_residual.leave(x_BTD, crossed.out_BTD, keys[3])
            weights["cross"] = crossed.weights_BNTS
        h_BTD = self.feedforward_residual.enter(x_BTD)
        if isinstance(self.feedforward, Experts):
            real_BT = None if mask.kv_segments_BS is None else mask.kv_segments_BS != 0  # the row sees itself
            # To be passed by for want of a place is a hazard of training, as dropout is.
            h_BTD, weights["routing"] = self.feedforward(h_BTD, real_BT, limited=key is not None)
        else:
            h_BTD = self.feedforward(h_BTD)
        return self.feedforward_residual.leave(x_BTD, h_BTD, keys[4]), weights


def _attention(key: jax.Array, config: BlockConfig, compute: ComputeConfig) -> Attention:
    return Attention(
        key,
        config.width,
        config.heads,
        kv_heads=config.kv,
        head_size=config.size,
        bias=config.attention_bias,
        backend=compute.attention,
        rope_theta=config.rope_theta,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        dropout=config.attention_dropout,
        query_scale=config.query_scale,
        init=config.init,
        residual_init=config.residual_init,
    )


def _feedforward(key: jax.Array, config: BlockConfig) -> FeedForward | Experts:
    dialect: dict[str, Any] = {
        "activation": config.activation,
        "gated": config.gated,
        "bias": config.feedforward_bias,
        "init": config.init,
        "residual_init": config.residual_init,
    }
    if config.experts.count:
        return Experts(key, config.width, config.feedforward, config.experts, **dialect)
    return FeedForward(key, config.width, config.feedforward, **dialect)


def _residual(config: BlockConfig) -> Residual:
    norm = NORMS[config.norm](config.width, config.norm_eps)
    return Residual(norm, config.dropout, pre_norm=config.pre_norm)
