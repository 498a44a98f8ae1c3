"""How labelled texts become sequences: BERT's [CLS] a [SEP] b [SEP], or GPT's start a delimiter b extract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

LayoutName = Literal["bert", "gpt", "gpt_both"]


class Sequenced(NamedTuple):
    """One text, or two, as a sequence."""

    ids: list[int]
    first: int
    """Tokens up to the second text: all of them where there is none."""
    words: list[int]
    """Positions of the first token of each word, where words were given; fewer than words if they were cut."""
    cut: bool
    """Whether tokens were left out to keep to the longest length."""


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts to keep: the longer loses its last token until both fit (Devlin 2019).

    Of two equally long ones the second loses it.
    """
    if a + b <= room:
        return a, b
    half = room // 2
    if a <= half:
        return a, room - a
    if b <= half:
        return room - b, b
    return room - half, half


class Layout:
    """Puts special tokens around texts.

    "bert" (Devlin 2019, section 3): [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; by role `cls` and `sep`. "gpt" (Radford
    2018, section 3.3): start a extract, or start a delimiter b extract, where start is the tokenizer's `bos`, extract
    its `eos`, and the delimiter its `sep`, or `eos` again if it has none. The extract token is the last one. "gpt_both"
    lays two texts out like "gpt", to be read in the other order too: for similarity, which has no order.
    """

    def __init__(self, name: LayoutName, tokenizer: Tokenizer, max_length: int, where: str) -> None:
        """Find the special tokens. Raises `UserError` naming the tokenizer by `where` if it lacks one."""
        self.name, self.tokenizer, self.max_length = name, tokenizer, max_length
        if name == "bert":
            self._start, self._end = tokenizer.require_roles(("cls", "sep"), where)
            self._delimiter = self._end
        else:
            self._start, self._end = tokenizer.require_roles(("bos", "eos"), where)
            self._delimiter = self._end if tokenizer.sep is None else tokenizer.sep

    def texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Sequenced]:
        """Lay out texts, or with `pairs` two texts each; the longer of two is cut first."""
        firsts = self.tokenizer.encode_batch(texts)
        if pairs is None:
            return [self._one(ids) for ids in firsts]
        return [self._two(a, b) for a, b in zip(firsts, self.tokenizer.encode_batch(pairs), strict=True)]

    def _one(self, ids: list[int]) -> Sequenced:
        kept = ids[: self.max_length - 2]
        return Sequenced([self._start, *kept, self._end], len(kept) + 2, [], len(kept) < len(ids))

    def _two(self, a: list[int], b: list[int]) -> Sequenced:
        of_a, of_b = longest_first(len(a), len(b), self.max_length - 3)
        ids = [self._start, *a[:of_a], self._delimiter, *b[:of_b], self._end]
        return Sequenced(ids, of_a + 2, [], of_a + of_b < len(a) + len(b))

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Sequenced]:
        """Lay out sentences given as words; a word that the tokenizer makes nothing of becomes `unk`.

        Raises `UserError` for such a word if the tokenizer has no `unk`.
        """
        encoded = self.tokenizer.encode_with_offsets([" ".join(words) for words in sentences])
        return [self._tagged(words, *ids) for words, ids in zip(sentences, encoded, strict=True)]

    def _tagged(self, words: Sequence[str], ids: list[int], offsets: list[tuple[int, int]]) -> Sequenced:
        begins = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
        word_of = np.searchsorted(begins, [begin for begin, _ in offsets], side="right") - 1
        of_word: list[list[int]] = [[] for _ in words]
        for token, word in zip(ids, word_of.tolist(), strict=True):
            of_word[word].append(token)
        sequence, positions = [self._start], list[int]()
        for word, tokens in zip(words, of_word, strict=True):
            if len(sequence) < self.max_length - 1:
                positions.append(len(sequence))
            sequence += tokens or [self._unknown(word)]
        cut = len(sequence) >= self.max_length
        sequence = [*sequence[: self.max_length - 1], self._end]
        return Sequenced(sequence, len(sequence), positions, cut)

    def _unknown(self, word: str) -> int:
        if self.tokenizer.unk is None:
            raise UserError(f"the tokenizer makes nothing of the word '{word}' and has no token for unknown words.")
        return self.tokenizer.unk
