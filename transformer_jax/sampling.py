"""Drawing tokens from a model: temperature, truncation, repetition penalty, and the loop that writes rows of them.

Pure and jittable; nothing here knows a model. A **turn** asks the model for the next token of every row (or several:
see `speculative.py`); `write` repeats it until all rows are closed, or some turns are over.

Filters are applied in the order of the `transformers` library: repetition penalty, temperature, top-k, top-p, min-p.
Shapes: B rows, V vocabulary, G most tokens a turn gives a row, N ranked alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.errors import UserError

State = Any
Scalar = jax.Array | float
Step = Callable[[State, jax.Array], tuple[jax.Array, State]]
"""(state, token_B) -> (logits_BV of what follows the token, state after it)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens, and what ties with the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities add up to p (Holtzman 2020, section 3.1)."""
    min_p: float = 0.0
    """Keep tokens at least p times as probable as the most probable one (Nguyen 2024)."""
    repetition_penalty: float = 1.0
    """Makes tokens that stand in the prompt or were written less probable (Keskar 2019, section 4.1)."""

    def check(self, vocab_size: int) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if not self.temperature >= 0:
            raise UserError(f"--temperature must be at least 0 (0 is greedy), got {self.temperature:g}.")
        if not 0 <= self.top_k <= vocab_size:
            raise UserError(f"--top-k must lie between 0 (off) and the vocabulary of {vocab_size}, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must lie in (0, 1] (1 is off), got {self.top_p:g}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must lie in [0, 1] (0 is off), got {self.min_p:g}.")
        if not self.repetition_penalty > 0:
            raise UserError(f"--repetition-penalty must be positive (1 is off), got {self.repetition_penalty:g}.")

    def filters(self) -> Filters:
        """Return what a compiled function takes: values are traced, only what is switched off is static."""
        drawn = self.temperature > 0
        return Filters(
            temperature=self.temperature if drawn else None,
            top_k=self.top_k if drawn and self.top_k else None,
            top_p=self.top_p if drawn and self.top_p < 1 else None,
            min_p=self.min_p if drawn and self.min_p else None,
            repetition_penalty=self.repetition_penalty if self.repetition_penalty != 1 else None,
        )


class Filters(NamedTuple):
    """The filters of a `Sampling`; None is off, and without a temperature the most probable token is taken."""

    temperature: Scalar | None = None
    top_k: Scalar | None = None
    top_p: Scalar | None = None
    min_p: Scalar | None = None
    repetition_penalty: Scalar | None = None


def filtered(logits_BV: jax.Array, filters: Filters, seen_BV: jax.Array | None = None) -> jax.Array:
    """Apply the filters: float32 logits [B, V] of the distribution to draw from, -inf for what is left out.

    `seen_BV` says which tokens the penalty is for. It divides positive logits and multiplies negative ones, so that
    it lowers both; the paper divides only.
    """
    x_BV = logits_BV.astype(jnp.float32)
    if filters.repetition_penalty is not None and seen_BV is not None:
        penalty = filters.repetition_penalty
        x_BV = jnp.where(seen_BV, jnp.where(x_BV > 0, x_BV / penalty, x_BV * penalty), x_BV)
    if filters.temperature is not None:
        x_BV = x_BV / filters.temperature
    if filters.top_k is not None or filters.top_p is not None:
        order_BV = jnp.argsort(x_BV, axis=-1, descending=True, stable=True)
        sorted_BV = jnp.take_along_axis(x_BV, order_BV, axis=-1)
        if filters.top_k is not None:
            least_B1 = jnp.take(sorted_BV, jnp.asarray(filters.top_k) - 1, axis=-1)[:, None]
            x_BV = jnp.where(x_BV < least_B1, -jnp.inf, x_BV)
            sorted_BV = jnp.where(sorted_BV < least_B1, -jnp.inf, sorted_BV)
        if filters.top_p is not None:
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            # The token that crosses p is kept: what counts is the mass of those before it.
            kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < filters.top_p
            kept_BV = jnp.put_along_axis(jnp.zeros_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)
            x_BV = jnp.where(kept_BV, x_BV, -jnp.inf)
    if filters.min_p is not None:
        x_BV = jnp.where(x_BV < x_BV.max(-1, keepdims=True) + jnp.log(filters.min_p), -jnp.inf, x_BV)
    return x_BV


def draw(key_B: jax.Array, x_BV: jax.Array, filters: Filters) -> jax.Array:
    """Draw one token a row from filtered logits, each with its own key: int32 [B]."""
    token_B = x_BV.argmax(-1) if filters.temperature is None else jax.vmap(jax.random.categorical)(key_B, x_BV)
    return token_B.astype(jnp.int32)


class Writing(NamedTuple):
    """Rows that are being written; every leaf leads with the rows."""

    state: State
    """The model's, after all tokens but the last one."""
    last_B: jax.Array
    key_B: jax.Array
    """Random key of each row; the token at place i is drawn with `fold_in(key, i)`."""
    written_B: jax.Array
    """Tokens so far, those of the prompt not counted."""
    limit_B: jax.Array
    """Most tokens."""
    closed_B: jax.Array
    seen_BV: jax.Array | None
    """Tokens that occurred, where the repetition penalty needs them."""

    def keys(self) -> jax.Array:
        """Random key of the next token of each row: independent of the other rows, and of how turns are cut."""
        return jax.vmap(jax.random.fold_in)(self.key_B, self.written_B)


