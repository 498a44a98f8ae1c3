"""A stack of causal blocks that reads vectors, wherever they come from; `gpt.py` puts a table of tokens before it."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.kernels.zigzag import balanced
from transformer_jax.nn.block import Block, BlockConfig
from transformer_jax.nn.layers import NORMS, Embedding, dropout, normal, split
from transformer_jax.nn.stack import Stack
from transformer_jax.sharding import constrain


@dataclass(frozen=True)
class DecoderConfig(ModelConfig, abc.ABC):
    """Sizes and dialect; the defaults are GPT-2's smallest (Radford 2019)."""

    vocab_size: int = 0
    """0: what it reads is no tokens."""
    context: int = 1024
    """Most positions that are read at once."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 0
    """Key/value heads (grouped queries); 0: as many as heads."""
    head_size: int = 0
    """Channels of a head; 0: width / heads."""
    feedforward: int = 0
    """0: 4 x width."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu_tanh"
    gated: bool = False
    """Gated feed-forward; with silu it is SwiGLU."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    """Norm before each sublayer, and one at the end (GPT-2); False: after each (GPT-1)."""
    bias: bool = True
    """Biases in all linear maps."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, by head."""
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    windows: tuple[int, ...] = ()
    """Positions back that a layer sees, by layer, repeated in order; 0 is all. (0, 256) alternates dense and banded."""
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer."""
    init_std: float = 0.02
    scaled_residual: bool = True
    """Initialise what is added to the stream smaller by sqrt(2 layers) (Radford 2019, section 2.3)."""
    base_width: int = 0
    """muP (Yang 2022): the width that the learning rate was tuned at, which then suits this one; 0: standard."""

    @property
    def width_multiplier(self) -> float:
        """Width over base width; 1 without one."""
        return self.block.width_multiplier

    @property
    def block(self) -> BlockConfig:
        """What is repeated."""
        hidden_std = self.init_std * (self.base_width / self.width if self.base_width else 1.0) ** 0.5
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            feedforward=self.feedforward or 4 * self.width,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            activation=self.activation,
            gated=self.gated,
            norm=self.norm,
            norm_eps=self.norm_eps,
            pre_norm=self.pre_norm,
            attention_bias=self.bias,
            feedforward_bias=self.bias,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            rope_theta=self.rope_theta if self.positions == "rope" else 0.0,
            qk_norm=self.qk_norm,
            base_width=self.base_width,
            init=normal(hidden_std),
            residual_init=normal(hidden_std / ((2 * self.layers) ** 0.5 if self.scaled_residual else 1.0)),
        )

    def window(self, layer: int) -> int:
        """Positions that a layer sees; 0 is all."""
        return self.windows[layer % len(self.windows)] if self.windows else 0

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        for name in ("context", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if any(window < 0 for window in self.windows):
            raise UserError(f"model.windows must not be negative, got {self.windows}; 0 sees everything.")
        self.block.check()

    def block_flops(self, length: int) -> int:
        """FLOPs of the matrix products of all blocks over a row of `length` positions."""
        return sum(self.block.forward_flops(length, causal=True, window=self.window(i)) for i in range(self.layers))


class Decoder(nnx.Module):
    """Causal blocks over embedded inputs: of tokens, of vectors, or of both one after the other."""

    def __init__(self, positions: jax.Array, blocks: jax.Array, config: DecoderConfig, compute: ComputeConfig) -> None:
        """Draw positions and blocks by the two keys."""
        self.dtype = jnp.dtype(compute.dtype)
        self.dropout = config.dropout
        init = normal(config.init_std)
        learned = config.positions == "learned"
        self.positions = (
            Embedding(positions, config.context, config.width, init=init, letters="TD") if learned else None
        )
        static = [{"window": window} for window in config.windows] or [{}]
        self.decoder = Stack(blocks, lambda k: Block(k, config.block, compute), config.layers, compute, static)
        self.norm = NORMS[config.norm](config.width, config.norm_eps) if config.pre_norm else None

    def decode(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        apart: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Read embedded rows: [B, T, D] -> [B, T, D], normalised; segments keep documents apart (0 is padding).

        Unless `apart`, a row is one text, and segments only tell padding: flash attention is faster so. With experts
        also what each layer sums of its routing: [L, X], as `nn.moe.SUMS` names it.
        """
        place_key, stack_key = split(key, 2)
        x_BTD = self.placed(x_BTD, positions_BT, place_key)
        mask = Mask(segments_BT, segments_BT if apart else None, causal=True)
        x_BTD, sums_LX = balanced(self.decoder.routed, x_BTD, mask, positions_BT, key=stack_key)
        return self.normed(x_BTD), sums_LX

    def placed(self, x_BTD: jax.Array, positions_BT: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """Add where each stands (without `positions_BT`: from 0 on): what the first block reads."""
        if self.positions is not None:
            if positions_BT is None:
                positions_BT = jnp.arange(x_BTD.shape[1])[None]
            x_BTD += self.positions(positions_BT, self.dtype)
        return dropout(constrain(x_BTD, "BTD"), self.dropout, key)

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the norm behind the last block, if there is one."""
        return x_BTD if self.norm is None else self.norm(x_BTD)
