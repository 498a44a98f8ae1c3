"""Scores of fine-tuned models: classification, regression, tagging, span question answering, summaries.

Metrics come from scikit-learn, SciPy and rouge-score, or follow the official definition where that is a script
(SQuAD, conlleval). Accuracies, F1 and correlations lie in [0, 1] or [-1, 1]; SQuAD and ROUGE are of 100, as their
papers print them. Every score can carry a 95 % interval: percentiles over bootstrap resamples of the examples
(Efron and Tibshirani 1993, chapter 13), from a seed.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_jax.errors import UserError, closest

Scores = dict[str, Any]
"""Floats by name, JSON-able; "<name>_interval" is [low, high]."""

GLUE: Final[dict[str, tuple[str, ...]]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""What each task of GLUE is scored by (Wang 2019, table 1)."""

_CATEGORICAL: Final = ("accuracy", "f1", "macro_f1", "matthews")
_NUMERIC: Final = ("pearson", "spearman", "rmse")


def metrics_for(dataset: str, kind: str, classes: int) -> tuple[str, ...]:
    """Return the names of the metrics for a dataset: those of GLUE for `glue/*`, else by the `kind` of its labels.

    `kind` is that of `LabelledText` ("classes", "number", "tags"); tags are scored by `tagging`, which needs no names.
    """
    suite, _, task = dataset.partition(":")[0].partition("/")
    if suite == "glue" and task in GLUE:
        return GLUE[task]
    if kind == "number":
        return _NUMERIC
    return ("accuracy", "f1", "macro_f1") if classes == 2 else ("accuracy", "macro_f1")


def score(
    metrics: Sequence[str], predictions: ArrayLike, references: ArrayLike, *, resamples: int = 0, seed: int = 0
) -> Scores:
    """Score class numbers (accuracy, f1, macro_f1, matthews) or numbers (pearson, spearman, rmse), one an example.

    "f1" is that of class 1. Where a score is undefined, as the correlation of constant predictions, it is 0.

    Raises:
        UserError: an unknown metric, no examples, or unequal numbers of them.
    """
    predicted_B, reference_B = np.asarray(predictions), np.asarray(references)
    _check_sizes(len(predicted_B), len(reference_B), resamples)
    scores: Scores = {"examples": len(reference_B)}
    for name in metrics:
        if name not in _CATEGORICAL + _NUMERIC:
            known = ", ".join(_CATEGORICAL + _NUMERIC)
            raise UserError(f"there is no metric '{name}', only {known}.{closest(name, _CATEGORICAL + _NUMERIC)}")
        statistic = (_categorical if name in _CATEGORICAL else _numeric)(name, predicted_B, reference_B)
        scores[name] = float(statistic(np.arange(len(reference_B))))
        if resamples:
            scores[f"{name}_interval"] = interval(statistic, len(reference_B), resamples, seed).tolist()
    return scores