class Turn(NamedTuple):
    """What a turn offers each row: the first `count_B` of G tokens."""

    tokens_BG: jax.Array
    log_prob_BG: jax.Array
    """Of the model itself, before any filter."""
    ranked_BGN: tuple[jax.Array, jax.Array]
    """The N most probable tokens there, and their log-probabilities."""
    count_B: jax.Array


TakeTurn = Callable[[Writing], tuple[Turn, State]]
"""Returns the offer, and the state that has read all of it but its last token."""


def one_token(step: Step, filters: Filters, alternatives: int = 0) -> TakeTurn:
    """Return the plain turn: read the last token, draw the next one."""

    def turn(writing: Writing) -> tuple[Turn, State]:
        logits_BV, state = step(writing.state, writing.last_B)
        token_B1 = draw(writing.keys(), filtered(logits_BV, filters, writing.seen_BV), filters)[:, None]
        log_prob_B1, ranked_B1N = judged(logits_BV[:, None], token_B1, alternatives)
        return Turn(token_B1, log_prob_B1, ranked_B1N, jnp.ones_like(writing.last_B)), state

    return turn


def judged(
    logits_BTV: jax.Array, tokens_BT: jax.Array, alternatives: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the log-probabilities [B, T] of tokens, and the most probable tokens [B, T, N] with theirs."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    log_prob_BT = jnp.take_along_axis(log_probs_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    best_BTN, rank_BTN = jax.lax.top_k(log_probs_BTV, alternatives)
    return log_prob_BT, (rank_BTN, best_BTN)


class Chunk(NamedTuple):
    """What some turns wrote: `count_B` tokens a row, of C places."""

    tokens_BC: jax.Array
    log_prob_BC: jax.Array
    ranked_BCN: tuple[jax.Array, jax.Array]
    count_B: jax.Array
    turns_B: jax.Array
    """Turns in which the row was open."""
    offered_B: jax.Array
    """Tokens it was offered in them; more than `count_B` where the row ended in between."""


def write(
    turn: TakeTurn, writing: Writing, *, turns: Scalar, capacity: int, width: int, eos: int, pad: int, alternatives: int
) -> tuple[Writing, Chunk]:
    """Take turns until every row is closed, or `turns` are over.

    Args:
        turn: see `TakeTurn`.
        writing: where the rows stand.
        turns: how many at most; traced, up to `capacity`.
        capacity: turns the result has room for.
        width: G, most tokens of a turn.
        eos: token after which a row is closed; -1 if there is none.
        pad: fills the places that are not written.
        alternatives: N.

    Returns:
        Where the rows stand now, and what was written. How turns are cut into calls changes no token.
    """
    rows, places = len(writing.last_B), capacity * width
    row_B1 = jnp.arange(rows)[:, None]
    nothing = Chunk(
        tokens_BC=jnp.full((rows, places), pad, jnp.int32),
        log_prob_BC=jnp.zeros((rows, places)),
        ranked_BCN=(jnp.zeros((rows, places, alternatives), jnp.int32), jnp.zeros((rows, places, alternatives))),
        count_B=jnp.zeros(rows, jnp.int32),
        turns_B=jnp.zeros(rows, jnp.int32),
        offered_B=jnp.zeros(rows, jnp.int32),
    )

    def going(loop: tuple[jax.Array, Writing, Chunk]) -> jax.Array:
        taken, writing, _ = loop
        return (taken < turns) & ~jnp.all(writing.closed_B)

    def advance(loop: tuple[jax.Array, Writing, Chunk]) -> tuple[jax.Array, Writing, Chunk]:
        taken, writing, chunk = loop
        offer, state = turn(writing)
        open_B = ~writing.closed_B
        ends_BG = offer.tokens_BG == eos
        before_BG = jnp.cumsum(ends_BG, axis=1) - ends_BG  # tokens after an eos are not written
        place_G = jnp.arange(width)
        kept_BG = (place_G < offer.count_B[:, None]) & (before_BG == 0) & open_B[:, None]
        kept_BG &= place_G < (writing.limit_B - writing.written_B)[:, None]
        count_B = kept_BG.sum(axis=1, dtype=jnp.int32)
        place_BG = jnp.where(kept_BG, chunk.count_B[:, None] + place_G, places)  # beyond the end: dropped

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return buffer.at[row_B1, place_BG].set(new, mode="drop")

        chunk = Chunk(
            tokens_BC=put(chunk.tokens_BC, offer.tokens_BG),
            log_prob_BC=put(chunk.log_prob_BC, offer.log_prob_BG),
            ranked_BCN=jax.tree.map(put, chunk.ranked_BCN, offer.ranked_BGN),
            count_B=chunk.count_B + count_B,
            turns_B=chunk.turns_B + open_B,
            offered_B=chunk.offered_B + jnp.where(open_B, offer.count_B, 0),
        )
        written_B = writing.written_B + count_B
        newest_B = jnp.take_along_axis(offer.tokens_BG, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
        seen_BV = writing.seen_BV
        if seen_BV is not None:
            nowhere = seen_BV.shape[1]
            seen_BV = seen_BV.at[row_B1, jnp.where(kept_BG, offer.tokens_BG, nowhere)].set(True, mode="drop")
        writing = writing._replace(
            state=state,
            last_B=jnp.where(open_B, newest_B, writing.last_B),
            written_B=written_B,
            closed_B=writing.closed_B | (kept_BG & ends_BG).any(axis=1) | (written_B >= writing.limit_B),
            seen_BV=seen_BV,
        )
        return taken + 1, writing, chunk

    _, writing, chunk = jax.lax.while_loop(going, advance, (jnp.int32(0), writing, nothing))
    return writing, chunk
