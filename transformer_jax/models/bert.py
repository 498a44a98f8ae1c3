"""BERT (Devlin 2018): a Transformer encoder, pre-trained to fill gaps and to tell what follows, with thin heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.nn.block import Block, BlockConfig
from transformer_jax.nn.layers import ACTIVATIONS, Embedding, Init, LayerNorm, Linear, dropout, split, truncated_normal
from transformer_jax.nn.stack import Stack
from transformer_jax.sharding import constrain

Task = Literal["pretrain", "classify", "tag", "span", "encode"]


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Sizes and head; the defaults are BERT-base."""

    vocab_size: int = 30_522
    context: int = 512
    """Most tokens that are read at once."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 0
    """0: 4 x width."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    norm_eps: float = 1e-12
    types: int = 2
    """Kinds of segment embeddings: the first sentence of a pair, and the second."""
    dropout: float = 0.1
    """On embeddings, attention weights and the output of each sublayer."""
    init_std: float = 0.02
    base_width: int = 0
    """muP (Yang 2022): the width that the learning rate was tuned at, which then suits this one; 0: standard."""
    task: Literal["pretrain", "mlm", "classify", "tag", "span", "encode"] = "pretrain"
    """Head: masked tokens and next sentence; masked tokens alone; labels of a row; labels of each token; start and
    end of a span; none."""
    labels: int = 0
    """Of classify and tag: the number of classes, or 1 for a number."""

    @property
    def width_multiplier(self) -> float:
        """Width over base width; 1 without one."""
        return self.width / self.base_width if self.base_width else 1.0

    @property
    def hidden_init(self) -> Init:
        """Of matrices between hidden layers."""
        return truncated_normal(self.init_std / self.width_multiplier**0.5)

    @property
    def output_init(self) -> Init:
        """Of the heads' last matrices."""
        return truncated_normal(self.init_std / self.width_multiplier)

    @property
    def block(self) -> BlockConfig:
        """What is repeated: post-LN, biases everywhere."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            feedforward=self.feedforward or 4 * self.width,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            base_width=self.base_width,
            init=self.hidden_init,
            residual_init=self.hidden_init,
        )

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        for name in ("vocab_size", "context", "layers", "types"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.task in ("classify", "tag") and self.labels < 1:
            raise UserError(f"model.task={self.task} needs model.labels: the number of classes, or 1 for a number.")
        self.block.check()

    def build(self, key: jax.Array, compute: ComputeConfig) -> nnx.Module:
        """Construct the module."""
        return Bert(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "tokens" [B, T]; gaps are scored at "positions_masked" [B, M]."""
        rows, length = batch["tokens"]
        total = self.layers * self.block.forward_flops(length, causal=False)
        if self.task in ("pretrain", "mlm"):
            total += 2 * self.width * (self.width + self.vocab_size) * batch["positions_masked"][1]
        if self.task in ("pretrain", "classify"):
            total += 2 * self.width * self.width
        per_token = {"pretrain": 2, "classify": self.labels, "tag": self.labels * length, "span": 2 * length}
        return rows * (total + 2 * self.width * per_token.get(self.task, 0))


