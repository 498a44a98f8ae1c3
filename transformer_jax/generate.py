"""Search for the best output of a sequence-to-sequence model: greedy and beam, pure and jittable.

Nothing here knows a model. The caller gives a `Step`, the probability of the next token, and two pytrees:

    state    what changes as tokens are written (a decoder's key/value cache, the hidden state of an RNN).
             Every leaf has the rows as its leading dimension; reordering beams is `leaf[index_R]`.
    memory   what stays (the encoder's keys and values, the padding mask). Every leaf has the rows as its leading
             dimension too, but it is repeated once, before the search, and never reordered: all beams of a
             sentence see the same. Use `()` if there is none.

What is the same for all sentences (parameters) belongs in the closure of the step. Shapes: B sentences, M beams,
R = B * M rows (sentence 0's beams first), T longest output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.errors import UserError

State = Any
Memory = Any
Step = Callable[[State, Memory, jax.Array], tuple[jax.Array, State]]
"""(state, memory, token_R int32) -> (logits_RV of the next token, state after the token)."""


class _Greedy(NamedTuple):
    length: jax.Array
    state_B: State
    last_B: jax.Array
    tokens_BT: jax.Array
    log_prob_B: jax.Array
    length_B: jax.Array
    closed_B: jax.Array


def greedy(
    step: Step,
    state_B: State,
    memory_B: Memory,
    *,
    limit_B: jax.Array,
    max_steps: int,
    length_penalty: float = 0.6,
    bos: int = 1,
    eos: int = 2,
    pad: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Write the most probable token until eos or the limit; stops when every row has.

    Arguments, scores and errors are those of `beam_search`.

    Returns:
        tokens_BT: int32, T = max_steps, without bos, pad after eos.
        scores_B: float32.
    """
    _check(state_B, memory_B, limit_B, max_steps=max_steps, beams=1, length_penalty=length_penalty)
    limit_B = jnp.clip(limit_B, 1, max_steps)
    B = limit_B.shape[0]

    def going(s: _Greedy) -> jax.Array:
        return ~jnp.all(s.closed_B)

    def advance(s: _Greedy) -> _Greedy:
        logits_BV, state_B = step(s.state_B, memory_B, s.last_B)
        log_probs_BV = _log_probs(logits_BV, never=(bos, pad))
        best_B = jnp.argmax(log_probs_BV, axis=-1).astype(jnp.int32)
        token_B = jnp.where(s.closed_B, pad, best_B)
        gain_B = jnp.where(s.closed_B, 0.0, jnp.max(log_probs_BV, axis=-1))
        length = s.length + 1
        return _Greedy(
            length=length,
            state_B=state_B,
            last_B=token_B,
            tokens_BT=s.tokens_BT.at[:, s.length].set(token_B),
            log_prob_B=s.log_prob_B + gain_B,
            length_B=jnp.where(s.closed_B, s.length_B, length),
            closed_B=s.closed_B | (token_B == eos) | (length >= limit_B),
        )

    start = _Greedy(
        length=jnp.int32(0),
        state_B=state_B,
        last_B=jnp.full(B, bos, jnp.int32),
        tokens_BT=jnp.full((B, max_steps), pad, jnp.int32),
        log_prob_B=jnp.zeros(B, jnp.float32),
        length_B=jnp.zeros(B, jnp.int32),
        closed_B=jnp.zeros(B, bool),
    )
    end = jax.lax.while_loop(going, advance, start)
    return end.tokens_BT, end.log_prob_B / _penalty(end.length_B, length_penalty)


class _Beams(NamedTuple):
    length: jax.Array
    state_R: State
    last_R: jax.Array
    alive_BMT: jax.Array
    log_prob_BM: jax.Array  # of the alive; -inf: no hypothesis here
    closed_BMT: jax.Array
    score_BM: jax.Array  # of the closed, best first; -inf: no hypothesis here


