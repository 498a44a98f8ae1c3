"""Scores against published examples of the official scripts and libraries, and intervals against their formulas."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from transformer_jax.errors import UserError
from transformer_jax.task_metrics import GLUE, entities, metrics_for, normalise_answer, rouge, score, squad, tagging


def test_classification_by_hand() -> None:
    """Four cells: 3 true negatives, 1 false positive, 2 false negatives, 4 true positives."""
    reference = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    predicted = [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    scores = score(["accuracy", "f1", "macro_f1", "matthews"], predicted, reference)
    assert scores["accuracy"] == pytest.approx(7 / 10)
    assert scores["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert scores["macro_f1"] == pytest.approx((8 / 11 + 2 * 3 / (2 * 3 + 1 + 2)) / 2)
    assert scores["matthews"] == pytest.approx((4 * 3 - 1 * 2) / math.sqrt((4 + 1) * (4 + 2) * (3 + 1) * (3 + 2)))
    assert scores["examples"] == 10


def test_the_examples_of_t5() -> None:
    """From the tests of T5's metrics; there they are of 100."""
    assert score(["accuracy", "matthews"], [0, 1, 2, 1], [0, 0, 2, 1]) == {
        "examples": 4,
        "accuracy": 0.75,
        "matthews": pytest.approx(0.7),
    }
    assert score(["macro_f1"], [0, 0, 2, 2], [0, 1, 1, 2])["macro_f1"] == pytest.approx(0.4444444444444444)
    assert score(["spearman"], [0, 1, 2], [0, 2, 1])["spearman"] == pytest.approx(0.5)
    assert score(["pearson"], [0, 1], [0, 2])["pearson"] == pytest.approx(1.0)


def test_correlations_and_error_by_hand() -> None:
    scores = score(["pearson", "spearman", "rmse"], [1.0, 2.0, 3.0, 10.0], [1.0, 3.0, 2.0, 4.0])
    assert scores["pearson"] == pytest.approx(13 / math.sqrt(50 * 5))
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert scores["rmse"] == pytest.approx(math.sqrt((0 + 1 + 1 + 36) / 4))


def test_a_collapsed_model_scores_zero_without_a_warning() -> None:
    assert score(["pearson", "spearman"], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], resamples=9)["pearson_interval"] == [0, 0]
    scores = score(["f1", "matthews", "macro_f1"], [0, 0, 0], [0, 1, 1], resamples=30)
    assert (scores["f1"], scores["matthews"]) == (0, 0)
    assert scores["macro_f1"] == pytest.approx(0.25)
    assert score(["f1", "matthews"], [0, 0], [0, 0]) == {"examples": 2, "f1": 0, "matthews": 0}


@pytest.mark.parametrize(
    ("dataset", "kind", "classes", "names"),
    [
        ("glue/cola", "classes", 2, ("matthews",)),
        ("glue/mrpc:2.0.0", "classes", 2, ("f1", "accuracy")),
        ("glue/stsb", "number", 0, ("pearson", "spearman")),
        ("glue/mnli", "classes", 3, ("accuracy",)),
        ("own.tsv", "classes", 2, ("accuracy", "f1", "macro_f1")),
        ("own.tsv", "classes", 5, ("accuracy", "macro_f1")),
        ("own.tsv", "number", 0, ("pearson", "spearman", "rmse")),
    ],
)
def test_each_task_has_its_metrics(dataset: str, kind: str, classes: int, names: tuple[str, ...]) -> None:
    assert metrics_for(dataset, kind, classes) == names
    assert len(GLUE) == 11


