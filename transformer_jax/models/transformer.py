"""The Transformer of "Attention Is All You Need" (Vaswani 2017): an encoder and a decoder.

Post-LN and ReLU as published; pre-LN is an option. One embedding serves source, target and output (section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.nn.attention import Attention, KeysValues
from transformer_jax.nn.layers import Embedding, FeedForward, LayerNorm, Residual, dropout, split
from transformer_jax.nn.positions import sinusoidal
from transformer_jax.nn.stack import Stack
from transformer_jax.sharding import constrain


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Sizes as in table 3 of the paper; the defaults are its base model."""

    vocab_size: int = 37_000
    """Joint vocabulary of source and target, padding and special tokens included."""
    width: int = 512
    """d_model."""
    heads: int = 8
    """h; each has width / heads channels."""
    feedforward: int = 2048
    """d_ff."""
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    """On the output of every sublayer and on the sum of embeddings and positions (section 5.4)."""
    pre_norm: bool = False
    """LayerNorm before instead of after each sublayer (not as published; trains without warm-up)."""
    attention_bias: bool = False
    """Biases in the attention projections."""

    def check(self) -> None:
        """Raise `UserError` if heads do not divide the width, or a size is not positive."""
        for name in ("vocab_size", "width", "heads", "feedforward", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.width={self.width}.")
        if self.width % 2:
            raise UserError(f"model.width={self.width} must be even: sines and cosines take half of it each.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must lie in [0, 1), got {self.dropout}.")

    def build(self, key: jax.Array, compute: ComputeConfig) -> Transformer:
        """Construct the module."""
        return Transformer(key, self, compute)

    def forward_flops(self, source: int, target: int) -> int:
        """Two a parameter and token, and attention: 4 width a query and key, halved in the causal triangle."""
        d, s, t = self.width, source, target
        feedforward = 4 * d * self.feedforward
        encoder = s * (8 * d * d + feedforward) + 4 * d * s * s
        decoder = t * (8 * d * d + feedforward) + 2 * d * t * t
        cross = t * 4 * d * d + s * 4 * d * d + 4 * d * t * s
        head = 2 * d * self.vocab_size * t
        return self.encoder_layers * encoder + self.decoder_layers * (decoder + cross) + head


Weights = dict[str, jax.Array | None]
"""Attention weights [B, N, T, S] of one block by name, where the backend forms them."""


class Memory(NamedTuple):
    """What the encoder hands to the decoder."""

    x_BSD: jax.Array
    segments_BS: jax.Array


class EncoderBlock(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, key: jax.Array, config: TransformerConfig, compute: ComputeConfig) -> None:
        attention, feedforward = jax.random.split(key)
        self.attention = _attention(attention, config, compute)
        self.feedforward = FeedForward(feedforward, config.width, config.feedforward)
        self.attention_residual = _residual(config)
        self.feedforward_residual = _residual(config)

    def __call__(self, x_BSD: jax.Array, mask: Mask, *, key: jax.Array | None = None) -> tuple[jax.Array, Weights]:
        """Return the new stream and the attention weights by name."""
        keys = split(key, 2)
        h = self.attention_residual.enter(x_BSD)
        attended = self.attention(h, self.attention.keys_values(h), mask)
        x_BSD = self.attention_residual.leave(x_BSD, attended.out_BTD, keys[0])
        h = self.feedforward(self.feedforward_residual.enter(x_BSD))
        return self.feedforward_residual.leave(x_BSD, h, keys[1]), {"encoder": attended.weights_BNTS}


class DecoderBlock(nnx.Module):
    """Causal self-attention, attention over the memory, then feed-forward."""

    def __init__(self, key: jax.Array, config: TransformerConfig, compute: ComputeConfig) -> None:
        attention, cross, feedforward = jax.random.split(key, 3)
        self.attention = _attention(attention, config, compute)
        self.cross = _attention(cross, config, compute)
        self.feedforward = FeedForward(feedforward, config.width, config.feedforward)
        self.attention_residual = _residual(config)
        self.cross_residual = _residual(config)
        self.feedforward_residual = _residual(config)

    def __call__(
        self, x_BTD: jax.Array, memory: Memory, mask: Mask, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Weights]:
        """Return the new stream and the attention weights by name."""
        seen = self.attention.keys_values(self.attention_residual.enter(x_BTD))
        return self.attend(x_BTD, seen, mask, self.cross.keys_values(memory.x_BSD), memory.segments_BS, key=key)

    def step(
        self, x_B1D: jax.Array, position_B: jax.Array, past: KeysValues, memory: KeysValues, segments_BS: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """Decode one position: write it into the past, look back; returns the stream and the new past."""
        now = self.attention.keys_values(self.attention_residual.enter(x_B1D))
        past = past.write(now, position_B)
        mask = Mask(causal=True, q_positions_BT=position_B[:, None])
        return self.attend(x_B1D, past, mask, memory, segments_BS)[0], past

    def attend(
        self,
        x_BTD: jax.Array,
        seen: KeysValues,
        mask: Mask,
        memory: KeysValues,
        segments_BS: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Weights]:
        """The three sublayers, given everything that is looked at."""
        keys = split(key, 3)
        attended = self.attention(self.attention_residual.enter(x_BTD), seen, mask)
        x_BTD = self.attention_residual.leave(x_BTD, attended.out_BTD, keys[0])
        crossed = self.cross(self.cross_residual.enter(x_BTD), memory, Mask(kv_segments_BS=segments_BS))
        x_BTD = self.cross_residual.leave(x_BTD, crossed.out_BTD, keys[1])
        h = self.feedforward(self.feedforward_residual.enter(x_BTD))
        x_BTD = self.feedforward_residual.leave(x_BTD, h, keys[2])
        return x_BTD, {"decoder": attended.weights_BNTS, "cross": crossed.weights_BNTS}


class Transformer(nnx.Module):
    """Encoder and decoder over one vocabulary; token 0 is padding."""

    def __init__(self, key: jax.Array, config: TransformerConfig, compute: ComputeConfig) -> None:
        embedding, encoder, decoder = jax.random.split(key, 3)
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.embedding = Embedding(embedding, config.vocab_size, config.width)
        self.encoder = Stack(encoder, lambda k: EncoderBlock(k, config, compute), config.encoder_layers, compute)
        self.decoder = Stack(decoder, lambda k: DecoderBlock(k, config, compute), config.decoder_layers, compute)
        self.encoder_norm = LayerNorm(config.width) if config.pre_norm else None
        self.decoder_norm = LayerNorm(config.width) if config.pre_norm else None

    def __call__(self, source_BS: jax.Array, target_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Teacher forcing: logits [B, T, V] of the token that follows each of `target_BT`."""
        encoder_key, decoder_key = split(key, 2)
        memory = self.encode(source_BS, key=encoder_key)
        embed_key, stack_key = split(decoder_key, 2)
        x_BTD = self._embed(target_BT, _positions(target_BT), embed_key)
        # Padding stands at the end of a target, so causality alone hides it from every real position.
        x_BTD = self.decoder(x_BTD, memory, Mask(causal=True), key=stack_key)
        return self._logits(x_BTD)

    def encode(self, source_BS: jax.Array, *, key: jax.Array | None = None) -> Memory:
        """Read the source: [B, S] -> [B, S, D]."""
        embed_key, stack_key = split(key, 2)
        segments_BS = (source_BS != 0).astype(jnp.int32)
        x_BSD = self._embed(source_BS, _positions(source_BS), embed_key)
        x_BSD = self.encoder(x_BSD, Mask(kv_segments_BS=segments_BS), key=stack_key)
        return Memory(x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD), segments_BS)

    def start(self, source_BS: jax.Array, max_length: int) -> tuple[DecoderState, DecoderMemory]:
        """Prepare decoding: what grows (the past of each row) and what stays (keys and values of the memory)."""
        memory = self.encode(source_BS)
        seen = [block.cross.keys_values(memory.x_BSD) for block in self.decoder.layers]
        rows, heads = len(source_BS), self.config.heads
        empty = jnp.zeros((rows, max_length, heads, self.config.width // heads), self.dtype)
        past = [KeysValues(empty, empty) for _ in seen]
        return DecoderState(past, jnp.zeros(rows, jnp.int32)), DecoderMemory(seen, memory.segments_BS)

    def step(self, state: DecoderState, memory: DecoderMemory, token_B: jax.Array) -> tuple[jax.Array, DecoderState]:
        """Decode one token for every row: logits [B, V] of the next one, and the new state."""
        x_B1D = self._embed(token_B[:, None], state.position_B[:, None], None)
        new_past = []
        for block, past, seen in zip(self.decoder.layers, state.past, memory.seen, strict=True):
            x_B1D, longer = block.step(x_B1D, state.position_B, past, seen, memory.segments_BS)
            new_past.append(longer)
        return self._logits(x_B1D)[:, 0], DecoderState(new_past, state.position_B + 1)

    def attention_maps(self, source_BS: jax.Array, target_BT: jax.Array) -> dict[str, jax.Array]:
        """Attention weights of a source and a target: {"encoder", "decoder", "cross"}, each [L, B, N, T, S]."""
        memory = self.encode(source_BS)
        streams = (
            (self.encoder, self._embed(source_BS, _positions(source_BS), None), (Mask(memory.segments_BS),)),
            (self.decoder, self._embed(target_BT, _positions(target_BT), None), (memory, Mask(causal=True))),
        )
        maps: dict[str, list[jax.Array]] = {}
        for stack, start, inputs in streams:
            x = start
            for block in stack.layers:
                x, weights = block(x, *inputs)
                for name, weights_BNTS in weights.items():
                    maps.setdefault(name, []).append(weights_BNTS)
        return {name: jnp.stack(layers) for name, layers in maps.items()}

    def _embed(self, ids_BT: jax.Array, positions_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BTD = self.embedding(ids_BT, self.dtype) * jnp.asarray(self.config.width**0.5, self.dtype)
        x_BTD += sinusoidal(positions_BT, self.config.width).astype(self.dtype)
        return dropout(constrain(x_BTD, "BTD"), self.config.dropout, key)

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD if self.decoder_norm is None else self.decoder_norm(x_BTD)
        return constrain(self.embedding.logits(x_BTD), "BTV")


class DecoderMemory(NamedTuple):
    """What every step reads and none changes."""

    seen: list[KeysValues]
    """Keys and values of the encoder's output, one entry per decoder layer."""
    segments_BS: jax.Array


class DecoderState(NamedTuple):
    """What a row has decoded so far; every leaf leads with the rows, so a beam is reordered by indexing."""

    past: list[KeysValues]
    position_B: jax.Array


def _positions(ids_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)


def _attention(key: jax.Array, config: TransformerConfig, compute: ComputeConfig) -> Attention:
    return Attention(key, config.width, config.heads, bias=config.attention_bias, backend=compute.attention)


def _residual(config: TransformerConfig) -> Residual:
    return Residual(config.width, config.dropout, pre_norm=config.pre_norm)