def beam_search(
    step: Step,
    state_B: State,
    memory_B: Memory,
    *,
    limit_B: jax.Array,
    max_steps: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    bos: int = 1,
    eos: int = 2,
    pad: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Keep the best M hypotheses while writing; return the best M that were closed.

    The search of Vaswani 2017, section 6.1 (there 4 beams, alpha 0.6, limit = input length + 50). The score of a
    hypothesis is log p / ((5 + length) / 6)^alpha (Wu 2016, equation 14), its length counting eos. At each step the
    best M continuations of a sentence are taken: those that end in eos are closed, and the best M others live on.
    Requiring eos to be among the best M is what keeps short outputs of tiny probability out (the most probable
    output of a translation model is often the empty one: Stahlberg and Byrne 2019). A hypothesis that reaches its
    limit without eos is closed as it is and competes by the same score.

    A sentence is done when no living hypothesis, were all its further tokens certain, could still beat the worst of
    its M closed ones; the loop stops when all are. This changes no result. One beam keeps looking where `greedy`
    stops, so for alpha > 0 its score can be higher; for alpha = 0 the two agree.

    Args:
        step: the model, called with R = B * M rows.
        state_B: pytree before the first token; each sentence is repeated M times here.
        memory_B: pytree of constants, likewise repeated.
        limit_B: longest output of each sentence, eos included; taken into [1, max_steps].
        max_steps: T, the width of the result.
        beams: M.
        length_penalty: alpha, at least 0.
        bos: token the first step is given; never written.
        eos: token that ends a hypothesis.
        pad: fills the result after eos; never written otherwise.

    Returns:
        tokens_BMT: int32, best first, without bos. A slot for which no hypothesis exists (fewer than M sequences
            are possible) is all pad.
        scores_BM: float32; -inf for such a slot.

    Raises:
        UserError: beams or max_steps below 1, a negative length penalty, or a leaf whose leading dimension is not B.
    """
    _check(state_B, memory_B, limit_B, max_steps=max_steps, beams=beams, length_penalty=length_penalty)
    limit_B = jnp.clip(limit_B, 1, max_steps)
    B, M = limit_B.shape[0], beams
    memory_R = _repeat(memory_B, M)
    longest_B = _penalty(limit_B, length_penalty)

    def going(s: _Beams) -> jax.Array:
        # log p only falls and the divisor only grows, so this bounds every continuation of the living.
        reachable_B = jnp.max(s.log_prob_BM, axis=-1) / longest_B
        return jnp.any(reachable_B > s.score_BM[:, -1])

    def advance(s: _Beams) -> _Beams:
        logits_RV, state_R = step(s.state_R, memory_R, s.last_R)
        V = logits_RV.shape[-1]
        length = s.length + 1

        log_probs_BMV = _log_probs(logits_RV, never=(bos, pad)).reshape(B, M, V)
        totals_BX = (s.log_prob_BM[:, :, None] + log_probs_BMV).reshape(B, M * V)
        # Each beam has one eos, so the best 2M hold at least M continuations that live on. X: the 2M candidates.
        total_BX, index_BX = jax.lax.top_k(totals_BX, min(2 * M, M * V))
        parent_BX, token_BX = index_BX // V, (index_BX % V).astype(jnp.int32)
        tokens_BXT = _take(s.alive_BMT, parent_BX).at[:, :, s.length].set(token_BX)

        full_B1 = (length >= limit_B)[:, None]
        closes_BX = ((token_BX == eos) | full_B1) & (jnp.arange(token_BX.shape[1]) < M)
        score_BX = jnp.where(closes_BX, total_BX / _penalty(length, length_penalty), -jnp.inf)
        score_BM, closed_BM = jax.lax.top_k(jnp.concatenate([s.score_BM, score_BX], axis=1), M)
        closed_BMT = _take(jnp.concatenate([s.closed_BMT, tokens_BXT], axis=1), closed_BM)

        lives_BX = (token_BX != eos) & ~full_B1
        log_prob_BM, alive_BM = jax.lax.top_k(jnp.where(lives_BX, total_BX, -jnp.inf), M)
        parent_R = (_take(parent_BX, alive_BM) + M * jnp.arange(B)[:, None]).reshape(B * M)
        return _Beams(
            length=length,
            state_R=jax.tree.map(lambda leaf: leaf[parent_R], state_R),
            last_R=_take(token_BX, alive_BM).reshape(B * M),
            alive_BMT=_take(tokens_BXT, alive_BM),
            log_prob_BM=log_prob_BM,
            closed_BMT=closed_BMT,
            score_BM=score_BM,
        )

    nothing_BMT = jnp.full((B, M, max_steps), pad, jnp.int32)
    start = _Beams(
        length=jnp.int32(0),
        state_R=_repeat(state_B, M),
        last_R=jnp.full(B * M, bos, jnp.int32),
        alive_BMT=nothing_BMT,
        log_prob_BM=jnp.full((B, M), -jnp.inf).at[:, 0].set(0.0),  # the M copies are one hypothesis
        closed_BMT=nothing_BMT,
        score_BM=jnp.full((B, M), -jnp.inf),
    )
    end = jax.lax.while_loop(going, advance, start)
    return end.closed_BMT, end.score_BM


def _log_probs(logits_RV: jax.Array, never: tuple[int, ...]) -> jax.Array:
    """Return log p in float32, -inf for the tokens that are never written; the others keep the model's values."""
    log_probs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32))
    return log_probs_RV.at[:, jnp.array(never)].set(-jnp.inf)


def _penalty(length: jax.Array, alpha: float) -> jax.Array:
    return ((5.0 + length) / 6.0) ** alpha


def _take(x_BX: jax.Array, index_BY: jax.Array) -> jax.Array:
    """Return x[b, index[b, y]], whatever dimensions follow."""
    return jax.vmap(lambda x, index: x[index])(x_BX, index_BY)


def _repeat(tree: Any, beams: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), tree)


def _check(
    state_B: State, memory_B: Memory, limit_B: jax.Array, *, max_steps: int, beams: int, length_penalty: float
) -> None:
    if beams < 1 or max_steps < 1:
        raise UserError(f"A search needs at least one beam and one step, got beams {beams}, max_steps {max_steps}.")
    if length_penalty < 0:
        raise UserError(f"length_penalty must be at least 0, got {length_penalty}.")
    if limit_B.ndim != 1:
        raise UserError(f"limit_B must hold one number for each sentence, got shape {limit_B.shape}.")
    for name, tree in (("state", state_B), ("memory", memory_B)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.shape(leaf)[:1] != limit_B.shape:
                where = f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}"
                raise UserError(f"{where}; its first dimension must be the {limit_B.shape[0]} sentences.")