def test_intervals_are_those_of_the_bootstrap() -> None:
    """Of a share p over n examples: p +- 1.96 sqrt(p (1 - p) / n); of a correlation: Fisher's z, 1 / sqrt(n - 3)."""
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 2, 400)
    predicted = np.where(generator.random(400) < 0.8, reference, 1 - reference)
    scores = score(["accuracy", "matthews"], predicted, reference, resamples=600, seed=3)
    half = 1.96 * math.sqrt(scores["accuracy"] * (1 - scores["accuracy"]) / 400)
    assert scores["accuracy_interval"] == pytest.approx(
        [scores["accuracy"] - half, scores["accuracy"] + half], abs=0.01
    )
    low, high = scores["matthews_interval"]
    assert low < scores["matthews"] < high
    x = generator.normal(size=500)
    y = 0.6 * x + 0.8 * generator.normal(size=500)
    scores = score(["pearson"], x, y, resamples=600, seed=3)
    z = math.atanh(scores["pearson"])
    expected = [math.tanh(z + sign * 1.96 / math.sqrt(497)) for sign in (-1, 1)]
    assert scores["pearson_interval"] == pytest.approx(expected, abs=0.015)
    assert scores == score(["pearson"], x, y, resamples=600, seed=3)
    assert scores != score(["pearson"], x, y, resamples=600, seed=4)
    json.dumps(scores)


# What seqeval 1.2.2 (and conlleval.pl) makes of them: accuracy, precision, recall, F1.
TAGGED = [
    ("O O O B-MISC I-MISC I-MISC O", "O O B-MISC I-MISC I-MISC I-MISC O", (5 / 7, 0, 0, 0)),
    ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1, 1)),
    ("B-ORG I-ORG", "I-ORG I-ORG", (0.5, 1, 1, 1)),
    ("B-PER B-PER I-PER O B-LOC", "B-PER I-PER I-PER O I-LOC", (3 / 5, 1 / 2, 1 / 3, 2 / 5)),
    ("S-PER O B-LOC E-LOC", "S-PER O B-LOC I-LOC", (3 / 4, 1, 1, 1)),
    ("B-PER I-LOC O", "B-PER I-PER O", (2 / 3, 0, 0, 0)),
    ("O O", "O B-LOC", (1 / 2, 0, 0, 0)),
]


@pytest.mark.parametrize(("reference", "predicted", "expected"), TAGGED)
def test_entities_are_scored_as_conlleval_does(reference: str, predicted: str, expected: tuple[float, ...]) -> None:
    scores = tagging([predicted.split()], [reference.split()])
    got = tuple(scores[name] for name in ("accuracy", "precision", "recall", "f1"))
    assert got == pytest.approx(expected)


def test_the_example_of_seqeval() -> None:
    sentences = TAGGED[:2]
    scores = tagging([p.split() for _, p, _ in sentences], [r.split() for r, _, _ in sentences], resamples=50)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["entities"]) == (0.5, 0.5, 0.5, 2)
    assert scores["f1_interval"] == [0, 1]
    assert entities(["O", "B-MISC", "I-MISC", "O", "B-PER"]) == {("MISC", 1, 2), ("PER", 4, 4)}
    assert entities(["B", "I", "O", "B-a-b"]) == {("", 0, 1), ("a-b", 3, 3)}


def test_words_that_were_cut_count_against_the_model() -> None:
    scores = tagging([["B-X"]], [["B-X", "O", "B-Y"]])
    assert (scores["accuracy"], scores["precision"], scores["recall"]) == (pytest.approx(2 / 3), 1, 0.5)


def test_tags_that_are_no_chunks_have_accuracy_only() -> None:
    scores = tagging([["NN", "VB"], ["OO"]], [["NN", "NN"], ["OO"]])
    assert scores == {"examples": 2, "words": 3, "accuracy": pytest.approx(2 / 3)}


def test_answers_are_normalised_as_squad_does() -> None:
    """The example of T5's tests of the SQuAD normalisation: curly quotes stay, so does a word that holds an article."""
    assert normalise_answer("`Needs\tA_LOT of the 'normalization'.\"‘") == "needs alot of normalization‘"
    assert normalise_answer("The  Beyoncé, an\u00a0A-list «star»") == "beyoncé alist «star»"
    assert normalise_answer("서울 (Seoul)") == "서울 seoul"


