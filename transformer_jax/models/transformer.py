"""The Transformer of "Attention Is All You Need" (Vaswani 2017): an encoder and a decoder.

Post-LN and ReLU as published; pre-LN is an option. One embedding serves source, target and output (section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.kernels.zigzag import balanced
from transformer_jax.nn.attention import Cache, KeysValues
from transformer_jax.nn.block import Block, BlockConfig
from transformer_jax.nn.layers import Embedding, LayerNorm, dropout, split
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
        for name in ("vocab_size", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        self.block.check()
        if self.width % 2:
            raise UserError(f"model.width={self.width} must be even: sines and cosines take half of it each.")

    @property
    def block(self) -> BlockConfig:
        """What encoder and decoder repeat."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            feedforward=self.feedforward,
            pre_norm=self.pre_norm,
            attention_bias=self.attention_bias,
            dropout=self.dropout,
        )

    def build(self, key: jax.Array, compute: ComputeConfig) -> Transformer:
        """Construct the module."""
        return Transformer(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "source" [B, S] and write "target" [B, T + 1]."""
        (rows, source), (_, target) = batch["source"], batch["target"]
        encoder = self.block.forward_flops(source, causal=False)
        decoder = self.block.forward_flops(target - 1, source, causal=True)
        head = 2 * self.width * self.vocab_size * (target - 1)
        return rows * (self.encoder_layers * encoder + self.decoder_layers * decoder + head)


class Memory(NamedTuple):
    """What the encoder hands to the decoder."""

    x_BSD: jax.Array
    segments_BS: jax.Array


class Transformer(nnx.Module):
    """Encoder and decoder over one vocabulary; token 0 is padding."""

    config: Any  # of this family, or of one that has its own embeddings (bert_seq2seq.py)

    def __init__(self, key: jax.Array, config: TransformerConfig, compute: ComputeConfig) -> None:
        embedding, encoder, decoder = jax.random.split(key, 3)
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.embedding = Embedding(embedding, config.vocab_size, config.width)
        block = config.block
        self.encoder = Stack(encoder, lambda k: Block(k, block, compute), config.encoder_layers, compute)
        self.decoder = Stack(decoder, lambda k: Block(k, block, compute, cross=True), config.decoder_layers, compute)
        self.encoder_norm = LayerNorm(config.width) if config.pre_norm else None
        self.decoder_norm = LayerNorm(config.width) if config.pre_norm else None

    def __call__(self, source_BS: jax.Array, target_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Teacher forcing: logits [B, T, V] of the token that follows each of `target_BT`."""
        encoder_key, decoder_key = split(key, 2)
        memory = self.encode(source_BS, key=encoder_key)
        embed_key, stack_key = split(decoder_key, 2)
        x_BTD = self._embed(target_BT, _positions(target_BT), embed_key)
        # Padding stands at the end of a target, so causality alone hides it from every real position.
        x_BTD, _ = balanced(self.decoder.routed, x_BTD, Mask(causal=True), None, memory, key=stack_key)
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
        rows, block = len(source_BS), self.config.block
        past = [Cache.empty(rows, max_length, block.kv, block.size, self.dtype) for _ in seen]
        return DecoderState(past, jnp.zeros(rows, jnp.int32)), DecoderMemory(seen, memory.segments_BS)

    def step(self, state: DecoderState, memory: DecoderMemory, token_B: jax.Array) -> tuple[jax.Array, DecoderState]:
        """Decode one token for every row: logits [B, V] of the next one, and the new state."""
        position_B1 = state.position_B[:, None]
        x_B1D = self._embed(token_B[:, None], position_B1, None)
        new_past = []
        for block, past, seen in zip(self.decoder.layers, state.past, memory.seen, strict=True):
            x_B1D, longer = block.extend(x_B1D, position_B1, past, (seen, memory.segments_BS))
            new_past.append(longer)
        return self._logits(x_B1D)[:, 0], DecoderState(new_past, state.position_B + 1)

    def attention_maps(self, source_BS: jax.Array, target_BT: jax.Array) -> dict[str, jax.Array]:
        """Attention weights of a source and a target: {"encoder", "decoder", "cross"}, each [L, B, N, T, S]."""
        memory = self.encode(source_BS)
        embedded = [self._embed(ids, _positions(ids), None) for ids in (source_BS, target_BT)]
        streams = (
            (self.encoder, embedded[0], (Mask(memory.segments_BS),), {"self": "encoder"}),
            (self.decoder, embedded[1], (Mask(causal=True), None, memory), {"self": "decoder", "cross": "cross"}),
        )
        maps: dict[str, list[jax.Array]] = {}
        for stack, start, inputs, names in streams:
            x = start
            for block in stack.layers:
                x, weights = block(x, *inputs)
                for kind, weights_BNTS in weights.items():
                    maps.setdefault(names[kind], []).append(weights_BNTS)
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

    past: list[Cache]
    position_B: jax.Array


def _positions(ids_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
