"""An encoder and a decoder that both start from BERT (Rothe 2020, BERT2BERT): for summaries and translations.

Train it with `init.run` of a BERT and `init.rename=RENAME`: only the attention over the encoder is then drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.models.bert import BertConfig, BertEmbeddings
from transformer_jax.models.transformer import Transformer
from transformer_jax.nn.block import Block
from transformer_jax.nn.stack import Stack
from transformer_jax.sharding import constrain

RENAME = (("embeddings", "embeddings"), ("encoder", "encoder"), ("encoder", "decoder"))
"""Which part of a BERT goes where."""


@dataclass(frozen=True)
class BertSeq2SeqConfig(BertConfig):
    """BERT's sizes for encoder and decoder; one set of embeddings serves source, target and output."""

    task: Literal["encode"] = "encode"

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        super().check()
        if self.labels:
            raise UserError("model.labels has no meaning for an encoder-decoder.")
        if self.base_width:
            raise UserError("model.base_width (muP) is for an encoder or a decoder alone.")

    def build(self, key: jax.Array, compute: ComputeConfig) -> BertSeq2Seq:
        """Construct the module."""
        return BertSeq2Seq(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "source" [B, S] and write "target" [B, T + 1]."""
        (rows, source), (_, target) = batch["source"], batch["target"]
        encoder = self.block.forward_flops(source, causal=False)
        decoder = self.block.forward_flops(target - 1, source, causal=True)
        return rows * (self.layers * (encoder + decoder) + 2 * self.width * self.vocab_size * (target - 1))


class BertSeq2Seq(Transformer):
    """The encoder-decoder of `Transformer` with BERT's embeddings and blocks."""

    def __init__(self, key: jax.Array, config: BertSeq2SeqConfig, compute: ComputeConfig) -> None:
        embeddings, encoder, decoder = jax.random.split(key, 3)
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.embeddings = BertEmbeddings(embeddings, config)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,)), letters="V")
        self.encoder = Stack(encoder, lambda k: Block(k, config.block, compute), config.layers, compute)
        self.decoder = Stack(decoder, lambda k: Block(k, config.block, compute, cross=True), config.layers, compute)
        self.encoder_norm = None

    def _embed(self, ids_BT: jax.Array, positions_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.embeddings(ids_BT, positions_BT, jnp.zeros_like(ids_BT), self.dtype, key=key)

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        return constrain(self.embeddings.tokens.logits(x_BTD) + self.bias[...], "BTV")
