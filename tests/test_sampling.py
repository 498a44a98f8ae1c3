"""Laws of sampling: what the filters keep, what is drawn, and that the loop may be cut anywhere."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from transformer_jax.errors import UserError
from transformer_jax.sampling import Filters, Sampling, Writing, draw, filtered, one_token, write

V = 7
LOGITS = np.log([0.05, 0.4, 0.1, 0.2, 0.04, 0.2, 0.01])
probabilities = st.lists(st.integers(0, 20), min_size=V, max_size=V).filter(any)


def kept(logits: Any, **filters: Any) -> set[int]:
    x_BV = filtered(jnp.asarray(logits, jnp.float32)[None], Filters(**filters))
    return set(np.flatnonzero(np.isfinite(x_BV[0])).tolist())


def test_top_k_keeps_the_best_and_what_ties_with_the_last() -> None:
    assert kept(LOGITS, top_k=1) == {1}
    assert kept(LOGITS, top_k=2) == {1, 3, 5}
    assert kept(LOGITS, top_k=3) == {1, 3, 5}
    assert kept(LOGITS, top_k=4) == {1, 3, 5, 2}
    assert kept(LOGITS, top_k=V) == set(range(V))


@given(probabilities, st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(weights: list[int], p: float) -> None:
    mass = np.asarray(weights) / sum(weights)
    with np.errstate(divide="ignore"):
        chosen = sorted(kept(np.log(mass), top_p=p), key=lambda token: -mass[token])
    assert mass[chosen].sum() >= p - 1e-5
    assert mass[chosen[:-1]].sum() < p + 1e-5, "without its least probable token the set reaches p: it is not smallest"
    left = [mass[token] for token in range(V) if token not in chosen]
    assert not left or max(left) <= mass[chosen[-1]]


def test_top_p_keeps_the_token_that_crosses() -> None:
    assert kept(LOGITS, top_p=0.39) == {1}
    assert kept(LOGITS, top_p=0.41) == {1, 3}
    assert kept(LOGITS, top_p=0.61) == {1, 3, 5}


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    assert kept(LOGITS, min_p=0.49) == {1, 3, 5}
    assert kept(LOGITS, min_p=0.51) == {1}
    assert kept(LOGITS, min_p=0.24) == {1, 3, 5, 2}
    assert kept(LOGITS, min_p=1.0) == {1}


def test_filters_apply_in_the_order_of_transformers() -> None:
    # The temperature comes first: at 2 the mass of the best token is sqrt(0.4) / sum of roots = 0.26 < 0.3.
    roots = np.exp(LOGITS / 2)
    assert 0.2 < roots[1] / roots.sum() < 0.3
    assert kept(LOGITS, top_p=0.3) == {1}
    assert kept(LOGITS, temperature=2.0, top_p=0.3) == {1, 3}
    # top-k before top-p: of the three that are left, 0.4 / 0.8 are the best one's.
    assert kept(LOGITS, top_k=3, top_p=0.49) == {1}
    assert kept(LOGITS, top_p=0.49) == {1, 3}


def test_the_repetition_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits_BV = jnp.asarray([[2.0, -2.0, 1.0, -1.0, 0.0, 3.0, 4.0]])
    seen_BV = jnp.asarray([[True, True, False, False, True, False, True]])
    penalised_BV = filtered(logits_BV, Filters(repetition_penalty=1.25), seen_BV)
    np.testing.assert_allclose(penalised_BV[0], [1.6, -2.5, 1.0, -1.0, 0.0, 3.0, 3.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("filters", "exact"),
    [
        ({"temperature": 1.0}, np.exp(LOGITS)),
        ({"temperature": 0.6}, np.exp(LOGITS / 0.6)),
        ({"temperature": 1.5, "top_k": 4}, np.exp(LOGITS / 1.5) * [0, 1, 1, 1, 0, 1, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, np.exp(LOGITS) * [0, 1, 0, 1, 0, 1, 0]),
        ({"temperature": 1.0, "min_p": 0.2}, np.exp(LOGITS) * [0, 1, 1, 1, 0, 1, 0]),
    ],
)
def test_tokens_are_drawn_with_the_exact_probabilities(filters: dict[str, float], exact: np.ndarray) -> None:
    rows = 20_000
    keys_B = jax.random.split(jax.random.key(3), rows)
    x_BV = filtered(jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (rows, V)), Filters(**filters))
    count_V = np.bincount(draw(keys_B, x_BV, Filters(**filters)), minlength=V)
    possible = exact > 0
    assert count_V[~possible].sum() == 0
    expected = rows * exact[possible] / exact.sum()
    assert stats.chisquare(count_V[possible], expected).pvalue > 1e-3


def test_temperature_zero_is_the_most_probable_token() -> None:
    filters = Sampling(temperature=0.0, top_k=3, top_p=0.5).filters()
    assert filters == Filters()
    assert draw(jax.random.split(jax.random.key(0), 1), jnp.asarray(LOGITS)[None], filters).tolist() == [1]


STEPS = 9


def chain(state: tuple[jax.Array, jax.Array], token_B: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Logits depend on the row, the place and the token before; the last token of the vocabulary is the end."""
    table_BTVV, place_B = state
    rows = jnp.arange(len(token_B))
    return table_BTVV[rows, jnp.minimum(place_B, STEPS - 1), token_B], (table_BTVV, place_B + 1)


