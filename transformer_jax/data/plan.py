"""The order of training: which examples are in batch number i, found without iterating.

A pure function of (seed, i): the number of hosts does not enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.bits import bits
from transformer_jax.data.loader import ENDLESS

EMPTY: Final = -1


def geometric_buckets(max_length: int, first: int = 16) -> tuple[int, ...]:
    """Return few bucket lengths: doubling from `first`, the last one `max_length`."""
    lengths = []
    while first < max_length:
        lengths.append(first)
        first *= 2
    return (*lengths, max_length)


@dataclass(frozen=True)
class Bucket:
    """Examples of similar length share batches of one shape."""

    length: int
    """Tokens to which both sides are padded."""
    rows: int
    """Rows of a batch, over all hosts."""


def make_buckets(lengths: Sequence[int], batch_tokens: int, rows_multiple: int) -> tuple[Bucket, ...]:
    """Give each bucket length as many rows as fit in `batch_tokens`, a multiple of `rows_multiple`."""
    return tuple(Bucket(length, batch_tokens // length // rows_multiple * rows_multiple) for length in lengths)


class EpochPlan:
    """Endless sequence of batches over examples of the given lengths, reshuffled in every epoch.

    Every epoch holds each example exactly once and has the same number of batches; the last batch of a bucket is
    filled up with empty rows. `plan[i]` is (bucket, examples int64 [rows]), where -1 marks an empty row.
    """

    def __init__(self, lengths: NDArray[np.int64], buckets: Sequence[Bucket], seed: int | None) -> None:
        """Plan for `seed`; None leaves everything in its order, which is what validation wants.

        The buckets are in ascending order and the last holds the longest example.
        """
        self.buckets = tuple(buckets)
        self._seed = seed
        ends = [bucket.length for bucket in buckets]
        self._bucket_of = np.searchsorted(ends, lengths).astype(np.int16)
        self.examples_per_bucket = np.bincount(self._bucket_of, minlength=len(buckets))
        batches = [-(-int(n) // bucket.rows) for n, bucket in zip(self.examples_per_bucket, buckets, strict=True)]
        self._bucket_of_batch = np.repeat(np.arange(len(buckets)), batches)
        self._number_in_bucket = np.concatenate([np.arange(n) for n in batches])
        self._first_of_bucket = np.cumsum([0, *self.examples_per_bucket])
        # Two epochs: reading ahead crosses from one into the next.
        self._epoch = lru_cache(maxsize=2)(self._draw)

    @property
    def batches_per_epoch(self) -> int:
        """Batches after which every example has been seen once more."""
        return len(self._bucket_of_batch)

    def __len__(self) -> int:
        """The sequence has no end."""
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[Bucket, NDArray[np.int64]]:
        """Return the bucket and the examples of batch `index`."""
        epoch, position = divmod(int(index), self.batches_per_epoch)
        examples, batch_order = self._epoch(epoch)
        batch = batch_order[position]
        number = int(self._bucket_of_batch[batch])
        bucket = self.buckets[number]
        begin = self._first_of_bucket[number] + self._number_in_bucket[batch] * bucket.rows
        chosen = examples[begin : min(begin + bucket.rows, self._first_of_bucket[number + 1])]
        return bucket, np.pad(chosen, (0, bucket.rows - len(chosen)), constant_values=EMPTY)

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the examples, shuffled within adjoining buckets, and the order of the batches."""
        if self._seed is None:
            examples = np.argsort(self._bucket_of, kind="stable")
            return examples, np.arange(self.batches_per_epoch)
        examples_of, batches_of = np.split(
            bits(len(self._bucket_of) + self.batches_per_epoch, self._seed, epoch), [len(self._bucket_of)]
        )
        shuffled = np.argsort(examples_of, kind="stable")
        examples = shuffled[np.argsort(self._bucket_of[shuffled], kind="stable")]
        return examples, np.argsort(batches_of, kind="stable")
