"""Masked rows of documents, endlessly: [CLS] A [SEP] B [SEP] with some of its tokens hidden."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.bits import bits, bits_of_rows
from transformer_jax.data.corpus import Corpus
from transformer_jax.data.loader import Batch
from transformer_jax.data.masking import Masking
from transformer_jax.data.plan import EMPTY
from transformer_jax.data.sentence_pairs import Examples, pairs, runs
from transformer_jax.data.tokenizer import Role, Tokenizer

if TYPE_CHECKING:
    from transformer_jax.data.masked import MaskedText

ROLES: Final[tuple[Role, ...]] = ("pad", "cls", "sep", "mask")
NO_LABEL: Final = -1
_ORDER, _MASKS = 1, 2  # streams of random bits, beside those of the examples themselves


class MaskedRows:
    """The masked rows of one corpus, endlessly: a pure function of (seed, row)."""

    def __init__(self, corpus: Corpus, config: MaskedText, tokenizer: Tokenizer, seed: int | None, number: int) -> None:
        """Shuffle by (seed, `number`, epoch); None keeps the documents in their order."""
        self._corpus, self._config = corpus, config
        self._seed, self._number = seed, number
        self._pad, self._cls, self._sep, _ = tokenizer.require_roles(ROLES, "the tokenizer")
        self._masking = Masking(tokenizer, config.masked, config.max_predictions, config.whole_words)
        self._epochs: dict[int, tuple[Examples, NDArray[np.int64]]] = {}
        self._lock = threading.Lock()
        self.rows = len(self._epoch(0)[0])
        """Rows of an epoch. Later ones are made of a few examples more or less: some are left out or seen twice."""

    def _epoch(self, epoch: int) -> tuple[Examples, NDArray[np.int64]]:
        with self._lock:  # a large corpus takes seconds and memory: not in every thread
            if epoch not in self._epochs:
                # Two are kept: reading ahead crosses from one into the next.
                self._epochs = {n: kept for n, kept in self._epochs.items() if n == epoch - 1}
                self._epochs[epoch] = self._draw(epoch)
            return self._epochs[epoch]

    def _draw(self, epoch: int) -> tuple[Examples, NDArray[np.int64]]:
        config, specials = self._config, 3 if self._config.next_sentence else 2
        make = pairs if config.next_sentence else runs
        examples = make(self._corpus, config.length - specials, config.short, self._seed or 0, self._number, epoch)
        if self._seed is None:
            return examples, np.arange(len(examples))
        words = bits(len(examples), self._seed, self._number, epoch, _ORDER)
        return examples, np.argsort(words, kind="stable")

    def batch(self, rows_B: NDArray[np.int64]) -> Batch:
        """Return these rows as the arrays `MaskedText` describes; -1 is a row of padding."""
        config, corpus = self._config, self._corpus
        drawn = {int(e): self._epoch(int(e)) for e in np.unique(rows_B[rows_B >= 0] // self.rows)}
        chosen = np.zeros((6, len(rows_B)), np.int64)
        for epoch, (examples, order) in drawn.items():
            here = np.flatnonzero((rows_B >= 0) & (rows_B // self.rows == epoch))
            picked = order[rows_B[here] % self.rows % len(order)]
            columns = (
                examples.document,
                examples.a,
                examples.a_length,
                examples.b,
                examples.b_length,
                examples.follows,
            )
            chosen[:, here] = [column[picked] for column in columns]
        document_B, a_B, a_length_B, b_B, b_length_B, follows_B = chosen
        real_B = rows_B >= 0

        position_T = np.arange(config.length)
        # [CLS] A [SEP] B [SEP]: the first [SEP] stands at a + 1, the last at the end.
        first_B1 = (a_length_B + 1)[:, None]
        end_B1 = first_B1 + np.where(config.next_sentence, b_length_B + 1, 0)[:, None]
        in_a_BT = (position_T > 0) & (position_T < first_B1)
        in_b_BT = (position_T > first_B1) & (position_T < end_B1)
        address_BT = np.where(in_a_BT, a_B[:, None] + position_T - 1, b_B[:, None] + position_T - first_B1 - 1)
        text_BT = (in_a_BT | in_b_BT) & real_B[:, None]
        inside_BT = (position_T <= end_B1) & real_B[:, None]
        tokens_BT = np.where(inside_BT, np.where(position_T == 0, self._cls, self._sep), self._pad).astype(np.int32)
        tokens_BT[text_BT] = corpus.gather(address_BT[text_BT])

        words_BN = np.zeros((len(rows_B), 2 * config.length), np.uint64)
        words_BN[real_B] = bits_of_rows(rows_B[real_B], 2 * config.length, self._seed or 0, self._number, _MASKS)
        length_B = np.where(real_B, end_B1[:, 0] + 1, 0)
        hidden_BT, masked_BM, targets_BM = self._masking(tokens_BT, text_BT, length_B, words_BN)
        known_B = real_B & config.next_sentence
        return {
            "tokens": hidden_BT,
            "types": (inside_BT & (position_T > first_B1)).astype(np.int32),
            "segments": inside_BT.astype(np.int32),
            "positions_masked": masked_BM,
            "targets": targets_BM,
            "next": np.where(known_B, follows_B, NO_LABEL).astype(np.int32),
            "example": np.where(real_B, document_B, EMPTY),
        }
