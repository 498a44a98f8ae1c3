"""Long contexts in overlapping windows, as token arrays; the answer's place in each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.loader import Batch, rows_of_process
from transformer_jax.data.plan import Bucket, EpochPlan
from transformer_jax.data.progress import shown
from transformer_jax.data.span_rows import Misplaced, Question, QuestionTable, misplaced_answer
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

_FORMAT: Final = 1  # of the cached arrays; a change makes old caches unused
_CHUNK: Final = 1000


class Shape(NamedTuple):
    """How contexts are cut."""

    max_length: int
    """Tokens of a window: [CLS] question [SEP] context [SEP]."""
    doc_stride: int
    """Context tokens from the beginning of one window to that of the next."""
    max_query_length: int
    """Most tokens of a question; the rest is cut."""


@dataclass(frozen=True)
class WindowArrays:
    """The windows of some questions, as arrays; every context is tokenized once, however many questions it has."""

    context: NDArray[np.uint32]
    """Tokens of all contexts, one after the other."""
    begin: NDArray[np.int32]
    """Of each of these tokens the first character in its context."""
    end: NDArray[np.int32]
    """Of each of these tokens the character after its last."""
    context_offsets: NDArray[np.int64]
    """Where each context begins in these arrays, and the end."""
    question: NDArray[np.uint32]
    """Tokens of all questions, one after the other."""
    question_offsets: NDArray[np.int64]
    """Where each question begins, and the end."""
    misplaced: NDArray[np.int64]
    """[]: questions that were left out because their answer is not at its offset."""
    row_of_question: NDArray[np.int64]
    """[Q]: the position of each question among those it was made from: some may have been left out."""
    context_of_question: NDArray[np.int64]
    """[Q]: the number of the context of each question."""
    question_of_window: NDArray[np.int64]
    """[W], ascending: the number of the question of each window."""
    first: NDArray[np.int32]
    """[W]: the first token of the context in each window."""
    count: NDArray[np.int32]
    """[W]: tokens of the context in each window."""
    answerable: NDArray[np.bool_]
    """[Q]: whether each question has an answer."""
    span: NDArray[np.int32]
    """[W, 2]: first and last token of the answer, as positions in the window; 0, 0 where it is not (all) in it."""

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[W]: tokens of each window, special ones included."""
        return np.diff(self.question_offsets)[self.question_of_window] + self.count.astype(np.int64) + 3

    @cached_property
    def context_position(self) -> NDArray[np.int64]:
        """[W]: the position of the first context token in each window."""
        return np.diff(self.question_offsets)[self.question_of_window] + 2

    def context_tokens(self, window: int) -> slice:
        """Return where the context tokens of a window are in `context`, `begin` and `end`."""
        context = self.context_of_question[self.question_of_window[window]]
        first = int(self.context_offsets[context] + self.first[window])
        return slice(first, first + int(self.count[window]))


