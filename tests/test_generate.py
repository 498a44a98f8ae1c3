"""Laws of the searches, on toy models small enough to try every output."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.errors import UserError
from transformer_jax.generate import beam_search, greedy

PAD, BOS, EOS = 0, 1, 2
V = 6
T = 4
WORDS = [token for token in range(V) if token not in (PAD, BOS)]
ALL = 256  # at least the V * 3^(T-1) candidates of a step: no beam is ever dropped
WIDTH = 5
RNN_SHAPES = (V, WIDTH), (WIDTH, WIDTH), (WIDTH, V)
Outputs = list[tuple[float, tuple[int, ...]]]


def markov(state: jax.Array, table_RTVV: jax.Array, token_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits depend on the sentence, the position (the state) and the previous token."""
    rows = jnp.arange(token_R.shape[0])
    return table_RTVV[rows, state, token_R], state + 1


def markov_inputs(seed: int, batch: int, steps: int = T, scale: float = 1.5) -> tuple[jax.Array, jax.Array]:
    table = np.random.default_rng(seed).normal(0, scale, (batch, steps, V, V)).astype(np.float32)
    return jnp.zeros(batch, jnp.int32), jnp.asarray(table)


def rnn(hidden_RW: jax.Array, memory_RW: jax.Array, token_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits depend on all tokens so far, so a wrongly reordered beam shows."""
    keys = jax.random.split(jax.random.key(0), 3)
    embed, recur, out = (1.2 * jax.random.normal(k, s) for k, s in zip(keys, RNN_SHAPES, strict=True))
    hidden_RW = jnp.tanh(embed[token_R] + hidden_RW @ recur + memory_RW)
    return 2 * hidden_RW @ out, hidden_RW


def rnn_inputs(seed: int, batch: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((batch, WIDTH)), jax.random.normal(jax.random.key(seed), (batch, WIDTH))


MODELS = {"markov": (markov, markov_inputs), "rnn": (rnn, rnn_inputs)}


@functools.partial(jax.jit, static_argnames=("model", "beams", "alpha", "steps"))
def beam(model: str, state: Any, memory: Any, limit: Any, *, beams: int, alpha: float, steps: int = T) -> Any:
    step = MODELS[model][0]
    return beam_search(step, state, memory, limit_B=limit, max_steps=steps, beams=beams, length_penalty=alpha)


@functools.partial(jax.jit, static_argnames=("model", "alpha", "steps"))
def greed(model: str, state: Any, memory: Any, limit: Any, *, alpha: float, steps: int = T) -> Any:
    return greedy(MODELS[model][0], state, memory, limit_B=limit, max_steps=steps, length_penalty=alpha)


def log_probs_after(model: str, state: Any, memory: Any, prefix: tuple[int, ...]) -> np.ndarray:
    """Log p of the next token after `prefix`, of a batch of one."""
    step = MODELS[model][0]
    for token in (BOS, *prefix):
        logits, state = step(state, memory, jnp.array([token]))
    z = np.asarray(logits[0], np.float64)
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def normalised(log_prob: float, length: int, alpha: float) -> float:
    return log_prob / ((5 + length) / 6) ** alpha


def every_output(model: str, state: Any, memory: Any, limit: int, alpha: float) -> Outputs:
    """Score all outputs that end in eos, or at the limit, best first."""
    after = functools.cache(lambda prefix: log_probs_after(model, state, memory, prefix))
    found = []
    for length in range(1, limit + 1):
        for tokens in itertools.product(WORDS, repeat=length):
            if EOS in tokens[:-1] or (tokens[-1] != EOS and length < limit):
                continue
            log_prob = sum(after(tokens[:t])[tokens[t]] for t in range(length))
            found.append((normalised(log_prob, length, alpha), tokens))
    return sorted(found, reverse=True)


def plain_search(model: str, state: Any, memory: Any, limit: int, *, beams: int, alpha: float) -> Outputs:
    """Beam search in lists, which always writes up to the limit."""
    after = functools.cache(lambda prefix: log_probs_after(model, state, memory, prefix))
    alive: Outputs = [(0.0, ())]
    closed = []
    for length in range(1, limit + 1):
        candidates = [(p + after(prefix)[token], (*prefix, token)) for p, prefix in alive for token in WORDS]
        candidates.sort(reverse=True)
        best = candidates[:beams]
        closed += [(normalised(p, length, alpha), tokens) for p, tokens in best if tokens[-1] == EOS or length == limit]
        alive = [(p, tokens) for p, tokens in candidates if tokens[-1] != EOS][:beams]
    return sorted(closed, reverse=True)[:beams]


def row(tree: Any, b: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[b : b + 1], tree)


def unpad(tokens: np.ndarray) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens if token != PAD)


def assert_same(tokens_MT: jax.Array, scores_M: jax.Array, expected: Outputs) -> None:
    found = len(expected)
    assert np.all(np.diff(scores_M[:found]) <= 0)
    assert {unpad(tokens) for tokens in np.asarray(tokens_MT[:found])} == {tokens for _, tokens in expected}
    # float32 carries log p = -0.003 as a difference of logits of about 10, hence the absolute term.
    np.testing.assert_allclose(scores_M[:found], [score for score, _ in expected], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(tokens_MT[found:]) == PAD)
    assert np.all(np.asarray(scores_M[found:]) == -np.inf)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.7])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), limits=st.lists(st.integers(1, T), min_size=2, max_size=2))
def test_wide_beam_is_brute_force(model: str, alpha: float, seed: int, limits: list[int]) -> None:
    state, memory = MODELS[model][1](seed, 2)
    tokens_BMT, scores_BM = beam(model, state, memory, jnp.array(limits), beams=ALL, alpha=alpha)
    for b, limit in enumerate(limits):
        expected = every_output(model, row(state, b), row(memory, b), limit, alpha)
        assert_same(tokens_BMT[b], scores_BM[b], expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("beams", "alpha"), [(1, 0.6), (2, 0.0), (3, 0.6), (4, 2.5)])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), limits=st.lists(st.integers(0, T + 2), min_size=3, max_size=3))
def test_stopping_early_changes_nothing(model: str, beams: int, alpha: float, seed: int, limits: list[int]) -> None:
    state, memory = MODELS[model][1](seed, 3)
    tokens_BMT, scores_BM = beam(model, state, memory, jnp.array(limits), beams=beams, alpha=alpha)
    for b, limit in enumerate(limits):
        within = min(max(limit, 1), T)
        expected = plain_search(model, row(state, b), row(memory, b), within, beams=beams, alpha=alpha)
        assert_same(tokens_BMT[b], scores_BM[b], expected)


def eos_from(position: int, steps: int) -> jax.Array:
    """A Markov table that surely writes word 3, and from one position on surely eos."""
    table = np.zeros((1, steps, V, V), np.float32)
    table[..., 3] = 30.0
    table[:, position:, :, EOS] = 60.0
    return jnp.asarray(table)


@pytest.mark.parametrize("search", [greedy, functools.partial(beam_search, beams=2)])
def test_stops_as_soon_as_every_sentence_is_done(search: Any) -> None:
    calls = []

    def counted(state: jax.Array, memory: jax.Array, token_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: calls.append(1))
        return markov(state, memory, token_R)

    steps, state = 40, jnp.zeros(2, jnp.int32)
    memory = jnp.concatenate([eos_from(2, steps), eos_from(6, steps)])
    tokens, _ = search(counted, state, memory, limit_B=jnp.array([steps, steps]), max_steps=steps, length_penalty=0.0)
    jax.effects_barrier()
    best_BT = np.asarray(tokens).reshape(2, -1, steps)[:, 0]
    assert [unpad(best) for best in best_BT] == [(3, 3, EOS), (3, 3, 3, 3, 3, 3, EOS)]
    assert len(calls) == 7


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(model: str, seed: int) -> None:
    state, memory = MODELS[model][1](seed, 5)
    limits = jnp.array([1, 2, 4, 3, 4])
    tokens_BMT, scores_BM = beam(model, state, memory, limits, beams=1, alpha=0.0)
    tokens_BT, scores_B = greed(model, state, memory, limits, alpha=0.0)
    np.testing.assert_array_equal(tokens_BMT[:, 0], tokens_BT)
    np.testing.assert_allclose(scores_BM[:, 0], scores_B, rtol=1e-6)
    for b, limit in enumerate(limits.tolist()):
        expected = plain_search(model, row(state, b), row(memory, b), limit, beams=1, alpha=0.0)
        assert_same(tokens_BT[b : b + 1], scores_B[b : b + 1], expected)


def test_one_beam_scores_at_least_as_greedy_under_a_length_penalty() -> None:
    state, memory = markov_inputs(0, 64)
    limit = jnp.full(64, T)
    tokens_BT, scores_B = greed("markov", state, memory, limit, alpha=2.0)
    gain_B = beam("markov", state, memory, limit, beams=1, alpha=2.0)[1][:, 0] - scores_B
    assert np.all(gain_B >= -1e-6)
    assert np.any(gain_B > 0.01)
    same_BT, log_prob_B = greed("markov", state, memory, limit, alpha=0.0)
    np.testing.assert_array_equal(same_BT, tokens_BT)
    lengths = [len(unpad(tokens)) for tokens in np.asarray(tokens_BT)]
    expected = [normalised(p, length, 2.0) for p, length in zip(log_prob_B.tolist(), lengths, strict=True)]
    np.testing.assert_allclose(scores_B, expected, rtol=1e-6)


def test_a_long_continuation_may_still_beat_a_closed_hypothesis() -> None:
    """At once eos (p = 0.6), or word 3 up to the limit (0.4): the bound must use the limit, not the present length."""
    steps = 12
    table = np.full((1, steps, V, V), -1e9, np.float32)
    table[:, 0, :, EOS], table[:, 0, :, 3] = math.log(0.6), math.log(0.4)
    table[:, 1:, :, 3] = 0.0
    inputs = jnp.zeros(1, int), jnp.asarray(table), jnp.array([steps])
    tokens_BMT, scores_BM = beam("markov", *inputs, beams=1, alpha=2.5, steps=steps)
    assert unpad(tokens_BMT[0, 0]) == (3,) * steps
    np.testing.assert_allclose(scores_BM[0, 0], normalised(math.log(0.4), steps, 2.5), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_no_beam_count_beats_the_exhaustive_one(alpha: float) -> None:
    inputs = *markov_inputs(3, 12), jnp.full(12, T)
    one, few, everything, more = (
        np.asarray(beam("markov", *inputs, beams=beams, alpha=alpha)[1][:, 0]) for beams in (1, 4, ALL, 2 * ALL)
    )
    np.testing.assert_allclose(everything, more, rtol=1e-6)
    assert np.all(one <= everything + 1e-6)
    assert np.all(few <= everything + 1e-6)
    assert np.any(one < everything - 0.01), "an easy case: nothing was tested"


@pytest.mark.optimised
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("search", [greed, functools.partial(beam, beams=1), functools.partial(beam, beams=3)])
def test_a_batch_is_its_sentences_one_by_one(model: str, search: Any) -> None:
    state, memory = MODELS[model][1](11, 6)
    limit = jnp.array([4, 1, 3, 2, 4, 4])
    tokens_B, scores_B = search(model, state, memory, limit, alpha=0.6)
    for b in range(6):
        tokens, scores = search(model, row(state, b), row(memory, b), row(limit, b), alpha=0.6)
        np.testing.assert_array_equal(tokens[0], tokens_B[b])
        np.testing.assert_allclose(scores[0], scores_B[b], rtol=1e-6)


@pytest.mark.parametrize("search", [greed, functools.partial(beam, beams=4)])
def test_pad_and_bos_are_never_written_and_pad_follows_eos(search: Any) -> None:
    state, memory = markov_inputs(5, 20, steps=9, scale=1.0)
    memory = memory.at[..., PAD].add(20.0).at[..., BOS].add(20.0)
    limit = np.arange(20) % 9 + 1
    tokens_BXT = np.asarray(search("markov", state, memory, limit, alpha=0.6, steps=9)[0]).reshape(20, -1, 9)
    for tokens_XT, bound in zip(tokens_BXT, limit, strict=True):
        for tokens in tokens_XT:
            written = unpad(tokens)
            assert BOS not in written
            assert EOS not in written[:-1]
            assert 1 <= len(written) <= bound
            assert written[-1] == EOS or len(written) == bound
            assert np.all(tokens[len(written) :] == PAD)


def test_memory_is_a_constant_of_the_loop() -> None:
    state, memory = markov_inputs(0, 2)
    search = functools.partial(beam_search, markov, max_steps=T, beams=3)
    program = jax.make_jaxpr(lambda s, m, limit: search(s, m, limit_B=limit))(state, memory, jnp.array([T, T]))
    (loop,) = (e for e in program.jaxpr.eqns if e.primitive.name == "while")
    constants = loop.params["cond_nconsts"] + loop.params["body_nconsts"]
    repeated = (6, *memory.shape[1:])
    assert [v.aval.shape for v in loop.invars[:constants]].count(repeated) == 1
    assert repeated not in [v.aval.shape for v in loop.invars[constants:]]


def test_scores_by_hand() -> None:
    table = np.full((1, T, V, V), -1e9, np.float32)
    table[:, 0, :, 4], table[:, 0, :, 5] = math.log(0.25), math.log(0.75)
    table[:, 1:, :, EOS] = 0.0
    tokens_BMT, scores_BM = beam("markov", jnp.zeros(1, int), jnp.asarray(table), jnp.array([T]), beams=2, alpha=0.6)
    assert tokens_BMT.tolist() == [[[5, EOS, PAD, PAD], [4, EOS, PAD, PAD]]]
    expected = [math.log(0.75) / (7 / 6) ** 0.6, math.log(0.25) / (7 / 6) ** 0.6]
    np.testing.assert_allclose(scores_BM[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "at least one beam"),
        ({"max_steps": 0}, "one step"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"limit_B": jnp.array(3)}, "limit_B"),
        ({"limit_B": jnp.array([3, 3, 3])}, "state has shape"),
        ({"memory_B": {"keys": jnp.zeros((4, 2))}}, r"memory\['keys'\] has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    state, memory = markov_inputs(0, 2)
    arguments = {"state_B": state, "memory_B": memory, "limit_B": jnp.array([3, 3]), "max_steps": T} | change
    with pytest.raises(UserError, match=message):
        beam_search(markov, **arguments)
