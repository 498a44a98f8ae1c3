"""Parallel text, read and tokenized: the `OpenData` of translation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.examples import Examples, normalise, overlap
from transformer_jax.data.holdout import SPLITS, Split
from transformer_jax.data.loader import Batch, distinct_shapes, read_ahead, rows_of_process
from transformer_jax.data.plan import Bucket, EpochPlan
from transformer_jax.data.sources import Pairs, chunks
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

if TYPE_CHECKING:
    import grain


_GRAIN: Final = 64  # multiple to which an odd length is rounded up, so that few shapes are compiled


class ParallelData:
    """Implements `transformer_jax.data.loader.OpenData` for pairs of sentences.

    A batch is {"source": int32 [B, S] = w1 ... wn <eos>, "target": int32 [B, T + 1] = <bos> w1 ... wn <eos>, both
    padded with 0; "example": int64 [B]}. The longest of a bucket of length L has S = T = L.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: dict[Split, Pairs],
        examples: dict[Split, Examples],
        buckets: Sequence[Bucket],
        rows_multiple: int,
        threads: int,
    ) -> None:
        """Join tokenized `examples` with the texts in `sources` they came from."""
        self.tokenizer = tokenizer
        (self._bos,) = tokenizer.require_roles(("bos",), "the tokenizer")
        self._sources = sources
        self._examples = examples
        self._buckets = tuple(buckets)
        self._rows_multiple, self._threads = rows_multiple, threads
        self._validation = EpochPlan(examples["validation"].lengths, buckets, seed=None)

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts about the data; the overlap is counted once and then comes from the cache."""
        train = EpochPlan(self._examples["train"].lengths, self._buckets, seed=None)
        return {
            "data": {split: self._sources[split].name for split in SPLITS},
            "pairs": {split: len(self._examples[split]) for split in SPLITS},
            "dropped": {split: dict(self._examples[split].dropped) for split in SPLITS},
            "overlap": self._overlap(),
            "tokens": {
                "source": int(self._examples["train"].source.offsets[-1]),
                "target": int(self._examples["train"].target.offsets[-1]),
            },
            "buckets": [
                {"length": bucket.length, "rows": bucket.rows, "train_pairs": int(n)}
                for bucket, n in zip(self._buckets, train.examples_per_bucket, strict=True)
            ],
            "batches_per_epoch": train.batches_per_epoch,
            "vocabulary": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": fingerprint([self._examples[split].key for split in SPLITS]),
        }

    def describe(self) -> str:
        """Return one line for the log."""
        counts = ", ".join(f"{len(self._examples[split]):,} {split}" for split in SPLITS)
        dropped = {reason: n for reason, n in self._examples["train"].dropped.items() if n}
        left_out = f"; left out of training: {dropped}" if dropped else ""
        return f"data: {counts} pairs, vocabulary {self.tokenizer.vocab_size:,}{left_out}"

    def _overlap(self) -> dict[str, int]:
        def write(folder: Path) -> None:
            held: tuple[Split, ...] = ("validation", "test")
            counts = overlap(self._sources["train"], {split: self.pairs(split) for split in held})
            (folder / "overlap.json").write_text(json.dumps(counts), encoding="utf-8")

        key = fingerprint(self._sources["train"].digest, [self._examples[s].key for s in ("validation", "test")])
        return json.loads((cached(f"overlap-{key}", write) / "overlap.json").read_text(encoding="utf-8"))

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training; see `OpenData.train_iterator`."""
        plan = EpochPlan(self._examples["train"].lengths, self._buckets, seed)

        def assemble(entry: tuple[Bucket, NDArray[np.int64]]) -> Batch:
            return self._batch("train", entry, process_index, process_count)

        return read_ahead(plan, assemble, self._threads)

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every validation example once, shortest batches first."""
        for i in range(self._validation.batches_per_epoch):
            yield self._batch("validation", self._validation[i], process_index, process_count)

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every test example once; those beyond the longest bucket in batches as long as the longest of them."""
        lengths, last = self._examples["test"].lengths, self._buckets[-1]
        longest = -(-int(lengths.max()) // _GRAIN) * _GRAIN
        rows = last.rows * last.length // longest // self._rows_multiple * self._rows_multiple
        more = [Bucket(longest, max(rows, self._rows_multiple))] if longest > last.length else []
        plan = EpochPlan(lengths, [*self._buckets, *more], seed=None)
        for i in range(plan.batches_per_epoch):
            yield self._batch("test", plan[i], process_index, process_count)

    def _batch(
        self, split: Split, entry: tuple[Bucket, NDArray[np.int64]], process_index: int, process_count: int
    ) -> Batch:
        bucket, global_B = entry
        chosen_B = rows_of_process(global_B, process_index, process_count)
        examples = self._examples[split]
        bos_B1 = np.where(chosen_B >= 0, self._bos, 0).astype(np.int32)[:, None]
        return {
            "source": examples.source.padded(chosen_B, bucket.length),
            "target": np.concatenate([bos_B1, examples.target.padded(chosen_B, bucket.length)], axis=1),
            "example": chosen_B.astype(np.int64),
        }

    def pairs(self, split: Split) -> list[tuple[str, str]]:
        """Return the normalised texts of the usable pairs of a split. Raises `UserError` for an unknown split."""
        if split not in SPLITS:
            raise UserError(f"there is no split '{split}', only {', '.join(SPLITS)}.")
        rows = self._examples[split].rows
        texts: list[tuple[str, str]] = []
        for start, chunk in chunks(self._sources[split]):
            first, last = np.searchsorted(rows, (start, start + len(chunk)))
            texts += [_normalised(chunk[row - start]) for row in rows[first:last]]
        return texts

    def example_shapes(self) -> list[tuple[int, int, int]]:
        """List the distinct global shapes of training and validation batches: (B, S, T), T tokens to predict."""
        train = EpochPlan(self._examples["train"].lengths, self._buckets, seed=None)
        return distinct_shapes([train, self._validation])

    def text(self, example: int) -> str:
        """Return the normalised source and target of a training example, with a tab between them."""
        row = int(self._examples["train"].rows[example])
        (pair,) = self._sources["train"].read(row, row + 1)
        return "\t".join(_normalised(pair))


def _normalised(pair: tuple[str, str]) -> tuple[str, str]:
    return normalise(pair[0]), normalise(pair[1])
