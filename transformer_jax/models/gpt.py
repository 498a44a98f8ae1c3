"""The decoder-only Transformer: GPT-1, GPT-2, GPT-3, and by configuration the dialect of Llama and its relatives.

With experts it is a mixture of them: Switch, GShard, Mixtral, OLMoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Mask
from transformer_jax.models.decoder import Decoder, DecoderConfig
from transformer_jax.nn.attention import Cache
from transformer_jax.nn.block import BlockConfig
from transformer_jax.nn.layers import Embedding, Linear, dropout, normal
from transformer_jax.nn.moe import DENSE, ExpertsConfig, routing
from transformer_jax.sharding import constrain


@dataclass(frozen=True)
class GPTConfig(DecoderConfig):
    """A decoder of tokens; the defaults are GPT-2's smallest (Radford 2019)."""

    vocab_size: int = 50_257
    experts: ExpertsConfig = DENSE
    """Feed-forward layers of which each token takes a few (Switch, GShard, Mixtral)."""
    tied: bool = True
    """The output projection is the embedding."""
    task: Literal["lm", "classify"] = "lm"
    """classify adds a linear head on the last token of a row (Radford 2018, section 3.2)."""
    labels: int = 0
    """Classes of the head; 1 for a number."""

    @property
    def block(self) -> BlockConfig:
        """What is repeated."""
        return replace(super().block, experts=self.experts)

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        if self.vocab_size < 1:
            raise UserError(f"model.vocab_size must be at least 1, got {self.vocab_size}.")
        super().check()
        if self.task == "classify" and self.labels < 1:
            raise UserError("model.task=classify needs model.labels: the number of classes, or 1 for a number.")

    def build(self, key: jax.Array, compute: ComputeConfig) -> GPT:
        """Construct the module."""
        return GPT(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "tokens" [B, T], the output projection at every position included."""
        rows, length = batch["tokens"]
        head = 2 * self.width * (self.vocab_size * length if "targets" in batch else self.labels)
        return rows * (self.block_flops(length) * (2 if "swapped" in batch else 1) + head)


class DecoderState(NamedTuple):
    """What the rows have read so far; every leaf leads with the rows."""

    past: list[Cache]
    """One cache a layer."""
    length_B: jax.Array


class GPT(Decoder):
    """A causal decoder of tokens; segments keep packed documents apart (0 is padding)."""

    def __init__(self, key: jax.Array, config: GPTConfig, compute: ComputeConfig) -> None:
        embedding, positions, blocks, output, head = jax.random.split(key, 5)
        super().__init__(positions, blocks, config, compute)
        self.config = config
        init, head_init = normal(config.init_std), normal(config.init_std / config.width_multiplier)
        self.embedding = Embedding(embedding, config.vocab_size, config.width, init=init)
        self.output = None if config.tied else Embedding(output, config.vocab_size, config.width, init=init)
        classifies = config.task == "classify"
        self.head = Linear(head, {"D": config.width}, {"Z": config.labels}, init=head_init) if classifies else None

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] of the token that follows each of `tokens_BT`."""
        return self.logits(self.features(tokens_BT, segments_BT, positions_BT, key=key))

    def features(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Read rows of documents: [B, T] -> [B, T, D], normalised, ready for `logits`."""
        return self.decode(self.embedding(tokens_BT, self.dtype), segments_BT, positions_BT, key=key)[0]

    def routed(
        self, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Read a batch as `read` does, and sum what its experts cost and how busy they are, over real positions."""
        x_BTD, sums_LX = self._decoded(batch, key)
        return x_BTD, {} if sums_LX is None else routing(sums_LX, self.config.experts)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Score every token of the vocabulary: [B, T, D] -> float32 [B, T, V]."""
        x_BTD = x_BTD if self.config.width_multiplier == 1.0 else x_BTD / self.config.width_multiplier
        return constrain((self.embedding if self.output is None else self.output).logits(x_BTD), "BTV")

    def read(self, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None) -> jax.Array:
        """Read the rows of a batch: [B, T] -> [B, T, D]; each is one text where there are no "positions"."""
        return self._decoded(batch, key)[0]

    def _decoded(self, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        x_BTD, positions_BT = self.embedding(batch["tokens"], self.dtype), batch.get("positions")
        return self.decode(x_BTD, batch["segments"], positions_BT, apart=positions_BT is not None, key=key)

    def label(self, x_BTD: jax.Array, segments_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Score the labels by the last real token of each row: [B, T, D] -> float32 [B, Z]."""
        if self.head is None:
            raise ValueError("a GPT without model.task=classify has no head")
        last_B = jnp.maximum((segments_BT != 0).sum(-1) - 1, 0)
        last_BD = x_BTD[jnp.arange(len(last_B)), last_B]
        return self.head(dropout(last_BD, self.config.dropout, key)).astype(jnp.float32)

    def start(self, tokens_BT: jax.Array, length_B: jax.Array, places: int) -> tuple[jax.Array, DecoderState]:
        """Read prompts of `length_B` tokens, padded at the end, with room for `places` positions in all.

        Returns:
            Logits [B, V] of the token after each prompt, and the state that `extend` continues.
        """
        place_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        positions_BT = jnp.where(place_BT < length_B[:, None], place_BT, -1)
        mask = Mask((positions_BT >= 0).astype(jnp.int32), causal=True)
        x_BTD, past = self._embed(tokens_BT, place_BT), []
        for i, block in enumerate(self.decoder.layers):
            window, config = self.config.window(i), self.config.block
            empty = Cache.empty(len(tokens_BT), self._places(i, places), config.kv, config.size, self.dtype)
            seen = block.attention.keys_values(block.attention_residual.enter(x_BTD), place_BT)
            past.append(empty.write(seen, positions_BT))
            x_BTD, _ = block(x_BTD, mask, place_BT, window=window)
        last_BD = self.normed(x_BTD)[jnp.arange(len(length_B)), length_B - 1]
        return self.logits(last_BD[:, None])[:, 0], DecoderState(past, length_B)

    def extend(self, state: DecoderState, tokens_BT: jax.Array) -> tuple[jax.Array, DecoderState]:
        """Read the next tokens of every row: logits [B, T, V] of what follows each, and the new state.

        To take tokens back, set `length_B` back: later positions are not seen, and written over. Layers with a window
        have room for `SLACK` positions beside it, so at most so many can be read or taken back at once.
        """
        positions_BT = state.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
        x_BTD, new_past = self._embed(tokens_BT, positions_BT), []
        for i, (block, past) in enumerate(zip(self.decoder.layers, state.past, strict=True)):
            x_BTD, longer = block.extend(x_BTD, positions_BT, past, window=self.config.window(i))
            new_past.append(longer)
        return self.logits(self.normed(x_BTD)), DecoderState(new_past, state.length_B + tokens_BT.shape[1])

    def attention_maps(self, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        """Attention weights: {"decoder": [L, B, N, T, T]}."""
        x_BTD, maps = self._embed(tokens_BT, None), []
        for i, block in enumerate(self.decoder.layers):
            x_BTD, weights = block(x_BTD, Mask(causal=True), window=self.config.window(i))
            maps.append(weights["self"])
        return {"decoder": jnp.stack(maps)}

    def _places(self, layer: int, places: int) -> int:
        window = self.config.window(layer)
        return min(window + SLACK, places) if window else places

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
        return self.placed(self.embedding(tokens_BT, self.dtype), positions_BT)


SLACK = 16
"""Positions beyond the window that the cache of a layer with a window can hold."""
