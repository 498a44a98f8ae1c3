"""Scores against sacreBLEU's own published examples and hand-made ones; floors on data one can check by eye."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from transformer_jax import metrics
from transformer_jax.errors import UserError
from transformer_jax.metrics import bleu, copy_source, default_tokenizer, nearest_neighbour

# The example of sacreBLEU's README, first reference; the numbers are from its command line.
HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]


def test_bleu_of_the_sacrebleu_example() -> None:
    scores = bleu(HYPOTHESES, REFERENCES, "en")
    assert scores["bleu"] == pytest.approx(45.0675, abs=5e-5)
    assert scores["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert scores["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert scores["sentences"] == 3


def test_bleu_by_hand() -> None:
    """Words 4 of 5 right, then 2 of 4, 1 of 3, and 0 of 2 smoothed to 1/4; as long as the reference."""
    scores = bleu(["a b c x d"], ["a b c y d"], "en")
    precisions = 4 / 5, 2 / 4, 1 / 3, 1 / 4
    assert scores["bleu"] == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_brevity_penalty() -> None:
    scores = bleu(["a b c d"], ["a b c d e f"], "en")
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_extremes() -> None:
    same = bleu(REFERENCES, REFERENCES, "en")
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    nothing = bleu(["", "", ""], REFERENCES, "en")
    assert nothing["bleu"] == nothing["chrf"] == 0


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("de", "13a"), ("en_GB", "13a"), ("ko", "char"), ("ja", "char"), ("zh", "zh"), ("zh-CN", "zh"), ("KO", "char")],
)
def test_tokenizer_follows_the_language(language: str, tokenizer: str) -> None:
    assert default_tokenizer(language) == tokenizer
    assert f"tok:{tokenizer}|" in bleu(["가"], ["가"], language)["bleu_signature"]
    assert "tok:none|" in bleu(["가"], ["가"], language, tokenize="none")["bleu_signature"]


def test_korean_is_scored_by_character() -> None:
    """Spaces do not count: 5 of 6 characters are right, 4 of 5 pairs, 3 of 4 triples, 2 of 3 fours."""
    scores = bleu(["나는 학교에 가"], ["나는 학교에 간"], "ko")
    precisions = 5 / 6, 4 / 5, 3 / 4, 2 / 3
    assert scores["bleu"] == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_bootstrap_is_repeatable_and_holds_the_score() -> None:
    first, second = (bleu(HYPOTHESES * 10, REFERENCES * 10, "en", resamples=200) for _ in range(2))
    assert first == second
    assert "bs:200|seed:12345" in first["bleu_signature"]
    for key in ("bleu", "chrf"):
        low, high = first[f"{key}_interval"]
        assert low < first[key] < high
    assert "bleu_interval" not in bleu(HYPOTHESES, REFERENCES, "en")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hypotheses": [], "references": []}, "got 0 and 0"),
        ({"hypotheses": ["a"]}, "got 1 and 3"),
        ({"tokenize": "13b"}, "Did you mean '13a'"),
        ({"resamples": -1}, "resamples"),
        ({"resamples": 1}, "resamples"),
        ({"tokenize": "ko-mecab"}, r"pip install 'sacrebleu\[ko\]'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mecab(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("MeCab is missing")

    if arguments.get("tokenize") == "ko-mecab":
        monkeypatch.setattr(metrics.BLEU, "__init__", without_mecab)
    with pytest.raises(UserError, match=message):
        bleu(**{"hypotheses": HYPOTHESES, "references": REFERENCES, "target_language": "en"} | arguments)


PAIRS = [
    ("A dog sleeps in the house.", "Ein Hund schläft im Haus."),
    ("Two dogs run in the garden.", "Zwei Hunde rennen im Garten."),
    ("The child sleeps.", "Das Kind schläft."),
    ("나는 학교에 간다", "Ich gehe zur Schule"),
    ("我在家里", "Ich bin zu Hause"),
    ("the child sleeps", "zweimal vorhanden"),
]


def test_copy_source() -> None:
    assert copy_source(PAIRS[:2]) == [PAIRS[0][0], PAIRS[1][0]]


def test_every_training_source_is_its_own_neighbour() -> None:
    assert nearest_neighbour(PAIRS[:5], copy_source(PAIRS[:5])) == [target for _, target in PAIRS[:5]]


@pytest.mark.parametrize(
    ("source", "translation"),
    [
        ("DOGS run!", "Zwei Hunde rennen im Garten."),
        ("the child sleeps", "Das Kind schläft."),  # two are equally near: the first
        ("학교에 누가 있니", "Ich gehe zur Schule"),
        ("家", "Ich bin zu Hause"),
        ("unknown words only", ""),
        ("", ""),
    ],
)
def test_nearest_neighbour(source: str, translation: str) -> None:
    assert nearest_neighbour(PAIRS, [source]) == [translation]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ["dogs in the house", "child", "???", "학교에", "the garden", "the child sleeps"]
    whole = nearest_neighbour(PAIRS, sources)
    monkeypatch.setattr(metrics, "_TRAIN_CHUNK", 2)
    monkeypatch.setattr(metrics, "_TEST_CHUNK", 4)
    assert nearest_neighbour(PAIRS, sources) == whole


def test_no_test_sources() -> None:
    assert nearest_neighbour(PAIRS, []) == []


@pytest.mark.parametrize("pairs", [[], [("?!", "ja")]])
def test_no_training_words(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError, match="No training source"):
        nearest_neighbour(pairs, ["a"])


def test_interval_of_a_model_that_is_right_once():
    """Some resamples miss the one sentence that is right and score exactly 0."""
    references = [f"the {n} cat sat on the {n} mat today" for n in "abcdefgh"]
    result = bleu([references[0], *["dog"] * 7], references, "en", resamples=100)
    low, high = result["bleu_interval"]
    assert low <= result["bleu"] <= high
    assert json.dumps(result)