class BertEmbeddings(nnx.Module):
    """The sum of token, position and segment vectors, normalised (Devlin 2018, figure 2)."""

    def __init__(self, key: jax.Array, config: BertConfig) -> None:
        tokens, positions, types = jax.random.split(key, 3)
        init = truncated_normal(config.init_std)
        self.tokens = Embedding(tokens, config.vocab_size, config.width, init=init)
        self.positions = Embedding(positions, config.context, config.width, init=init, letters="TD")
        self.types = Embedding(types, config.types, config.width, init=init, letters="ZD")
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.dropout = config.dropout

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array,
        dtype: jnp.dtype,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T] -> [B, T, D]."""
        x_BTD = self.tokens(tokens_BT, dtype) + self.positions(positions_BT, dtype) + self.types(types_BT, dtype)
        return dropout(constrain(self.norm(x_BTD), "BTD"), self.dropout, key)


class PretrainingHeads(nnx.Module):
    """Score what stands in a gap (through the token embeddings), and whether the second sentence follows the first."""

    def __init__(self, key: jax.Array, config: BertConfig) -> None:
        transform, following = jax.random.split(key)
        self.transform = Linear(transform, {"D": config.width}, {"F": config.width}, init=config.hidden_init)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,)), letters="V")
        both = config.task == "pretrain"
        output = config.output_init
        self.following = Linear(following, {"D": config.width}, {"Z": 2}, init=output) if both else None
        self.width_multiplier = config.width_multiplier
        self.activation = config.activation

    def tokens(self, x_BMD: jax.Array, embedding: Embedding) -> jax.Array:
        """[B, M, D] -> float32 [B, M, V]."""
        h_BMD = self.norm(ACTIVATIONS[self.activation](self.transform(x_BMD)))
        h_BMD = h_BMD if self.width_multiplier == 1.0 else h_BMD / self.width_multiplier
        return constrain(embedding.logits(h_BMD) + self.bias[...], "BTV")


class Bert(nnx.Module):
    """An encoder that sees both directions; segment 0 is padding."""

    def __init__(self, key: jax.Array, config: BertConfig, compute: ComputeConfig) -> None:
        embeddings, blocks, pooler, head = jax.random.split(key, 4)
        hidden, output = config.hidden_init, config.output_init
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.embeddings = BertEmbeddings(embeddings, config)
        self.encoder = Stack(blocks, lambda k: Block(k, config.block, compute), config.layers, compute)
        pooled = config.task in ("pretrain", "classify", "encode")
        self.pooler = Linear(pooler, {"D": config.width}, {"F": config.width}, init=hidden) if pooled else None
        self.pretraining = PretrainingHeads(head, config) if config.task in ("pretrain", "mlm") else None
        outputs = {"classify": config.labels, "tag": config.labels, "span": 2}.get(config.task)
        self.head = Linear(head, {"D": config.width}, {"Z": outputs}, init=output) if outputs else None

    def __call__(
        self,
        tokens_BT: jax.Array,
        types_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Read rows: [B, T] -> [B, T, D]. Types say which sentence of a pair a token belongs to."""
        embed_key, stack_key = split(key, 2)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embeddings(tokens_BT, positions_BT, types_BT, self.dtype, key=embed_key)
        return self.encoder(x_BTD, Mask(segments_BT), key=stack_key)

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """Stand for a row by its first token: [B, T, D] -> [B, D]."""
        if self.pooler is None:
            raise ValueError(f"a BERT with model.task={self.config.task} has no pooler")
        return jnp.tanh(self.pooler(x_BTD[:, 0]))

    def fill(self, x_BTD: jax.Array, masked_BM: jax.Array) -> jax.Array:
        """Score what stands at positions [B, M] of the rows: float32 [B, M, V]."""
        x_BMD = jnp.take_along_axis(x_BTD, masked_BM[..., None], axis=1)
        return self._pretraining().tokens(x_BMD, self.embeddings.tokens)

    def follows(self, x_BTD: jax.Array) -> jax.Array:
        """Score that the second sentence is any, and that it follows the first: [B, T, D] -> float32 [B, 2]."""
        following = self._pretraining().following
        if following is None:
            raise ValueError(f"a BERT with model.task={self.config.task} has no head for the next sentence")
        return following(self.pooled(x_BTD)).astype(jnp.float32)

    def read(self, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None) -> jax.Array:
        """Read the rows of a batch: [B, T] -> [B, T, D]."""
        return self(batch["tokens"], batch["types"], batch["segments"], key=key)

    def label(self, x_BTD: jax.Array, _segments_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Apply the head of the task: float32 [B, Z] of a row (classify), or [B, T, Z] of its tokens (tag, span)."""
        if self.head is None:
            raise ValueError(f"a BERT with model.task={self.config.task} has no head for labels")
        h = self.pooled(x_BTD) if self.config.task == "classify" else x_BTD
        return self.head(dropout(h, self.config.dropout, key)).astype(jnp.float32)

    def attention_maps(self, tokens_BT: jax.Array, types_BT: jax.Array) -> dict[str, jax.Array]:
        """Attention weights: {"encoder": [L, B, N, T, T]}."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD, maps = self.embeddings(tokens_BT, positions_BT, types_BT, self.dtype), []
        for block in self.encoder.layers:
            x_BTD, weights = block(x_BTD, Mask())
            maps.append(weights["self"])
        return {"encoder": jnp.stack(maps)}

    def _pretraining(self) -> PretrainingHeads:
        if self.pretraining is None:
            raise ValueError(f"a BERT with model.task={self.config.task} has no pre-training heads")
        return self.pretraining
