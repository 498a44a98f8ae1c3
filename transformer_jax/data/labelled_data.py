"""Labelled texts, read and tokenized: the `OpenData` of classification, regression and tagging."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import fingerprint
from transformer_jax.data.holdout import SPLITS, Split
from transformer_jax.data.labelled_encoded import TextEncoder, encode_table
from transformer_jax.data.labelled_rows import Example, Kind
from transformer_jax.data.labelled_tables import Table, Tables, examples_of
from transformer_jax.data.loader import Batch, read_ahead
from transformer_jax.data.plan import Bucket, EpochPlan
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

if TYPE_CHECKING:
    import grain


class LabelledData:
    """Implements `transformer_jax.data.loader.OpenData`; `LabelledText` says what is in a batch."""

    def __init__(self, tables: Tables, encoder: TextEncoder, labels: tuple[str, ...], threads: int) -> None:
        """Tokenize all splits, or take them from the cache. Raises `UserError` for a label outside `labels`."""
        self.encoder = encoder
        self.labels = list(labels)
        """Names of the classes or tags, by number; none where labels are numbers."""
        self._tables, self._threads = tables, threads
        self._encoded = {
            split: encode_table(table, encoder, labels, tables.paired) for split, table in tables.splits.items()
        }
        self._require_labels("train")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all texts."""
        return self.encoder.layout.tokenizer

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts; "labels" are the names of the classes by number, which prediction needs."""
        train = EpochPlan(self._encoded["train"].tokens.lengths, self.encoder.buckets, seed=None)
        return {
            "data": {split: self._tables.splits[split].name for split in SPLITS},
            "columns": self._tables.columns._asdict(),
            "examples": {split: len(self._encoded[split]) for split in SPLITS},
            "labels": self.labels,
            "label_counts": {split: self._label_counts(split) for split in SPLITS},
            "truncated": {split: self._encoded[split].truncated for split in SPLITS},
            "overlap": self._overlap(),
            "tokens": int(self._encoded["train"].tokens.offsets[-1]),
            "buckets": [
                {"length": bucket.length, "rows": bucket.rows, "train_examples": int(n)}
                for bucket, n in zip(self.encoder.buckets, train.examples_per_bucket, strict=True)
            ],
            "batches_per_epoch": train.batches_per_epoch,
            "vocabulary": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": fingerprint([self._encoded[split].key for split in SPLITS]),
        }

    def describe(self) -> str:
        """Return one line for the log."""
        counts = ", ".join(f"{len(self._encoded[split]):,} {split}" for split in SPLITS)
        columns = self._tables.columns
        found = "" if self._tables.named else f" (no header: label in column {columns.label}, text in {columns.text})"
        shown = ", ".join(self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
        what = f"{len(self.labels)} {self.encoder.kind}: {shown}" if self.labels else "numbers"
        cut = self._encoded["train"].truncated
        return f"data: {counts} examples{found}, labels are {what}; vocabulary {self.tokenizer.vocab_size:,}" + (
            f"; {cut:,} training texts cut to {self.encoder.layout.max_length} tokens" if cut else ""
        )

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training; see `OpenData.train_iterator`."""
        train = self._encoded["train"]
        plan = EpochPlan(train.tokens.lengths, self.encoder.buckets, seed)

        def assemble(entry: tuple[Bucket, NDArray[np.int64]]) -> Batch:
            return self.encoder.assemble(train, entry, process_index, process_count)

        return read_ahead(plan, assemble, self._threads)

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every validation example once, shortest batches first."""
        return self.encoder.one_pass(self._encoded["validation"], process_index, process_count)

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every test example once, shortest batches first."""
        return self.encoder.one_pass(self._encoded["test"], process_index, process_count)

    def text(self, example: int) -> str:
        """Return the text of a training example, and after a tab the second one if there is one."""
        (found,) = self._tables.splits["train"].read(example, example + 1)
        return f"{found.text}\t{found.pair}" if self._tables.paired else found.text

    def examples(self, split: Split) -> list[Example]:
        """Return the texts and labels of a split, in its order (a baseline reads them)."""
        return list(examples_of(self._tables.splits[split]))

    def references(self, split: Split) -> NDArray[Any] | list[tuple[str, ...]]:
        """Return the true labels of a split in its order: class numbers, numbers, or the tags of all words.

        Raises `UserError` if the labels are not known, as those of GLUE's test splits.
        """
        self._require_labels(split)
        if self.encoder.kind != "tags":
            return self._encoded[split].label
        return [example.label for example in self.examples(split) if isinstance(example.label, tuple)]

    def _require_labels(self, split: Split) -> None:
        label = self._encoded[split].label
        if (label < 0).any() if self.encoder.kind == "classes" else np.isnan(label).any():
            name = self._tables.splits[split].name
            raise UserError(f"{name} has examples without a label; set data.{split} to a split that has labels.")

    def _label_counts(self, split: Split) -> dict[str, int]:
        encoded = self._encoded[split]
        if self.encoder.kind == "number":
            return {}
        numbers = encoded.label if encoded.tags is None else encoded.tags.flat.astype(np.int64) - 1
        return {
            name: int(n)
            for name, n in zip(self.labels, np.bincount(numbers[numbers >= 0], minlength=len(self.labels)), strict=True)
        }

    def _overlap(self) -> dict[str, int]:
        """Count the held-out texts that also stand, as the same tokens, in training."""
        train = set(_as_bytes(self._encoded["train"].tokens))
        return {
            split: sum(text in train for text in _as_bytes(self._encoded[split].tokens))
            for split in SPLITS
            if split != "train"
        }


def learnt_labels(table: Table, kind: Kind) -> tuple[str, ...]:
    """Return the classes, or tags, of a training split in sorted order.

    Raises `UserError` if there are fewer than two: nothing could be learnt.
    """
    found: set[str] = set()
    for example in examples_of(table):
        found.update(example.label if isinstance(example.label, tuple) else [str(example.label)])
    if len(found) < 2:
        raise UserError(f"{table.name}: every label is '{''.join(found)}'; there must be at least two {kind}.")
    return tuple(sorted(found))


def _as_bytes(ragged: Ragged) -> Iterator[bytes]:
    for begin, end in itertools.pairwise(ragged.offsets.tolist()):
        yield ragged.flat[begin:end].tobytes()
