"""Speculative decoding: a small model drafts tokens, the large one reads them all at once and keeps what it agrees to.

Leviathan 2023, algorithm 1. What is written has exactly the distribution of the large model, filters included, since
both models draw through the same ones; greedy output is token-identical (but for ties within rounding, since several
positions are computed at once). A bad draft costs time, never quality.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.errors import UserError
from transformer_jax.models.gpt import SLACK, DecoderState
from transformer_jax.sampling import Filters, TakeTurn, Turn, Writing, draw, filtered, judged

Read = Callable[[DecoderState, jax.Array], tuple[jax.Array, DecoderState]]
"""(state, tokens_BT) -> (logits_BTV of what follows each, state after them): `GPT.extend`."""

MOST_DRAFTED = SLACK - 1
"""A cache with a window has room for the drafted tokens and the one before them."""


class Pair(NamedTuple):
    """What both models have read: the same tokens."""

    target: DecoderState
    draft: DecoderState


def check_drafted(drafted: int) -> None:
    """Raise `UserError` for a number of drafted tokens that the caches have no room for."""
    if not 1 <= drafted <= MOST_DRAFTED:
        raise UserError(f"--draft-tokens must lie between 1 and {MOST_DRAFTED}, got {drafted}.")


def speculative(read: Read, read_draft: Read, drafted: int, filters: Filters, alternatives: int = 0) -> TakeTurn:
    """Return the turn of `sampling.write` that offers 1 to `drafted` + 1 tokens; its state is a `Pair`.

    Args:
        read: the target model.
        read_draft: the draft model, of the same vocabulary.
        drafted: gamma, tokens drafted a turn.
        filters: of both models.
        alternatives: N, ranked tokens to report at each place.
    """

    def turn(writing: Writing) -> tuple[Turn, Pair]:
        pair: Pair = writing.state
        key_B = writing.keys()
        row_B = jnp.arange(len(key_B))

        def propose(
            carry: tuple[DecoderState, jax.Array, jax.Array | None], i: jax.Array
        ) -> tuple[tuple[DecoderState, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array, jax.Array | None]]:
            state, last_B, seen_BV = carry
            logits_B1V, state = read_draft(state, last_B[:, None])
            x_BV = filtered(logits_B1V[:, 0], filters, seen_BV)
            token_B = draw(_fold(key_B, i), x_BV, filters)
            after_BV = None if seen_BV is None else seen_BV.at[row_B, token_B].set(True)
            return (state, token_B, after_BV), (token_B, probabilities(x_BV, filters), seen_BV)

        # One more than is used: so the draft, too, has read everything but the last token when all are accepted.
        start = (pair.draft, writing.last_B, writing.seen_BV)
        (draft, *_), (token_GB, q_GBV, seen_GBV) = jax.lax.scan(propose, start, jnp.arange(drafted + 1))
        proposed_BG, q_BGV = token_GB.T, q_GBV.swapaxes(0, 1)

        logits_BGV, target = read(pair.target, jnp.concatenate([writing.last_B[:, None], proposed_BG[:, :-1]], axis=1))
        p_BGV = jax.vmap(
            lambda logits_BV, seen_BV: probabilities(filtered(logits_BV, filters, seen_BV), filters),
            in_axes=(1, None if seen_GBV is None else 0),
            out_axes=1,
        )(logits_BGV, seen_GBV)

        p_BG, q_BG = (jnp.take_along_axis(x, proposed_BG[..., None], axis=-1)[..., 0] for x in (p_BGV, q_BGV))
        chance_BG = jax.vmap(partial(jax.random.uniform, shape=(drafted + 1,)))(_fold(key_B, drafted + 1))
        agreed_BG = (chance_BG * q_BG < p_BG).at[:, drafted].set(False)
        accepted_B = jnp.cumprod(agreed_BG, axis=1, dtype=jnp.int32).sum(axis=1)

        # After a refusal, what the draft gave too little; after none, the target's own next token.
        q_BGV = q_BGV.at[:, drafted].set(0.0)
        p_BV, q_BV = p_BGV[row_B, accepted_B], q_BGV[row_B, accepted_B]
        rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
        rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)  # equal up to rounding
        next_B = draw(_fold(key_B, drafted + 2), jnp.log(rest_BV), filters)

        tokens_BG = proposed_BG.at[row_B, accepted_B].set(next_B)
        log_prob_BG, ranked_BGN = judged(logits_BGV, tokens_BG, alternatives)
        read_B = pair.target.length_B + 1 + accepted_B
        state = Pair(target._replace(length_B=read_B), draft._replace(length_B=read_B))
        return Turn(tokens_BG, log_prob_BG, ranked_BGN, accepted_B + 1), state

    return turn


def probabilities(x_BV: jax.Array, filters: Filters) -> jax.Array:
    """Return what `draw` draws with: the softmax of filtered logits, or all on the best token."""
    if filters.temperature is None:
        return jax.nn.one_hot(x_BV.argmax(-1), x_BV.shape[-1])
    return jax.nn.softmax(x_BV, axis=-1)


def _fold(key_B: jax.Array, i: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, i)
