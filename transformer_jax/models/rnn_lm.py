"""Recurrent language models: cells one above the other that predict the next token (Mikolov 2010, Zaremba 2014)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.models.gpt import SLACK
from transformer_jax.nn.layers import Embedding, dropout, split
from transformer_jax.nn.recurrent import CELLS, LSTM, State, recur, states_of
from transformer_jax.sharding import constrain


@dataclass(frozen=True)
class RNNLMConfig(ModelConfig):
    """Sizes; the defaults are those of the medium network of Zaremba 2014, section 4.1."""

    vocab_size: int = 10_000
    context: int = 1024
    """Most tokens of a prompt with its continuation; the state itself has no end."""
    width: int = 650
    """Units of each cell, and channels of a token vector."""
    layers: int = 2
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    tied: bool = False
    """The output projection is the embedding (Press and Wolf 2017)."""
    dropout: float = 0.5
    """On embeddings and on the output of every layer, never from step to step (Zaremba 2014)."""
    forget_bias: float = 1.0
    """What the bias of an LSTM's forget gate begins with (Jozefowicz 2015, section 5)."""

    def check(self) -> None:
        """Raise `UserError` if a size is not positive or the dropout is no share."""
        for name in ("vocab_size", "context", "width", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must lie in [0, 1), got {self.dropout}.")

    def build(self, key: jax.Array, compute: ComputeConfig) -> RNNLM:
        """Construct the module."""
        return RNNLM(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "tokens" [B, T], the output projection included."""
        rows, length = batch["tokens"]
        layer = 2 * CELLS[self.cell].gates * self.width * (self.width + self.width)
        return rows * length * (self.layers * layer + 2 * self.width * self.vocab_size)


class RNNLMState(NamedTuple):
    """What the rows have read so far; every leaf leads with the rows."""

    past: list[State]
    """The last states of each layer, [B, S, D] each: the one after n tokens in place n mod S."""
    length_B: jax.Array


PLACES = SLACK + 1
"""States that are kept: as many tokens can be taken back as where a GPT's layer has a window."""


class RNNLM(nnx.Module):
    """A recurrent language model; segments keep packed documents apart, and every row begins without a past."""

    def __init__(self, key: jax.Array, config: RNNLMConfig, compute: ComputeConfig) -> None:
        embedding, output, cells = jax.random.split(key, 3)
        width, cell = config.width, CELLS[config.cell]
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.remat = compute.remat
        self.embedding = Embedding(embedding, config.vocab_size, width)
        self.output = None if config.tied else Embedding(output, config.vocab_size, width)
        self.cells = nnx.List([cell(k, width, width) for k in jax.random.split(cells, config.layers)])
        for layer in self.cells if cell is LSTM else ():
            bias = layer.project.bias
            assert bias is not None
            bias[...] = bias[...].at[1].set(config.forget_bias)  # gates in the order i, f, g, o

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
        """Read rows of documents: [B, T] -> [B, T, D], ready for `logits`; the order of tokens says where each is."""
        del positions_BT
        first_BT = None
        if segments_BT is not None:
            first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
        keys = split(key, len(self.cells) + 1)
        x_BTD = dropout(self._embed(tokens_BT), self.config.dropout, keys[-1])
        for cell, layer_key in zip(self.cells, keys, strict=False):
            gates_BTZF = constrain(cell.project(x_BTD), "BTZF")
            x_BTD, _ = recur(cell, gates_BTZF, cell.zeros(len(x_BTD)), first_BT=first_BT, remat=self.remat)
            x_BTD = dropout(constrain(x_BTD, "BTD"), self.config.dropout, layer_key)
        return x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Score every token of the vocabulary: [B, T, D] -> float32 [B, T, V]."""
        return constrain((self.embedding if self.output is None else self.output).logits(x_BTD), "BTV")

    def read(self, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None) -> jax.Array:
        """Read the rows of a batch: [B, T] -> [B, T, D]."""
        return self.features(batch["tokens"], batch["segments"], key=key)

    def start(self, tokens_BT: jax.Array, length_B: jax.Array, places: int) -> tuple[jax.Array, RNNLMState]:
        """Read prompts of `length_B` tokens, padded at the end; any number of places fits in a state.

        Returns:
            Logits [B, V] of the token after each prompt, and the state that `extend` continues.
        """
        del places
        rows = len(tokens_BT)
        nothing = [tuple(jnp.zeros((rows, PLACES, cell.width)) for _ in range(cell.parts)) for cell in self.cells]
        x_BTD, state = self._read(RNNLMState(nothing, jnp.zeros_like(length_B)), tokens_BT, length_B)
        last_BD = x_BTD[jnp.arange(rows), length_B - 1]
        return self.logits(last_BD[:, None])[:, 0], state

    def extend(self, state: RNNLMState, tokens_BT: jax.Array) -> tuple[jax.Array, RNNLMState]:
        """Read the next tokens of every row: logits [B, T, V] of what follows each, and the new state.

        To take tokens back, set `length_B` back, by at most `SLACK`.
        """
        x_BTD, state = self._read(state, tokens_BT, jnp.full_like(state.length_B, tokens_BT.shape[1]))
        return self.logits(x_BTD), state

    def _read(self, state: RNNLMState, tokens_BT: jax.Array, new_B: jax.Array) -> tuple[jax.Array, RNNLMState]:
        """Go on from the states at `length_B`, and keep those after the last of `new_B` tokens."""
        row_B1, length_B1 = jnp.arange(len(tokens_BT))[:, None], state.length_B[:, None]
        count_BT = length_B1 + 1 + jnp.arange(tokens_BT.shape[1])
        end_B1 = length_B1 + new_B[:, None]
        kept_BT = (count_BT <= end_B1) & (count_BT > end_B1 - PLACES)
        place_BT = jnp.where(kept_BT, count_BT % PLACES, PLACES)
        x_BTD, past = self._embed(tokens_BT), []
        for cell, before in zip(self.cells, state.past, strict=True):
            now = tuple(part_BSD[row_B1, length_B1 % PLACES][:, 0] for part_BSD in before)
            after = states_of(cell, constrain(cell.project(x_BTD), "BTZF"), now)
            x_BTD = constrain(after[0].astype(self.dtype), "BTD")
            past.append(tuple(o.at[row_B1, place_BT].set(n, mode="drop") for o, n in zip(before, after, strict=True)))
        return x_BTD, RNNLMState(past, end_B1[:, 0])

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return constrain(self.embedding(tokens_BT, self.dtype), "BTD")
