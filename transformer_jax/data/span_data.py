"""Questions on contexts, read and tokenized: the `OpenData` of span question answering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import fingerprint
from transformer_jax.data.holdout import SPLITS, Split
from transformer_jax.data.loader import Batch, read_ahead
from transformer_jax.data.plan import Bucket, EpochPlan
from transformer_jax.data.span_rows import FileQuestions, Misplaced, Question, QuestionTable
from transformer_jax.data.span_windows import Shape, SpanWindows, make_windows, windows_of
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

if TYPE_CHECKING:
    import grain


class SpanEncoder:
    """Cuts questions and contexts into windows: all that answering new questions needs of the data."""

    def __init__(self, tokenizer: Tokenizer, shape: Shape, buckets: Sequence[Bucket]) -> None:
        self.tokenizer, self.shape, self.buckets = tokenizer, shape, tuple(buckets)

    def windows(self, asked: Sequence[tuple[str, str]]) -> SpanWindows:
        """Make windows of (question, context) pairs; their ids are "0", "1", ...

        Raises `UserError` for an empty question or context.
        """
        for number, (question, context) in enumerate(asked, start=1):
            if not question.strip() or not context.strip():
                raise UserError(f"the {'context of question' if question.strip() else 'question'} {number} is empty.")
        questions = [Question(str(i), question, context, (), "", "") for i, (question, context) in enumerate(asked)]
        arrays = make_windows(questions, self.tokenizer, self.shape, "error")
        return SpanWindows(FileQuestions("", questions, ""), arrays, self.tokenizer)

    def batches(self, windows: SpanWindows) -> Iterator[Batch]:
        """Yield every window once; "example" is its number, "start" and "end" are those of no answer."""
        return windows.batches(self.buckets)


class SpanData:
    """Implements `transformer_jax.data.loader.OpenData`; `SpanQA` says what is in a batch."""

    def __init__(
        self, tables: dict[Split, QuestionTable], encoder: SpanEncoder, misplaced: Misplaced, threads: int
    ) -> None:
        """Cut all splits into windows. Raises `UserError` for an answer that is not at its offset."""
        self.encoder = encoder
        self._tables, self._threads = tables, threads
        made = {
            split: windows_of(table, encoder.tokenizer, encoder.shape, misplaced) for split, table in tables.items()
        }
        self._windows = {split: windows for split, (windows, _) in made.items()}
        self._keys = [made[split][1] for split in SPLITS]
        for split in SPLITS:
            if not len(self._windows[split]):
                raise UserError(f"{tables[split].name}: no question whose answer is at its offset.")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of questions and contexts."""
        return self.encoder.tokenizer

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts about the data."""
        train = EpochPlan(self._windows["train"].arrays.lengths, self.encoder.buckets, seed=None)
        return {
            "data": {split: self._tables[split].name for split in SPLITS},
            "questions": {split: len(self._windows[split].arrays.row_of_question) for split in SPLITS},
            "misplaced": {split: int(self._windows[split].arrays.misplaced) for split in SPLITS},
            "unanswerable": {split: int((~self._windows[split].arrays.answerable).sum()) for split in SPLITS},
            "windows": {split: len(self._windows[split]) for split in SPLITS},
            "windows_with_answer": {split: int(self._windows[split].arrays.span.all(axis=1).sum()) for split in SPLITS},
            "buckets": [
                {"length": bucket.length, "rows": bucket.rows, "train_windows": int(n)}
                for bucket, n in zip(self.encoder.buckets, train.examples_per_bucket, strict=True)
            ],
            "batches_per_epoch": train.batches_per_epoch,
            "vocabulary": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": fingerprint(self._keys),
        }

    def describe(self) -> str:
        """Return one line for the log."""
        counts = ", ".join(
            f"{len(self._windows[split].arrays.row_of_question):,} {split} ({len(self._windows[split]):,} windows)"
            for split in SPLITS
        )
        left_out = sum(int(windows.arrays.misplaced) for windows in self._windows.values())
        without = int((~self._windows["train"].arrays.answerable).sum())
        return (
            f"data: {counts} questions, {without:,} training questions without answer; "
            f"vocabulary {self.tokenizer.vocab_size:,}"
            + (f"; {left_out:,} questions left out, whose answer is not at its offset" if left_out else "")
        )

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training; see `OpenData.train_iterator`."""
        train = self._windows["train"]
        plan = EpochPlan(train.arrays.lengths, self.encoder.buckets, seed)

        def assemble(entry: tuple[Bucket, NDArray[np.int64]]) -> Batch:
            return train.assemble(entry, process_index, process_count)

        return read_ahead(plan, assemble, self._threads)

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every window of the validation questions once, shortest batches first."""
        return self._windows["validation"].batches(self.encoder.buckets, process_index, process_count)

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every window of the test questions once, shortest batches first."""
        return self._windows["test"].batches(self.encoder.buckets, process_index, process_count)

    def text(self, example: int) -> str:
        """Return the question of a training window, and after a tab its part of the context."""
        windows = self._windows["train"]
        read, question = windows.arrays.context_tokens(example), windows.question(example)
        begin, end = windows.arrays.begin[read][0], windows.arrays.end[read][-1]
        return f"{question.question}\t{question.context[begin:end]}"

    def windows(self, split: Split) -> SpanWindows:
        """Return the windows of a split, which `decode_spans` takes."""
        return self._windows[split]

    def references(self, split: Split) -> dict[str, list[str]]:
        """Return the acceptable answers to each question by its id; none where there is no answer."""
        return {question.id: [text for text, _ in question.answers] for question in self._windows[split].questions()}
