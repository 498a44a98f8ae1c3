"""Attention with one head and a choice of score, as the recurrent decoders had it before the Transformer."""

from __future__ import annotations

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.nn.layers import Linear
from transformer_jax.sharding import constrain


class Seen(NamedTuple):
    """What attention looks at."""

    x_BSD: jax.Array
    keys_BSF: jax.Array
    segments_BS: jax.Array


class Alignment(nnx.Module):
    """The average of the encoder's outputs, weighted by a softmax of scores; a subclass says how to score."""

    keys: Linear | None

    @abc.abstractmethod
    def score(self, query_BTD: jax.Array, keys_BSF: jax.Array) -> jax.Array:
        """Return [B, T, S]."""

    def look_at(self, x_BSD: jax.Array, segments_BS: jax.Array) -> Seen:
        """Project the keys, once for all queries; segment 0 is padding."""
        keys_BSF = x_BSD if self.keys is None else self.keys(x_BSD)
        return Seen(x_BSD, constrain(keys_BSF, "BSF"), segments_BS)

    def __call__(self, query_BTD: jax.Array, seen: Seen) -> tuple[jax.Array, jax.Array]:
        """Return the context [B, T, D] and the weights [B, T, S]; the softmax is float32."""
        scores_BTS = self.score(query_BTD, seen.keys_BSF).astype(jnp.float32)
        # Finite, so that a row that sees nothing (padding) stays finite too.
        weights_BTS = jax.nn.softmax(jnp.where(seen.segments_BS[:, None] != 0, scores_BTS, -1e30))
        return jnp.einsum("BTS,BSD->BTD", weights_BTS.astype(seen.x_BSD.dtype), seen.x_BSD), weights_BTS


class Additive(Alignment):
    """score = v tanh(W s + U h) of decoder state s and encoder output h (Bahdanau 2015, A.1.2)."""

    def __init__(self, key: jax.Array, width: int, memory_width: int) -> None:
        query, keys, energy = jax.random.split(key, 3)
        self.query = Linear(query, {"D": width}, {"F": width}, bias=False)
        self.keys = Linear(keys, {"D": memory_width}, {"F": width}, bias=False)
        self.energy = Linear(energy, {"F": width}, {}, bias=False)

    def score(self, query_BTD: jax.Array, keys_BSF: jax.Array) -> jax.Array:
        """Return [B, T, S], by way of [B, T, S, F]."""
        return self.energy(jnp.tanh(self.query(query_BTD)[:, :, None] + keys_BSF[:, None]))


class Multiplicative(Alignment):
    """score = s W h (general), or s h (dot), of decoder state s and encoder output h (Luong 2015, section 3.1)."""

    def __init__(self, key: jax.Array, width: int, memory_width: int, *, general: bool) -> None:
        self.keys = Linear(key, {"D": memory_width}, {"F": width}, bias=False) if general else None

    def score(self, query_BTD: jax.Array, keys_BSF: jax.Array) -> jax.Array:
        """Return [B, T, S]."""
        return jnp.einsum("BTF,BSF->BTS", query_BTD, keys_BSF, preferred_element_type=jnp.float32)