def interval(
    statistic: Callable[[NDArray[np.int64]], Any], examples: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return [low, high], the 2.5 and 97.5 percentiles of `statistic` over bootstrap resamples.

    `statistic` gets the numbers of the examples drawn, and may return an array: then low and high are arrays.
    """
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(examples, size=examples)) for _ in range(resamples)]
    return np.percentile(np.asarray(draws, np.float64), (2.5, 97.5), axis=0)


def _categorical(
    name: str, predicted_B: NDArray[Any], reference_B: NDArray[Any]
) -> Callable[[NDArray[np.int64]], float]:
    from sklearn import metrics  # noqa: PLC0415 - takes most of a second

    # The scores depend on how often each (reference, prediction) occurs: a few weighted cells, not B examples.
    cells_C2, cell_B = np.unique(np.stack([reference_B, predicted_B], axis=1), axis=0, return_inverse=True)
    measure: Callable[..., float] = {
        "accuracy": metrics.accuracy_score,
        "f1": lambda *pair, **w: metrics.f1_score(*pair, labels=[1], average="micro", zero_division=0, **w),
        "macro_f1": lambda *pair, **w: metrics.f1_score(*pair, average="macro", zero_division=0, **w),
        "matthews": lambda *pair, **w: metrics.matthews_corrcoef(*pair, **w) if len(np.unique(pair)) > 1 else 0.0,
    }[name]

    def statistic(chosen: NDArray[np.int64]) -> float:
        count_C = np.bincount(cell_B[chosen], minlength=len(cells_C2))
        drawn = count_C > 0
        return measure(cells_C2[drawn, 0], cells_C2[drawn, 1], sample_weight=count_C[drawn])

    return statistic


def _numeric(name: str, predicted_B: NDArray[Any], reference_B: NDArray[Any]) -> Callable[[NDArray[np.int64]], float]:
    from scipy import stats  # noqa: PLC0415

    def statistic(chosen: NDArray[np.int64]) -> float:
        x, y = predicted_B[chosen], reference_B[chosen]
        if name == "rmse":
            return float(np.sqrt(np.mean(np.square(x - y))))
        if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return 0.0
        return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(x, y).statistic)

    return statistic


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the (type, first word, last word) of the entities in BIO or IOBES tags, as conlleval reads them.

    An I- or E- without a beginning, or of another type than the word before, begins an entity (what seqeval does in
    its default mode; Tjong Kim Sang and De Meulder 2003).
    """
    found: set[tuple[str, int, int]] = set()
    previous, previous_kind, begin = "O", "", 0
    for word, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        inside = prefix in ("I", "E") and previous in ("B", "I") and kind == previous_kind
        if previous != "O" and not inside:
            found.add((previous_kind, begin, word - 1))
        if not inside:
            begin = word
        previous, previous_kind = prefix, kind
    return found


def tagging(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, resamples: int = 0, seed: int = 0
) -> Scores:
    """Score tags, one a word: accuracy by word, and for BIO or IOBES tags precision, recall and F1 by entity.

    A sentence that did not fit into the model has fewer predictions than words: the rest counts as "O". Intervals
    resample sentences.

    Raises:
        UserError: no sentences, unequal numbers of them, or more predictions than words in one.
    """
    _check_sizes(len(predictions), len(references), resamples)
    rows = []
    for number, (predicted, reference) in enumerate(zip(predictions, references, strict=True), start=1):
        if len(predicted) > len(reference):
            raise UserError(f"sentence {number} has {len(reference)} words but {len(predicted)} predicted tags.")
        padded = [*predicted, *["O"] * (len(reference) - len(predicted))]
        right = sum(a == b for a, b in zip(padded, reference, strict=True))
        ours, theirs = entities(padded), entities(reference)
        rows.append((len(reference), right, len(theirs), len(ours), len(ours & theirs)))
    counts_B5 = np.asarray(rows)
    chunked = all(re.match(r"O$|[BIES](-|$)", tag) for tags in references for tag in tags)

    def statistic(chosen: NDArray[np.int64]) -> list[float]:
        words, right, reference, predicted, both = counts_B5[chosen].sum(axis=0)
        ratios = [(right, words), (both, predicted), (both, reference), (2 * both, predicted + reference)]
        return [float(a / b) if b else 0.0 for a, b in (ratios if chunked else ratios[:1])]

    names = ("accuracy", "precision", "recall", "f1") if chunked else ("accuracy",)
    totals = {"examples": len(references), "words": int(counts_B5[:, 0].sum())}
    if chunked:
        totals["entities"] = int(counts_B5[:, 2].sum())
    return totals | _named(names, statistic, len(references), resamples, seed)


def normalise_answer(text: str) -> str:
    """Lower-case `text`, drop ASCII punctuation and the articles a, an, the, and single the spaces (Rajpurkar 2016)."""
    lowered = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def squad(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    null_differences: Mapping[str, float] | None = None,
    *,
    resamples: int = 0,
    seed: int = 0,
) -> Scores:
    """Score answers by question id as evaluate-v2.0.py does (Rajpurkar 2018); version 1.1 scores the same by it.

    Args:
        predictions: the answer to each question; "" says that there is none.
        references: the acceptable answers to each question; none means that it has no answer.
        null_differences: how much likelier each question has no answer; with it come the thresholds at which
            "exact" and "f1" would be best, for `predictions` without "". Answer "" above the threshold.
        resamples: bootstrap resamples of the questions for the intervals; 0 computes none.
        seed: of the resamples.

    Returns:
        "exact" and "f1" of 100 and "total"; where some questions have no answer also "HasAns_exact", "NoAns_f1", ...

    Raises:
        UserError: no questions, or a question without a prediction.
    """
    _check_sizes(len(references), len(references), resamples)
    if missing := [key for key in references if key not in predictions]:
        raise UserError(f"question '{missing[0]}' and {len(missing) - 1} more have no prediction.")
    answerable_B = np.asarray([bool(len(answers)) for answers in references.values()])
    scores_B2 = np.asarray([_exact_and_f1(predictions[key], answers) for key, answers in references.items()])
    names = ("exact", "f1")
    scores: Scores = {"total": len(references)} | _named(names, _mean_of(scores_B2), len(references), resamples, seed)
    if not answerable_B.all():
        for prefix, chosen in (("HasAns", answerable_B), ("NoAns", ~answerable_B)):
            if chosen.any():
                part = _named(names, _mean_of(scores_B2[chosen]), int(chosen.sum()), resamples, seed)
                scores |= {f"{prefix}_{name}": value for name, value in part.items()}
                scores[f"{prefix}_total"] = int(chosen.sum())
    if null_differences is not None:
        difference_B = np.asarray([null_differences[key] for key in references], np.float64)
        given_B = np.asarray([bool(predictions[key]) for key in references])
        for name, score_B in zip(names, scores_B2.T, strict=True):
            best, threshold = _best_threshold(score_B / 100, answerable_B, given_B, difference_B)
            scores |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return scores


def _exact_and_f1(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    predicted = normalise_answer(prediction)
    exact = f1 = 0.0
    for answer in list(filter(None, map(normalise_answer, answers))) or [""]:
        exact = max(exact, float(predicted == answer))
        ours, theirs = predicted.split(), answer.split()
        common = (Counter(ours) & Counter(theirs)).total()
        # Without words on one side, the two agree or they do not.
        f1 = max(f1, 2 * common / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs))
    return 100 * exact, 100 * f1


def _best_threshold(
    score_B: NDArray[np.float64], answerable_B: NDArray[Any], given_B: NDArray[Any], difference_B: NDArray[np.float64]
) -> tuple[float, float]:
    """Sweep the threshold: at first every question counts as without answer, then one by one they are answered."""
    order = np.argsort(difference_B, kind="stable")
    change_B = np.where(answerable_B, score_B, -1.0 * given_B)[order]
    total_B1 = (~answerable_B).sum() + np.concatenate([[0.0], np.cumsum(change_B)])
    best = int(np.argmax(total_B1))
    return 100 * float(total_B1[best]) / len(score_B), float(difference_B[order[best - 1]]) if best else 0.0


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str = "en",
    *,
    resamples: int = 0,
    seed: int = 0,
) -> Scores:
    """Score summaries: F-measures of ROUGE-1, 2, L and Lsum (Lin 2004), of 100, by Google's rouge-score.

    English is cut into words and stemmed as in the papers on CNN/DailyMail; rouge-score knows no letters beyond a-z,
    so that Korean, Japanese and Chinese are scored by character and other languages by word, without stemming. What is
    no language code (the field "highlights") is taken for English. For Lsum every line is a sentence.
    "rouge_signature" says which it was.

    Raises:
        UserError: no summaries, or unequal numbers of them.
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - NLTK takes a while, only summaries need it

    _check_sizes(len(predictions), len(references), resamples)
    code = re.split("[-_]", language.lower())[0]
    if len(code) > 3:
        code = "en"
    units = {"en": "stem", "ko": "char", "ja": "char", "zh": "char"}.get(code, "word")
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=None if units == "stem" else _Units(units))
    results = [scorer.score(reference, ours) for ours, reference in zip(predictions, references, strict=True)]
    scores_B4 = 100 * np.asarray([[result[name].fmeasure for name in names] for result in results])
    signature = f"rouge-score:{metadata.version('rouge-score')}|tok:{units}"
    return {
        "summaries": len(references),
        "rouge_signature": signature,
        **_named(names, _mean_of(scores_B4), len(references), resamples, seed),
    }


class _Units:
    """Words, or characters, of any script: what `RougeScorer` calls a tokenizer."""

    def __init__(self, units: str) -> None:
        self._units = units

    def tokenize(self, text: str) -> list[str]:
        # Marks (category M) are the vowels of Devanagari and Thai: no end of a word, though no letters.
        kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
        words = "".join(kept).split()
        return words if self._units == "word" else list("".join(words))


def _mean_of(values_BM: NDArray[np.float64]) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    return lambda chosen: values_BM[chosen].mean(axis=0)


def _named(
    names: Iterable[str], statistic: Callable[[NDArray[np.int64]], Any], examples: int, resamples: int, seed: int
) -> Scores:
    scores: Scores = dict(zip(names, map(float, statistic(np.arange(examples))), strict=True))
    if resamples:
        low, high = interval(statistic, examples, resamples, seed)
        scores |= {f"{name}_interval": [float(a), float(b)] for name, a, b in zip(names, low, high, strict=True)}
    return scores


def _check_sizes(predictions: int, references: int, resamples: int) -> None:
    if not references or predictions != references:
        raise UserError(
            f"a score needs as many predictions as references, at least one: got {predictions} and {references}."
        )
    if resamples < 0 or resamples == 1:
        raise UserError(f"resamples must be 0 (no interval) or at least 2, got {resamples}.")