def begin(rows: int, limit: Any, first: int = 0, penalised: bool = False) -> Writing:
    table_BTVV = jax.random.normal(jax.random.key(1), (8, STEPS, V, V))[first : first + rows]
    seen_BV = jnp.zeros((rows, V), bool).at[:, 0].set(True) if penalised else None
    key_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(5), jnp.arange(first, first + rows))
    zeros = jnp.zeros(rows, jnp.int32)
    limit_B = jnp.asarray(limit, jnp.int32)
    return Writing((table_BTVV, zeros), zeros, key_B, zeros, limit_B, limit_B <= 0, seen_BV)


@functools.partial(jax.jit, static_argnames="alternatives")
def run(writing: Writing, turns: int, filters: Filters, alternatives: int = 0) -> Any:
    options = {"capacity": STEPS, "width": 1, "eos": V - 1, "pad": 0, "alternatives": alternatives}
    return write(one_token(chain, filters, alternatives), writing, turns=turns, **options)


def written(chunks: list[Any], row: int) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens_BC[row, : chunk.count_B[row]].tolist()]


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_how_turns_are_cut_into_calls_changes_nothing(penalty: float | None) -> None:
    filters, limits = Filters(temperature=1.3, repetition_penalty=penalty), [7, 9, 3, 0, 9]
    _, whole = run(begin(5, limits, penalised=bool(penalty)), STEPS, filters)
    writing, chunks = begin(5, limits, penalised=bool(penalty)), []
    for turns in (1, 3, 2, 9):
        writing, chunk = run(writing, turns, filters)
        chunks.append(chunk)
    assert bool(writing.closed_B.all())
    for row, limit in enumerate(limits):
        tokens = written(chunks, row)
        assert tokens == written([whole], row)
        assert len(tokens) <= limit
        assert len(tokens) == limit or tokens[-1] == V - 1
        assert V - 1 not in tokens[:-1]
        assert set(whole.tokens_BC[row, len(tokens) :].tolist()) <= {0}, "pad follows the end"


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    filters, limits = Filters(temperature=1.0), [7, 9, 3, 5, 9]
    _, together = run(begin(5, limits), STEPS, filters)
    for row, limit in enumerate(limits):
        _, alone = run(begin(1, [limit], first=row), STEPS, filters)
        assert written([alone], 0) == written([together], row)


def test_log_probabilities_are_those_of_the_model_before_any_filter() -> None:
    filters = Filters(temperature=0.5, top_k=3)
    _, chunk = run(begin(5, [9] * 5), STEPS, filters, alternatives=2)
    table_BTVV, _ = begin(5, [9] * 5).state
    ranked_BCN, ranked_log_prob_BCN = chunk.ranked_BCN
    for row in range(5):
        last = 0
        for place, token in enumerate(written([chunk], row)):
            log_probs_V = jax.nn.log_softmax(table_BTVV[row, place, last])
            assert math.isclose(chunk.log_prob_BC[row, place], log_probs_V[token], rel_tol=1e-5)
            best = np.argsort(-log_probs_V)[:2]
            assert ranked_BCN[row, place].tolist() == best.tolist()
            np.testing.assert_allclose(ranked_log_prob_BCN[row, place], log_probs_V[best], rtol=1e-5)
            last = token


def test_the_penalty_reaches_tokens_as_they_are_written() -> None:
    filters = Filters(repetition_penalty=1e6)  # greedy, and nothing twice while anything is left
    _, chunk = run(begin(5, [5] * 5, penalised=True), STEPS, filters)
    table_BTVV, _ = begin(5, [5] * 5).state
    for row in range(5):
        seen, last = {0}, 0
        for place, token in enumerate(written([chunk], row)):
            x_V = np.asarray(table_BTVV[row, place, last], np.float64)
            x_V = np.where(np.isin(np.arange(V), list(seen)), np.where(x_V > 0, x_V / 1e6, x_V * 1e6), x_V)
            assert token == x_V.argmax()
            seen.add(token)
            last = token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "--temperature must be at least 0"),
        ({"temperature": math.nan}, "--temperature"),
        ({"top_k": V + 1}, f"vocabulary of {V}, got {V + 1}"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"min_p": -0.2}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
    ],
)
def test_bad_values_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**change).check(V)
