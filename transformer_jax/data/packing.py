"""Documents joined to one stream that is cut into rows: which tokens are in row number i, found without iterating."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.bits import bits
from transformer_jax.data.corpus import Corpus
from transformer_jax.data.loader import Batch
from transformer_jax.data.plan import EMPTY
from transformer_jax.data.tokenizer import Tokenizer

NO_TARGET: Final = -1


@dataclass(frozen=True)
class _Epoch:
    """One pass: its documents in order, the first of them cut, with what was cut off at the very end."""

    order: NDArray[np.int64]
    begins: NDArray[np.int64]
    """Where each begins in the stream, and at last the end of the stream."""
    cut: int
    """Positions of the first document that come at the end of the stream instead."""
    rows: NDArray[np.int64]
    """The order in which the rows of the stream are seen."""


class Stream:
    """Rows of `length` positions over the documents of a corpus, epoch after epoch.

    A document of n tokens has n + 1 positions: its inputs are the end of text and its tokens, its targets the tokens
    and the end of text, so that no target crosses into another document. Every epoch holds each position exactly once,
    in documents and rows shuffled anew; the cuts move from epoch to epoch. The last row of a stream is filled up.
    """

    def __init__(
        self, corpus: Corpus, length: int, tokenizer: Tokenizer, separate: bool, seed: int | None, number: int = 0
    ) -> None:
        """Shuffle by (seed, `number`, epoch); None keeps documents and rows in their order, as validation wants."""
        self.corpus, self.length = corpus, length
        (self._end,) = tokenizer.require_roles(("eos",), "the tokenizer")
        self._bytes_V = tokenizer.token_bytes()
        self._separate, self._seed, self._number = separate, seed, number
        self.positions = int(corpus.length_N.sum()) + len(corpus)
        """Positions, and so targets, of an epoch."""
        self.rows = -(-self.positions // length)
        """Rows of an epoch."""
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:  # drawing a large epoch takes seconds and memory: not in every thread
            if number not in self._epochs:
                # Two are kept: reading ahead crosses from one into the next.
                self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}
                self._epochs[number] = self._draw(number)
            return self._epochs[number]

    def _draw(self, number: int) -> _Epoch:
        documents = len(self.corpus)
        order, cut, rows = np.arange(documents), 0, np.arange(self.rows)
        if self._seed is not None:
            words = bits(documents + self.rows + 1, self._seed, self._number, number)
            order = np.argsort(words[:documents], kind="stable")
            rows = np.argsort(words[documents:-1], kind="stable")
            cut = int(words[-1] % np.uint64(self.corpus.length_N[order[0]] + 1))
        order = np.append(order, order[0])
        lengths = self.corpus.length_N[order] + 1
        lengths[0] -= cut
        lengths[-1] = cut
        return _Epoch(order, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), cut, rows)

    def batch(self, rows_B: NDArray[np.int64]) -> Batch:
        """Return the rows `rows_B` of the endless sequence as the arrays `PackedText` describes; -1 is an empty row."""
        shape = (len(rows_B), self.length)
        batch: Batch = {
            "tokens": np.full(shape, self._end, np.int32),
            "targets": np.full(shape, NO_TARGET, np.int32),
            "segments": np.zeros(shape, np.int32),
            "bytes": np.zeros(len(rows_B), np.float32),
            "example": np.full(len(rows_B), EMPTY, np.int64),
        }
        if self._separate:
            batch["positions"] = np.zeros(shape, np.int32)
        epoch_B = np.where(rows_B >= 0, rows_B // self.rows, EMPTY)
        for number in np.unique(epoch_B[rows_B >= 0]):
            here_R = np.flatnonzero(epoch_B == number)
            epoch = self._epoch(int(number))
            self._fill(batch, here_R, epoch, epoch.rows[rows_B[here_R] % self.rows])
        real_BT = batch["targets"] >= 0
        batch["bytes"][:] = np.where(real_BT, self._bytes_V[batch["targets"] * real_BT], 0).sum(1)
        return batch

    def _fill(self, batch: Batch, here_R: NDArray[np.int64], epoch: _Epoch, rows_R: NDArray[np.int64]) -> None:
        begin_R = rows_R * self.length
        end_R = np.minimum(begin_R + self.length, self.positions)
        first_R = np.searchsorted(epoch.begins, begin_R, "right") - 1
        count_R = np.searchsorted(epoch.begins, end_R - 1, "right") - first_R
        # P: the pieces of documents that lie in these rows; E: their positions, one after the other.
        row_P = np.repeat(np.arange(len(rows_R)), count_R)
        number_P = _within(count_R)
        piece_P = first_R[row_P] + number_P
        begin_P = np.maximum(epoch.begins[piece_P], begin_R[row_P])
        length_P = np.minimum(epoch.begins[piece_P + 1], end_R[row_P]) - begin_P
        document_P = epoch.order[piece_P]
        into_P = begin_P - epoch.begins[piece_P] + np.where(piece_P == 0, epoch.cut, 0)

        within_E = _within(length_P)
        into_E = np.repeat(into_P, length_P) + within_E
        start_E = np.repeat(self.corpus.begin_N[document_P], length_P)
        last_E = into_E == np.repeat(self.corpus.length_N[document_P], length_P)
        row_E = here_R[np.repeat(row_P, length_P)]
        column_E = np.repeat(begin_P - begin_R[row_P], length_P) + within_E
        place = (row_E, column_E)

        # A neighbour of the document takes the place of the end of text, and is then overwritten.
        input_E = self.corpus.gather(np.maximum(start_E + into_E - 1, 0))
        target_E = self.corpus.gather(start_E + into_E - last_E)
        batch["tokens"][place] = np.where(into_E == 0, self._end, input_E)
        batch["targets"][place] = np.where(last_E, self._end, target_E)
        batch["segments"][place] = np.repeat(number_P, length_P) + 1 if self._separate else 1
        if self._separate:
            batch["positions"][place] = within_E
        batch["example"][here_R] = epoch.order[first_R]


def _within(count_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 ... n - 1 for each n, one after the other."""
    return np.arange(count_R.sum()) - np.repeat(np.cumsum(count_R) - count_R, count_R)
