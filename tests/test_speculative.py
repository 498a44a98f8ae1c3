"""Laws of speculative decoding: whatever the draft, the text is the target's; only the time differs."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.tiny_gpt import BYTES, GPT2, MODERN, completer
from transformer_jax.completion import Completer
from transformer_jax.config import MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.generation import Completion, Generation, Speed
from transformer_jax.models.gpt import DecoderState
from transformer_jax.sampling import Filters, Writing, filtered, write
from transformer_jax.speculative import Pair, speculative

GREEDY = Generation(max_tokens=100, temperature=0.0)
PROMPTS = ["Give me ", "W", "Have mercy, Jesu! Soft", "", "Was ever woman in this humour woo'd? Was ev"]


@cache
def target() -> Completer:
    return completer(MODERN)


@cache
def plain() -> list[Completion]:
    return list(target().complete_all(PROMPTS, GREEDY))


def near(amount: float) -> Completer:
    """A model whose parameters are a little off the target's."""
    other = completer(MODERN, seed=8).load()
    mixed = jax.tree.map(lambda a, b: (1 - amount) * a + amount * b, target().load(), other)
    return replace(target(), load=lambda: mixed)


DRAFTS = {
    "itself": lambda: near(0.0),
    "near": lambda: near(0.03),
    "other": lambda: completer(replace(GPT2, context=24)),
}


def acceptance(draft: str) -> float:
    """Write with a draft; the law is that the text is the same, up to the end of the context."""
    speed = Speed()
    rows = list(target().drafted_by(DRAFTS[draft](), 3).complete_all(PROMPTS, GREEDY, speed))
    assert [(row.tokens, row.text, row.finish) for row in rows] == [(r.tokens, r.text, r.finish) for r in plain()]
    for row, other in zip(rows, plain(), strict=True):
        np.testing.assert_allclose(row.log_probs, other.log_probs, rtol=1e-3, atol=1e-4)
    return speed.acceptance


def test_greedy_text_is_token_identical_whatever_the_draft() -> None:
    assert {row.finish for row in plain()} == {"eos", "context"}, "an easy case: rows end in one way only"
    assert acceptance("itself") == 1.0
    assert acceptance("other") < acceptance("near") < 1.0


def test_eight_devices_draft_as_one_does() -> None:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    many = completer(MODERN, mesh=mesh, devices=8).drafted_by(completer(MODERN, seed=8, mesh=mesh, devices=8), 3)
    assert [row.tokens for row in many.complete_all(PROMPTS, GREEDY)] == [row.tokens for row in plain()]


V, ROWS, LONGEST = 4, 40_000, 3
TABLES = np.random.default_rng(2).normal(0, 1.2, (2, LONGEST + 4, V, V)).astype(np.float32)


def chain(table_SVV: Any, state: DecoderState, tokens_BT: jax.Array) -> tuple[jax.Array, DecoderState]:
    """Logits depend on place and token, so that a token read at a wrong place shows."""
    place_BT = state.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    logits_BTV = jnp.asarray(table_SVV)[jnp.minimum(place_BT, LONGEST + 3), tokens_BT]
    return logits_BTV, state._replace(length_B=state.length_B + tokens_BT.shape[1])


def exact(filters: Filters) -> dict[tuple[int, ...], float]:
    """Probability of every text of three tokens after token 0 by the target alone; token 3 ends a text."""
    found: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(V), repeat=LONGEST):
        seen, last, probability, written = {0}, 0, 1.0, ()
        for place, token in enumerate(text):
            seen_BV = jnp.asarray([[i in seen for i in range(V)]])
            x_V = np.asarray(filtered(jnp.asarray(TABLES[0, place, last])[None], filters, seen_BV)[0], np.float64)
            probability *= np.exp(x_V[token]) / np.exp(x_V).sum()
            written, last = (*written, token), token
            seen.add(token)
            if token == V - 1:
                break
        found[written] = probability
    return {text: probability for text, probability in found.items() if probability > 0}


def sample(filters: Filters, rows: int) -> Any:
    """Draw texts of the target, two tokens of which the other chain drafts a turn."""
    zeros = jnp.zeros(rows, jnp.int32)
    seen_BV = jnp.zeros((rows, V), bool).at[:, 0].set(True) if filters.repetition_penalty else None
    key_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(1), jnp.arange(rows))
    state = Pair(DecoderState([], zeros), DecoderState([], zeros))
    writing = Writing(state, zeros, key_B, zeros, jnp.full(rows, LONGEST), zeros > 0, seen_BV)
    turn = speculative(*(functools.partial(chain, table) for table in TABLES), 2, filters)
    options = {"capacity": LONGEST, "width": 3, "eos": V - 1, "pad": 0, "alternatives": 0}
    return jax.jit(lambda writing: write(turn, writing, turns=LONGEST, **options))(writing)[1]


@pytest.mark.parametrize(
    "filters",
    [
        Filters(temperature=1.0),
        Filters(temperature=0.7, top_k=3, repetition_penalty=1.5),
    ],
)
def test_sampled_text_has_the_distribution_of_the_target_alone(filters: Filters) -> None:
    chunk = sample(filters, ROWS)
    texts, counts = np.unique(
        np.where(np.arange(9) < chunk.count_B[:, None], chunk.tokens_BC, -1), axis=0, return_counts=True
    )
    observed = {tuple(int(i) for i in text if i >= 0): int(count) for text, count in zip(texts, counts, strict=True)}
    expected = exact(filters)
    assert observed.keys() <= expected.keys()
    common = {text for text, probability in expected.items() if ROWS * probability >= 5}
    pairs = [(observed.get(text, 0), ROWS * expected[text]) for text in sorted(common)]
    rest = ROWS - sum(a for a, _ in pairs), ROWS - sum(b for _, b in pairs)
    a, b = zip(*pairs, *([rest] if rest[1] > 1e-6 else []), strict=True)
    assert stats.chisquare(a, b, sum_check=False).pvalue > 1e-3
    accepted = (chunk.offered_B - chunk.turns_B).sum() / (2 * chunk.turns_B.sum())
    assert 0.2 < accepted < 0.9, "the draft is neither perfect nor useless"


def test_a_drafted_sample_does_not_depend_on_its_neighbours() -> None:
    many, few = (sample(Filters(temperature=1.0), rows) for rows in (ROWS, 7))
    np.testing.assert_array_equal(many.count_B[:7], few.count_B)
    np.testing.assert_array_equal(many.tokens_BC[:7], few.tokens_BC)


def test_a_draft_must_fit() -> None:
    with pytest.raises(
        UserError, match=r"the draft 'tiny_gpt' has another vocabulary \(300 tokens\) than 'tiny_gpt' \(36\)"
    ):
        target().drafted_by(completer(MODERN, BYTES))
    with pytest.raises(UserError, match="--draft-tokens must lie between 1 and 15, got 16"):
        target().drafted_by(target(), 16)
    with pytest.raises(UserError, match="not --beam"):
        target().drafted_by(target(), 2).complete_all(["Was"], Generation(beam=2))