def test_squad_of_published_examples() -> None:
    answers = {"0": ["big moose", "hippo"], "1": ["correct1"], "2": ["correct2.1", "correct2.2"], "3": ["c"]}
    typed = {"0": "a big moose‘", "1": "wrong", "2": "correct2.2", "3": "d"}
    assert squad(typed, answers) == {"total": 4, "exact": 25, "f1": pytest.approx(37.5)}
    assert squad({"0": "abd"}, {"0": ["abc abd", "$$$$"]})["f1"] == pytest.approx(100 * 2 / 3)
    assert squad({"56e1": "1976"}, {"56e1": ["1976"]}) == {"total": 1, "exact": 100, "f1": 100}


def test_no_answer_and_the_best_threshold_by_hand() -> None:
    """By null difference b, d, a, c; answered one by one: 2 + 1 (b), - 1 (d is wrong), + 2/3 (a), + 0."""
    references = {"a": ["Norman knights"], "b": ["10th century"], "c": [], "d": []}
    predictions = {"a": "the Norman kings", "b": "10th century", "c": "", "d": "Normandy"}
    differences = {"a": 0.5, "b": -3.0, "c": 2.0, "d": -1.0}
    scores = squad(predictions, references, differences)
    assert scores["exact"] == pytest.approx(50)
    assert scores["f1"] == pytest.approx(100 * (0.5 + 1 + 1 + 0) / 4)
    assert (scores["HasAns_exact"], scores["NoAns_exact"], scores["NoAns_f1"]) == (50, 50, 50)
    assert scores["HasAns_f1"] == pytest.approx(75)
    assert (scores["HasAns_total"], scores["NoAns_total"]) == (2, 2)
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75, -3)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (75, -3)
    at_best = {key: answer if differences[key] <= -3 else "" for key, answer in predictions.items()}
    assert squad(at_best, references)["exact"] == scores["best_exact"]
    low, high = squad(predictions, references, resamples=200)["f1_interval"]
    assert 0 <= low < scores["f1"] < high <= 100


def test_rouge_of_the_published_examples() -> None:
    """From the tests of rouge-score and section 3.2 of Lin 2004."""
    scores = rouge(["testing one", "testing two"], ["testing one two", "testing one two"])
    assert scores["rouge1"] == pytest.approx(80)
    assert scores["rouge2"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert scores["rougeL"] == pytest.approx(80)
    assert scores["rouge_signature"].endswith("|tok:stem")
    summary = rouge(["w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"], ["w1 w2 w3 w4 w5"])
    assert summary["rougeLsum"] == pytest.approx(100 * 2 * 0.8 * 0.4 / 1.2)
    assert rouge(["he runs"], ["He running"])["rouge1"] == 100
    assert rouge([""], ["testing one two"])["rougeL"] == 0


def test_rouge_of_other_scripts() -> None:
    """Korean by character: 5 of 6 on both sides, pairs 4 of 5; rouge-score alone would find no word in it."""
    scores = rouge(["나는 학교에 가."], ["나는 학교에 간"], "ko", resamples=10)
    assert scores["rouge1"] == pytest.approx(100 * 5 / 6)
    assert scores["rouge2"] == pytest.approx(100 * 4 / 5)
    assert scores["rouge1_interval"] == [scores["rouge1"], scores["rouge1"]]
    assert scores["rouge_signature"].endswith("|tok:char")
    assert rouge(["größe zählt"], ["Größe zählte"], "de")["rouge1"] == pytest.approx(50)
    assert rouge(["हिन्दी भाषा"], ["हिन्दी"], "hi")["rouge1"] == pytest.approx(100 * 2 / 3)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no metric 'acuracy'.* Did you mean 'accuracy'\?"):
        score(["acuracy"], [1], [1])
    with pytest.raises(UserError, match="as many predictions as references, at least one: got 2 and 1"):
        score(["accuracy"], [1, 0], [1])
    with pytest.raises(UserError, match="at least 2, got 1"):
        rouge(["a"], ["a"], resamples=1)
    with pytest.raises(UserError, match="sentence 2 has 1 words but 2 predicted tags"):
        tagging([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(UserError, match="question 'b' and 0 more have no prediction"):
        squad({"a": "x"}, {"a": ["x"], "b": []})
