"""Laws of completion: the cached, batched, bucketed, sharded way gives what reading everything anew would."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from tests.tiny import tiny
from tests.tiny_gpt import BYTES, CHARACTERS, GPT2, MODERN, completer, random_params, run_folder
from transformer_jax.completion import Completer
from transformer_jax.config import MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding import Decoding
from transformer_jax.errors import UserError
from transformer_jax.generation import Completion, Generation
from transformer_jax.models.gpt import SLACK
from transformer_jax.nn import attention
from transformer_jax.nn.module import Params
from transformer_jax.prompts import PromptEncoder
from transformer_jax.sampling import Writing
from transformer_jax.text_stream import TextStream

ENCODER = PromptEncoder(CHARACTERS, 48)
GREEDY = Generation(max_tokens=17, temperature=0.0)
SAMPLED = Generation(max_tokens=17, n=2, min_p=0.03, repetition_penalty=1.1, seed=4)
PROMPTS = ["Give me ", "W", "Have mercy, Je", ""]
LONG = "Give me my horse: bind up my wounds. Have m"
MODELS = {"gpt2": GPT2, "modern": MODERN}


@cache
def opened(model: str = "modern") -> Completer:
    return completer(MODELS[model])


@cache
def greedy(model: str = "modern") -> list[Completion]:
    return list(opened(model).complete_all(PROMPTS, GREEDY))


@cache
def sampled() -> list[Completion]:
    return list(opened().complete_all(PROMPTS, SAMPLED))


@cache
def read_all(model: str) -> Any:
    """One full pass without cache: tokens [1, T] to log-probabilities [T, V]."""
    module = opened(model).skeleton.bind(opened(model).load())
    full = jax.jit(lambda tokens_BT: jax.nn.log_softmax(module(tokens_BT)))

    def log_probs(tokens: list[int]) -> np.ndarray:
        row = np.zeros((1, MODELS[model].context), np.int32)  # what is not yet written is not seen: causality
        row[0, : len(tokens)] = tokens
        return np.asarray(full(row))[0, : len(tokens)]

    return log_probs


def anew(model: str, prompt: str, limit: int) -> list[int]:
    """Greedy, by reading everything again for each token."""
    (tokens,) = ENCODER.encode([prompt])
    written: list[int] = []
    while len(written) < limit and CHARACTERS.eos not in written:
        written.append(int(read_all(model)([*tokens, *written])[-1].argmax()))
    return written


@pytest.mark.parametrize("model", MODELS)
def test_greedy_with_cache_equals_reading_everything_anew(model: str) -> None:
    for row in greedy(model):
        assert row.tokens == anew(model, row.prompt, GREEDY.max_tokens)


def test_a_ragged_batch_is_its_rows_one_by_one() -> None:
    one, together = opened(), sampled()
    assert [row.prompt for row in together] == [prompt for prompt in PROMPTS for _ in range(2)]
    alone = [row for prompt in PROMPTS for row in one.complete_all([prompt], SAMPLED)]
    for a, b in zip(together, alone, strict=True):
        assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish)
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-4)
    assert len({tuple(row.tokens) for row in together}) > len(PROMPTS), "samples differ"


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    first = [row.tokens for row in sampled()[::2]]
    single = replace(SAMPLED, n=1, batch=2)
    assert [row.tokens for row in opened().complete_all(PROMPTS, single)] == first
    assert [row.tokens for row in opened().complete_all(PROMPTS, replace(single, seed=5))] != first


def test_eight_devices_write_and_score_as_one_does() -> None:
    many = completer(devices=8, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert [row.tokens for row in many.complete_all(PROMPTS, SAMPLED)] == [row.tokens for row in sampled()]
    pairs = [("Give me", " my horse"), ("Was ever", " dream")]
    for a, b in zip(many.score(pairs), opened().score(pairs), strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-4)


def test_devices_that_share_heads_join_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on TPUs: a cache has one wide head for each device."""
    joined = attention._joined
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert joined(6) == 6
    many = completer(devices=4, mesh=MeshConfig(data=2, tensor=2))
    with jax.set_mesh(many.mesh):
        assert joined(6) == 3
        assert joined(3) == 1
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_joined", lambda heads: heads // 2)
    assert [row.tokens for row in many.complete_all(PROMPTS, SAMPLED)] == [row.tokens for row in sampled()]


def test_each_bucket_compiles_once_whatever_the_values(caplog: pytest.LogCaptureFixture) -> None:
    one = completer()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for prompt, most, temperature, top_k in (
            ("Was", 20, 0.5, 3),
            ("Give me", 17, 1.7, 5),
            ("mercy, Jes", 19, 1.0, 2),
        ):
            list(one.complete(prompt, Generation(max_tokens=most, temperature=temperature, top_k=top_k, seed=most)))
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]
    for name in ("jit(start)", "jit(advance)"):
        assert sum(name in message for message in compiled) == 1


