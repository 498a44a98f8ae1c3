"""Scores of translations, and the two floors every model must clear.

BLEU and chrF are sacreBLEU's (Post 2018, "A Call for Clarity in Reporting BLEU Scores"): a score counts only with
the signature that says how it was computed. The floors need no model: copying the source, and returning the
translation of the most similar training source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from transformer_jax.errors import UserError, closest

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Han and kana are written without spaces, so there each character is a word.
_WORD = r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+"
_TRAIN_CHUNK, _TEST_CHUNK = 100_000, 128  # similarities held at once: at most 150 MB


class _PlainFloats:
    """Scores as plain floats.

    sacreBLEU's bootstrap averages by `statistics.mean`, which fails where some resamples score 0.0 and others an
    np.float32: those of a model that has learned little.
    """

    def _compute_score_from_stats(self, stats: Any) -> Any:
        score = super()._compute_score_from_stats(stats)  # type: ignore[misc]
        score.score = float(score.score)
        return score


class _Bleu(_PlainFloats, BLEU): ...


class _Chrf(_PlainFloats, CHRF): ...


def default_tokenizer(target_language: str) -> str:
    """Return sacreBLEU's tokenizer for a language code ("de", "zh-CN"): "char" for ko and ja, "zh", else "13a".

    "ko-mecab" and "ja-mecab" are common in the literature too, but need sacreBLEU's extras; scores with different
    tokenizers cannot be compared.
    """
    language = re.split("[-_]", target_language.lower())[0]
    return {"ko": "char", "ja": "char", "zh": "zh"}.get(language, "13a")


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    target_language: str,
    tokenize: str | None = None,
    resamples: int = 0,
) -> dict[str, float | int | str | list[float]]:
    """Score detokenized translations against one reference each.

    Args:
        hypotheses: the model's output, one string a sentence.
        references: the same sentences by a translator.
        target_language: language code, which chooses the tokenizer.
        tokenize: a sacreBLEU tokenizer, instead of the language's own.
        resamples: bootstrap resamples of the test set for 95 % intervals (Koehn 2004); 0 computes none, 1000 is
            usual. sacreBLEU fixes the seed and names it in the signature.

    Returns:
        "bleu" and "chrf" (both of 100), "bleu_signature", "chrf_signature", "sentences", and with `resamples` the
        "bleu_interval" and "chrf_interval" [low, high], centred on the mean of the resamples.

    Raises:
        UserError: no sentences, unequal numbers of them, a single resample or fewer than none, a tokenizer
            that is unknown or not installed.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise UserError(
            f"BLEU needs as many hypotheses as references, at least one: got {len(hypotheses)} and {len(references)}."
        )
    if resamples < 0 or resamples == 1:
        raise UserError(f"resamples must be 0 (no interval) or at least 2, got {resamples}.")
    name = tokenize or default_tokenizer(target_language)
    if name not in BLEU.TOKENIZERS:
        raise UserError(f"sacreBLEU has no tokenizer '{name}'.{closest(name, BLEU.TOKENIZERS)}")
    try:
        metrics: dict[str, Any] = {"bleu": _Bleu(tokenize=name), "chrf": _Chrf()}
    except (ImportError, RuntimeError) as error:
        extra = name.removesuffix("-mecab")
        raise UserError(f"Tokenizer '{name}' is not installed: pip install 'sacrebleu[{extra}]' ({error}).") from error

    result: dict[str, float | int | str | list[float]] = {"sentences": len(hypotheses)}
    for key, metric in metrics.items():
        # 1 is sacreBLEU's word for no bootstrap.
        score = metric.corpus_score(list(hypotheses), [list(references)], n_bootstrap=max(resamples, 1))
        result[key] = score.score
        result[f"{key}_signature"] = str(metric.get_signature())
        if resamples:
            result[f"{key}_interval"] = [score._mean - score._ci, score._mean + score._ci]
    return result


def copy_source(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the source of each (source, target) pair as its translation: what is right without translating."""
    return [source for source, _ in pairs]


def nearest_neighbour(train_pairs: Sequence[tuple[str, str]], test_sources: Sequence[str]) -> list[str]:
    """Return for each test source the target of the training source most similar to it.

    Similarity is the cosine of TF-IDF vectors of lower-cased words (Salton and Buckley 1988); among equals the first
    training pair counts. A source that shares no word with the training sources gets the empty translation: nothing
    is known about it. Memory is that of the training vectors (some 8 bytes a word) and at most 150 MB.

    Raises:
        UserError: no training source holds a word.
    """
    # Imported here: it takes most of a second, and BLEU does without.
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415

    if not any(re.search(_WORD, source) for source, _ in train_pairs):
        raise UserError("No training source holds a word: there is nothing to be near to.")
    if not test_sources:
        return []

    vectorizer = TfidfVectorizer(token_pattern=_WORD, dtype=np.float32)
    train = vectorizer.fit_transform([source for source, _ in train_pairs])
    test = vectorizer.transform(test_sources)
    best, nearest = np.zeros(len(test_sources), np.float32), np.full(len(test_sources), -1)
    for start, part in _chunks(train, _TRAIN_CHUNK):
        words_by_sentence = part.T.tocsr()
        for first, queries in _chunks(test, _TEST_CHUNK):
            similarity = (queries @ words_by_sentence).toarray()
            top = similarity.argmax(axis=1)
            value = similarity[np.arange(len(top)), top]
            rows = slice(first, first + len(top))
            nearest[rows] = np.where(value > best[rows], start + top, nearest[rows])
            best[rows] = np.maximum(value, best[rows])
    return [train_pairs[index][1] if index >= 0 else "" for index in nearest]


def _chunks(matrix: csr_matrix, size: int) -> Iterator[tuple[int, csr_matrix]]:
    for start in range(0, matrix.shape[0], size):
        yield start, matrix[start : start + size]
