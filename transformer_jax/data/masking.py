"""Which tokens are hidden: a share of them, or of whole words, and what stands in their place (Devlin 2018, 3.1)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.bits import uniform
from transformer_jax.data.tokenizer import Tokenizer

NO_TARGET: Final = -1
_MASK, _KEEP = 0.8, 0.9  # 80 % [MASK], 10 % as it was, 10 % another token


class Masking:
    """Hides some tokens of every row."""

    def __init__(self, tokenizer: Tokenizer, share: float, most: int, whole_words: bool) -> None:
        """Hide `share` of the tokens ([CLS] and [SEP] counted), at most `most` of a row, or of whole words as many."""
        self._share, self._most = share, most
        (self._mask,) = tokenizer.require_roles(("mask",), "the tokenizer")
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.specials)).astype(np.int32)
        self._goes_on_V = tokenizer.continuations() if whole_words else np.zeros(tokenizer.vocab_size, np.bool_)

    def __call__(
        self,
        tokens_BT: NDArray[np.int32],
        candidate_BT: NDArray[np.bool_],
        length_B: NDArray[np.int64],
        words_BN: NDArray[np.uint64],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Choose tokens and hide them.

        Args:
            tokens_BT: rows of tokens.
            candidate_BT: which of them may be chosen.
            length_B: tokens of each row, without padding.
            words_BN: random words of each row, two for every position.

        Returns:
            The rows as the model sees them [B, T]; the positions chosen, ascending [B, M]; the tokens that stood there
            [B, M], -1 where fewer than M were chosen.

        """
        length = tokens_BT.shape[1]
        # Rounded as Python rounds, half to even; at least one.
        wanted_B = np.clip(np.rint(length_B * self._share), 1, self._most).astype(np.int64)
        before_BT = np.pad(candidate_BT, ((0, 0), (1, 0)))[:, :-1]
        begins_BT = candidate_BT & ~(self._goes_on_V[tokens_BT] & before_BT)
        chosen_BT = _chosen(candidate_BT, begins_BT, wanted_B, words_BN[:, :length])

        fate_BT = uniform(words_BN[:, length : 2 * length])
        pick_BT = np.clip((fate_BT - _KEEP) / (1 - _KEEP), 0, None) * len(self._ordinary)
        another_BT = self._ordinary[pick_BT.astype(np.int64)]
        shown_BT = np.where(fate_BT < _MASK, self._mask, np.where(fate_BT < _KEEP, tokens_BT, another_BT))

        order_BM = np.argsort(~chosen_BT, axis=1, kind="stable")[:, : self._most].astype(np.int32)
        real_BM = np.take_along_axis(chosen_BT, order_BM, 1)
        targets_BM = np.where(real_BM, np.take_along_axis(tokens_BT, order_BM, 1), NO_TARGET)
        hidden_BT = np.where(chosen_BT, shown_BT, tokens_BT).astype(np.int32)
        return hidden_BT, np.where(real_BM, order_BM, 0).astype(np.int32), targets_BM.astype(np.int32)


def _chosen(
    candidate_BT: NDArray[np.bool_],
    begins_BT: NDArray[np.bool_],
    wanted_B: NDArray[np.int64],
    words_BT: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Go through the words of each row in random order, and take each that still fits into `wanted_B`."""
    rows, length = candidate_BT.shape
    row_B = np.arange(rows)
    word_BT = np.cumsum(begins_BT, axis=1) - 1
    words = (row_B[:, None] * length + word_BT)[candidate_BT]
    size_BW = np.bincount(words, minlength=rows * length).reshape(rows, length)
    # Words that are not there come last.
    order_BW = np.argsort(np.where(size_BW > 0, uniform(words_BT), 2.0), axis=1, kind="stable")
    taken_BW = np.zeros((rows, length), np.bool_)
    count_B = np.zeros(rows, np.int64)
    for rank in range(length):
        word_B = order_BW[:, rank]
        size_B = size_BW[row_B, word_B]
        fits_B = (size_B > 0) & (count_B + size_B <= wanted_B)
        if not size_B.any() or (count_B == wanted_B).all():
            break
        taken_BW[row_B, word_B] = fits_B
        count_B += size_B * fits_B
    return candidate_BT & taken_BW[row_B[:, None], np.maximum(word_BT, 0)]