class SpanWindows:
    """Questions, the windows made of them, and what is needed to lay the windows out in batches."""

    def __init__(self, table: QuestionTable, arrays: WindowArrays, tokenizer: Tokenizer) -> None:
        self.arrays = arrays
        self._table = table
        self._cls, self._sep = tokenizer.require_roles(("cls", "sep"), "the tokenizer")
        self._pad = tokenizer.pad or 0

    def __len__(self) -> int:
        return len(self.arrays.first)

    def questions(self) -> list[Question]:
        """Return the questions, in their order."""
        everything = self._table.questions
        return [everything[row] for row in self.arrays.row_of_question]

    def question(self, window: int) -> Question:
        """Return the question of a window."""
        return self._table.questions[self.arrays.row_of_question[self.arrays.question_of_window[window]]]

    def batches(self, buckets: Sequence[Bucket], process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every window once, shortest batches first; "example" is its number."""
        plan = EpochPlan(self.arrays.lengths, buckets, seed=None)
        for i in range(plan.batches_per_epoch):
            yield self.assemble(plan[i], process_index, process_count)

    def assemble(self, entry: tuple[Bucket, NDArray[np.int64]], process_index: int, process_count: int) -> Batch:
        """Return this process's rows of one batch of an `EpochPlan`; see `SpanQA` for the arrays."""
        bucket, global_B = entry
        chosen_B = rows_of_process(global_B, process_index, process_count)
        arrays, shape = self.arrays, (len(chosen_B), bucket.length)
        batch: Batch = {"tokens": np.full(shape, self._pad, np.int32)}
        batch |= {name: np.zeros(shape, np.int32) for name in ("types", "segments")}
        for row, window in enumerate(chosen_B.tolist()):
            if window < 0:
                continue
            question = arrays.question_of_window[window]
            asked = arrays.question[arrays.question_offsets[question] : arrays.question_offsets[question + 1]]
            read = arrays.context[arrays.context_tokens(window)]
            tokens = np.concatenate([[self._cls], asked, [self._sep], read, [self._sep]])
            batch["tokens"][row, : len(tokens)] = tokens
            batch["segments"][row, : len(tokens)] = 1
            batch["types"][row, len(asked) + 2 : len(tokens)] = 1
        span_B2 = np.where(chosen_B[:, None] >= 0, arrays.span[chosen_B], -1).astype(np.int32)
        return {**batch, "start": span_B2[:, 0], "end": span_B2[:, 1], "example": chosen_B.astype(np.int64)}


def make_windows(
    questions: Sequence[Question], tokenizer: Tokenizer, shape: Shape, misplaced: Misplaced
) -> WindowArrays:
    """Tokenize questions and contexts, cut the contexts, and find the first answer of each question in its windows.

    Raises `UserError` for an answer that is not at its offset (`misplaced` = "drop" leaves such questions out).
    """
    kept: list[int] = []
    for row, question in enumerate(questions):
        problem = misplaced_answer(question)
        if problem and misplaced == "error":
            raise UserError(f"{problem} data.misplaced=drop leaves such questions out.")
        if not problem:
            kept.append(row)
    number_of: dict[str, int] = {}
    contexts = [number_of.setdefault(questions[row].context, len(number_of)) for row in kept]
    texts = list(number_of)
    starts = range(0, len(texts), _CHUNK)
    encoded = [
        context
        for start in shown(starts, f"Tokenizing {len(texts):,} contexts, {_CHUNK:,} at a time", len(starts))
        for context in tokenizer.encode_with_offsets(texts[start : start + _CHUNK])
    ]
    asked = [ids[: shape.max_query_length] for ids in tokenizer.encode_batch([questions[row].question for row in kept])]
    spans = [np.asarray(offsets, np.int32).reshape(-1, 2) for _, offsets in encoded]
    windows: list[tuple[int, int, int, int, int]] = []
    for number, (row, context, ids) in enumerate(zip(kept, contexts, asked, strict=True)):
        answer = _token_span(questions[row], spans[context])
        room = shape.max_length - len(ids) - 3
        for first, count in _cuts(len(spans[context]), room, shape.doc_stride):
            inside = answer is not None and first <= answer[0] and answer[1] < first + count
            shift = len(ids) + 2 - first
            windows.append(
                (number, first, count, *((answer[0] + shift, answer[1] + shift) if answer and inside else (0, 0)))
            )
    of_window = np.asarray(windows, np.int64).reshape(-1, 5)
    begin_end = np.concatenate([np.zeros((0, 2), np.int32), *spans])
    return WindowArrays(
        context=np.asarray([token for ids, _ in encoded for token in ids], np.uint32),
        begin=begin_end[:, 0],
        end=begin_end[:, 1],
        context_offsets=np.cumsum([0, *map(len, spans)]),
        question=np.asarray([token for ids in asked for token in ids], np.uint32),
        question_offsets=np.cumsum([0, *map(len, asked)]),
        misplaced=np.asarray(len(questions) - len(kept)),
        row_of_question=np.asarray(kept, np.int64),
        context_of_question=np.asarray(contexts, np.int64),
        question_of_window=of_window[:, 0],
        first=of_window[:, 1].astype(np.int32),
        count=of_window[:, 2].astype(np.int32),
        answerable=np.asarray([bool(questions[row].answers) for row in kept], np.bool_),
        span=of_window[:, 3:].astype(np.int32),
    )


def _cuts(length: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each window: `room` tokens from every `stride`-th on, until the last one is in."""
    first = 0
    while True:
        count = min(length - first, room)
        yield first, count
        if first + count >= length:
            return
        first += min(count, stride)


def _token_span(question: Question, begin_end_S2: NDArray[np.int32]) -> tuple[int, int] | None:
    """Return the first and the last token that the first answer touches."""
    if not question.answers:
        return None
    text, start = question.answers[0]
    first = int(np.searchsorted(begin_end_S2[:, 1], start + len(text) - len(text.lstrip()), side="right"))
    last = int(np.searchsorted(begin_end_S2[:, 0], start + len(text.rstrip()), side="left")) - 1
    if last < first:
        raise UserError(
            f"{question.where}: question '{question.id}': the tokenizer makes nothing of its answer '{text}'."
        )
    return first, last


def windows_of(
    table: QuestionTable, tokenizer: Tokenizer, shape: Shape, misplaced: Misplaced
) -> tuple[SpanWindows, str]:
    """Return the windows of a split, and their key in the cache; what was made before is taken from there."""

    def write(folder: Path) -> None:
        arrays = make_windows(table.questions, tokenizer, shape, misplaced)
        for field in dataclasses.fields(arrays):
            np.save(folder / f"{field.name}.npy", getattr(arrays, field.name))

    key = fingerprint(_FORMAT, table.digest, tokenizer.fingerprint, shape, misplaced)
    folder = cached(f"spans-{key}", write)
    loaded = {field.name: np.load(folder / f"{field.name}.npy") for field in dataclasses.fields(WindowArrays)}
    return SpanWindows(table, WindowArrays(**loaded), tokenizer), key
