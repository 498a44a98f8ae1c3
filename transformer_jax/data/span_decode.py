"""From the logits of windows to answers: text cut out of the original context by character."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.span_windows import SpanWindows, WindowArrays


class Candidate(NamedTuple):
    """A span of a context."""

    text: str
    begin: int
    """First character in the context."""
    end: int
    """The character after its last."""
    score: float
    """Start logit plus end logit."""
    probability: float
    """Softmax of the scores over the candidates, and over "no answer" where that was possible."""


class SpanAnswer(NamedTuple):
    """What was decoded for one question."""

    id: str
    text: str
    """The answer; "" says that there is none."""
    null_difference: float
    """How much "no answer" (both at [CLS], in its least likely window) outscores the best span."""
    candidates: tuple[Candidate, ...]
    """The best spans, whether or not the answer is "none", best first."""


def decode_spans(
    start_logits: Sequence[NDArray[np.floating]],
    end_logits: Sequence[NDArray[np.floating]],
    windows: SpanWindows,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> list[SpanAnswer]:
    """Find the best answer to each question over all its windows (Devlin 2019, sections 4.2 and 4.3).

    The score of a span is the sum of its two logits. It begins in the context, is at most `max_answer_length` tokens
    long, and counts only in the window in which it has the most context. All such spans are compared.

    Args:
        start_logits: for each window by number its logits by position; padding after them is ignored.
        end_logits: the same for the last token.
        windows: where the logits come from.
        n_best: candidates returned for each question.
        max_answer_length: in tokens.
        null_threshold: answer "none" where `null_difference` exceeds it; None always answers (SQuAD 1.1). The best
            one on validation data comes from `task_metrics.squad`.

    """
    arrays = windows.arrays
    bounds = np.searchsorted(arrays.question_of_window, np.arange(len(arrays.context_of_question) + 1))
    answers = []
    for question, (first, last) in zip(windows.questions(), itertools.pairwise(bounds.tolist()), strict=True):
        numbers = range(first, last)
        found = [
            span
            for window, owned_SK in zip(numbers, _owners(arrays, numbers, max_answer_length), strict=True)
            for span in _best_spans(arrays, window, start_logits[window], end_logits[window], owned_SK, n_best)
        ]
        null = min(float(start_logits[window][0]) + float(end_logits[window][0]) for window in numbers)
        best: dict[tuple[int, int], float] = {}
        for score, begin, end in sorted(found, key=lambda span: -span[0]):
            best.setdefault((begin, end), score)
        kept = list(itertools.islice(best.items(), n_best))
        scores = np.asarray([score for _, score in kept] + ([] if null_threshold is None else [null]))
        odds = np.exp(scores - scores.max())
        candidates = tuple(
            Candidate(question.context[begin:end], begin, end, score, float(probability))
            for ((begin, end), score), probability in zip(kept, odds / odds.sum(), strict=False)
        )
        difference = null - candidates[0].score
        none = null_threshold is not None and difference > null_threshold
        answers.append(SpanAnswer(question.id, "" if none else candidates[0].text, difference, candidates))
    return answers


def _owners(arrays: WindowArrays, windows: range, longest: int) -> list[NDArray[np.bool_]]:
    """Tell for each window, by first token and length, which spans have in it more context than in any other window.

    The measure is that of Devlin's code: the lesser of the tokens before and after, plus a hundredth of the length of
    the window; of equal ones the first. There it is that of the first token alone, which loses answers where windows
    overlap by little.
    """
    begin = int(arrays.first[windows[0]])
    tokens = int(arrays.first[windows[-1]] + arrays.count[windows[-1]]) - begin
    most_SK = np.full((tokens, longest), -1.0)
    owner_SK = np.full((tokens, longest), -1)
    cuts = [slice(int(arrays.first[w]) - begin, int(arrays.first[w] + arrays.count[w]) - begin) for w in windows]
    for row, cut in enumerate(cuts):
        count = cut.stop - cut.start
        before_S1 = np.arange(count)[:, None]
        after_SK = count - 1 - before_S1 - np.arange(longest)
        context_SK = np.where(after_SK >= 0, np.minimum(before_S1, after_SK) + 0.01 * count, -1.0)
        owner_SK[cut] = np.where(context_SK > most_SK[cut], row, owner_SK[cut])
        most_SK[cut] = np.maximum(context_SK, most_SK[cut])
    return [owner_SK[cut] == row for row, cut in enumerate(cuts)]


def _best_spans(
    arrays: WindowArrays,
    window: int,
    start_T: NDArray[np.floating],
    end_T: NDArray[np.floating],
    owned_SK: NDArray[np.bool_],
    n_best: int,
) -> list[tuple[float, int, int]]:
    """Return (score, first character, character after the last) of the best spans of one window."""
    read = arrays.context_tokens(window)
    position, count = int(arrays.context_position[window]), int(arrays.count[window])
    longest = owned_SK.shape[1]
    start_S = np.asarray(start_T[position : position + count], np.float64)
    end_S = np.pad(np.asarray(end_T[position : position + count], np.float64), (0, longest - 1))
    # score[i, k] is that of the span from token i to token i + k.
    score_SK = start_S[:, None] + np.lib.stride_tricks.sliding_window_view(end_S, longest)
    score = np.where(owned_SK, score_SK, -np.inf).ravel()
    chosen = np.argsort(-score, kind="stable")[:n_best]
    begin, end = arrays.begin[read], arrays.end[read]
    return [
        (float(score[i]), int(begin[i // longest]), int(end[i // longest + i % longest]))
        for i in chosen[np.isfinite(score[chosen])].tolist()
    ]