def begun(prompt: str) -> Writing:
    one = opened()
    ids = one.encoder.encode([prompt])
    options = {"sample_R": [0], "limit_R": [5], "seed": 0, "filters": GREEDY.filters()}
    return one._decoding.prefill(one._weights, ids, [0], **options)


def test_the_cache_is_donated() -> None:
    one, writing = opened(), begun(LONG)
    place = writing.state.past[0].k_BKSH.unsafe_buffer_pointer()
    after, _ = one._decoding.advance(one._weights, writing, [False], GREEDY.filters(), 2, alternatives=0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(writing.state))
    assert after.state.past[0].k_BKSH.unsafe_buffer_pointer() == place


@cache
def cut_off() -> Completion:
    """A prompt that leaves room for a few tokens only."""
    return next(opened().complete_all([LONG], GREEDY))


@pytest.mark.parametrize("model", MODELS)
def test_a_token_that_is_taken_back_at_once_changes_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As single rows are written on a GPU; up to the last position of the context, and with windows."""
    monkeypatch.setattr(Decoding, "_reads_two", lambda self, rows: True)
    for prompt in (PROMPTS[0], LONG):
        limit = min(17, 48 + 1 - len(prompt))
        (found,) = completer(MODELS[model]).complete_all([prompt], replace(GREEDY, max_tokens=limit))
        assert found.tokens == anew(model, prompt, limit)


@pytest.mark.parametrize(("backend", "rows", "two"), [("gpu", 1, True), ("gpu", 2, False), ("cpu", 1, False)])
def test_only_single_rows_on_gpus_read_two_tokens(
    backend: str, rows: int, two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = opened()._decoding
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert decoding._reads_two(rows) == two


def test_sliding_layers_keep_no_more_than_their_window_and_slack() -> None:
    assert cut_off().tokens == anew("modern", LONG, 48 + 1 - len(LONG))
    assert [cache.positions_BS.shape[1] for cache in begun(LONG).state.past] == [49, 5 + SLACK]


def test_text_comes_in_pieces_that_make_the_whole() -> None:
    one = completer(tokenizer=BYTES)  # random bytes: characters are split, and many are broken
    for prompt in ("Der Rabe ", "까마귀가 "):
        pieces = list(one.complete(prompt, Generation(max_tokens=40, seed=2)))
        (row,) = one.complete_all([prompt], Generation(max_tokens=40, seed=2))
        (ids,) = one.encoder.encode([prompt])
        assert len(pieces) > 1
        assert "".join(pieces) == row.text
        assert prompt + row.text == one.tokenizer.decode([*ids, *row.tokens], stop=False)


def pushed(text: str, stop: tuple[str, ...] = (), tokenizer: Tokenizer = BYTES) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, tokenizer.encode_batch(["Der"])[0], stop)
    pieces = [stream.push(token) for token in tokenizer.encode_batch([text])[0]]
    return [*pieces, stream.finish()], stream


def test_no_piece_shows_a_part_of_a_character() -> None:
    text = "≠ñ🐦語" * 40  # none of them is a token
    pieces, _ = pushed(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces
    assert len([piece for piece in pieces if piece]) == len(text)


def test_stop_strings_span_tokens_and_are_not_shown() -> None:
    pieces, stream = pushed("Give me my horse: bind up", stop=("hoarse", "e: bi", "e: bind"))
    assert stream.stopped
    assert "".join(pieces) == "Give me my hors"
    pieces, stream = pushed("Give me my hors", stop=("horse",))
    assert not stream.stopped
    assert "".join(pieces) == "Give me my hors", "what only looked like a stop string is shown in the end"
    assert pieces[-1] == "hors"


def test_a_stop_string_ends_the_row_and_only_it() -> None:
    stop = greedy()[0].text[5:8]
    stopped = list(opened().complete_all(PROMPTS, replace(GREEDY, stop=("?!", stop))))
    for a, b in zip(stopped, greedy(), strict=True):
        head, found, _ = b.text.partition(stop)
        assert a.text == head
        assert a.finish == ("stop" if found else b.finish)
        assert a.tokens == b.tokens[: len(a.tokens)]
    assert stopped[0].finish == "stop"


def test_a_completion_says_why_it_ends() -> None:
    rows = [cut_off(), *greedy(), *sampled()]
    assert {row.finish for row in rows} == {"eos", "context", "length"}
    for row in rows:
        read = len(ENCODER.encode([row.prompt])[0]) + len(row.tokens)
        assert (row.finish == "eos") == (row.tokens[-1] == CHARACTERS.eos)
        assert (row.finish == "context") == (read == 48 + 1)
        assert (row.finish == "length") == (len(row.tokens) == 17 and row.tokens[-1] != CHARACTERS.eos)
        assert len(row.log_probs) == len(row.tokens)


def test_a_prompt_begins_as_its_tokenizer_says() -> None:
    assert ENCODER.prefix == []
    assert ENCODER.encode(["", "W"]) == [[CHARACTERS.eos], CHARACTERS.encode_batch(["W"])[0]]
    inner = tokenizers.Tokenizer.from_str(CHARACTERS.to_json())
    inner.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    like_llama = PromptEncoder(Tokenizer(inner), 48)
    assert like_llama.encode(["", "W"]) == [[1], [1, *CHARACTERS.encode_batch(["W"])[0]]]
    assert like_llama.encode_pairs([("", "W")]) == [([1], CHARACTERS.encode_batch(["W"])[0])]


@pytest.mark.parametrize("model", MODELS)
def test_score_is_the_sum_over_the_tokens_of_the_continuation(model: str) -> None:
    pairs = [("Was ever", " woman"), ("", "Soft"), ("Give me ", "bind"), ("W", "a")]
    scores = opened(model).score(pairs)
    for (before, after), score in zip(ENCODER.encode_pairs(pairs), scores, strict=True):
        log_probs_TV = read_all(model)([*before, *after])
        places = range(len(before) - 1, len(before) + len(after) - 1)
        np.testing.assert_allclose(
            score.log_probs, [log_probs_TV[t][i] for t, i in zip(places, after, strict=True)], rtol=1e-4
        )
        assert score.log_prob == pytest.approx(sum(score.log_probs))


def test_what_greedy_writes_is_scored_as_greedy() -> None:
    row = greedy()[0]
    (ids,) = ENCODER.encode([row.prompt])
    same, other = opened().score_tokens([(ids, row.tokens), (ids, [row.tokens[0] ^ 1, *row.tokens[1:]])])
    assert same.greedy
    assert not other.greedy
    np.testing.assert_allclose(same.log_probs, row.log_probs, rtol=1e-3, atol=1e-4)


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    (a,), (b,) = ENCODER.encode_pairs([("Give ", "me")]), ENCODER.encode_pairs([("Give", " me")])
    assert a == b
    assert CHARACTERS.decode(a[1]) == " me"


def test_beam_search_finds_more_probable_text_than_greedy() -> None:
    one, wide = opened(), Generation(max_tokens=6, beam=24, n=3, length_penalty=0.0)
    rows = list(one.complete_all(PROMPTS, wide))
    ids = dict(zip(PROMPTS, ENCODER.encode(PROMPTS), strict=True))
    scores = one.score_tokens([(ids[row.prompt], row.tokens) for row in rows])
    assert [row.score for row in rows] == pytest.approx([score.log_prob for score in scores], rel=1e-4)
    for (best, second, third), other in zip(zip(*[iter(rows)] * 3, strict=True), greedy(), strict=True):
        assert best.score >= second.score >= third.score
        assert best.score >= sum(other.log_probs[:6]) - 1e-4


def test_a_run_folder_opens_with_its_own_parameters(tmp_path: Path) -> None:
    one = Completer.open(run_folder(tmp_path / "run", seed=3))
    assert one.mesh.size == 8
    _, expected = random_params(one.config, seed=3)
    jax.tree.map(np.testing.assert_array_equal, one.load(), expected)


def test_nothing_is_loaded_before_the_input_is_checked() -> None:
    def load() -> Params:
        raise AssertionError("loaded")

    one = replace(opened(), load=load)
    for prompts, generation, message in (
        (["Give me é"], GREEDY, r"the prompt: the tokenizer does not know 'é' \(character 9\)"),
        (["Was", "x" * 3], GREEDY, r"the prompt, line 2: the tokenizer does not know 'x' \(character 1\)"),
        (["W" * 60], GREEDY, "has 60 tokens, but the model reads at most 48; shorten it by 12"),
        (["Was"], replace(GREEDY, temperature=-1.0), "--temperature"),
        (["Was"], replace(GREEDY, top_k=99), "vocabulary of 36"),
        (["Was"], replace(GREEDY, n=0), "--n must be at least 1"),
        (["Was"], replace(GREEDY, max_tokens=0), "--max-tokens"),
        (["Was"], replace(GREEDY, stop=("a", "")), "--stop"),
        (["Was"], replace(GREEDY, beam=2, n=3), "--n 3 wants more"),
        (["Was"], Generation(beam=2, top_k=3), "no filter"),
        (["Was"], replace(GREEDY, logprobs=99), "--logprobs"),
        (["Was"], replace(GREEDY, seed=-1), "--seed"),
        ([], GREEDY, "nothing to complete"),
    ):
        with pytest.raises(UserError, match=message):
            one.complete_all(prompts, generation)


def test_other_runs_are_told_apart(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    meta = run / "checkpoints" / "1" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"experiment": tiny().to_json()}))
    with pytest.raises(UserError, match="TransformerConfig, which is no decoder-only model; `tjax translate`"):
        Completer.open(run)
    with pytest.raises(UserError, match="holds no checkpoint"):
        Completer.open(tmp_path)
