"""Which sentences are in which example: pairs for next-sentence prediction, or runs of full sentences.

Devlin 2018, appendix A.2, and its create_pretraining_data.py; Liu 2019 (RoBERTa), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.bits import below, bits, uniform
from transformer_jax.data.corpus import Corpus

_CUTS: Final = 1  # stream of the bits that say at which end a sentence loses a token


@dataclass(frozen=True)
class Examples:
    """The examples of an epoch: each is the tokens at address A and, if there is a second segment, at address B."""

    document: NDArray[np.int64]
    """Document of segment A."""
    a: NDArray[np.int64]
    a_length: NDArray[np.int64]
    b: NDArray[np.int64]
    b_length: NDArray[np.int64]
    follows: NDArray[np.bool_]
    """Whether B follows A in its document; else B is from another one."""

    def __len__(self) -> int:
        return len(self.a)


def pairs(corpus: Corpus, room: int, short: float, seed: int, *numbers: int) -> Examples:
    """Cut every document into pairs of segments, together at most `room` tokens.

    Sentences are gathered up to `room` tokens (or, for the share `short`, a random smaller number), at least two; A is
    a random number of the first of them. Half of the time B is the rest; else it begins at a random sentence of a
    random other document, and the next pair begins with the rest. What exceeds `room` is taken from the longer segment,
    token by token, at either end. A last sentence that is left alone makes no pair.
    """

    def choose(
        d: NDArray[np.int64], s: NDArray[np.int64], words: NDArray[np.uint64]
    ) -> tuple[Examples, NDArray[np.int64]]:
        target = _targets(room, short, words)
        e = _reach(corpus, d, s, target, "left", least=2)
        middle = s + 1 + below(words[2], e - s - 1)
        follows = uniform(words[3]) < 0.5
        a, a_length = corpus.offsets[s], corpus.offsets[middle] - corpus.offsets[s]
        other = below(words[4], len(corpus) - 1)
        other += other >= d
        start = corpus.first_N[other] + below(words[5], corpus.last_N[other] - corpus.first_N[other])
        stop = np.where(follows, e, _reach(corpus, other, start, target - a_length, "left", least=1))
        start = np.where(follows, middle, start)
        b, b_length = corpus.offsets[start], corpus.offsets[stop] - corpus.offsets[start]
        return Examples(d, a, a_length, b, b_length, follows), np.where(follows, e, middle)

    return _walk(corpus, room, 2, choose, seed, *numbers)


def runs(corpus: Corpus, room: int, short: float, seed: int, *numbers: int) -> Examples:
    """Cut every document into runs of as many full sentences as fit in `room` tokens (RoBERTa's DOC-SENTENCES)."""

    def choose(
        d: NDArray[np.int64], s: NDArray[np.int64], words: NDArray[np.uint64]
    ) -> tuple[Examples, NDArray[np.int64]]:
        e = _reach(corpus, d, s, _targets(room, short, words), "right", least=1)
        none = np.zeros(len(d), np.int64)
        length = corpus.offsets[e] - corpus.offsets[s]
        return Examples(d, corpus.offsets[s], length, corpus.offsets[s], none, none > 0), e

    return _walk(corpus, room, 1, choose, seed, *numbers)


def _targets(room: int, short: float, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.where(uniform(words[0]) < short, 2 + below(words[1], room - 1), room)


def _reach(
    corpus: Corpus, d: NDArray[np.int64], s: NDArray[np.int64], tokens: NDArray[np.int64], side: str, least: int
) -> NDArray[np.int64]:
    """Return where sentences from `s` on have that many tokens, or ("right") no more than that many."""
    found = np.searchsorted(corpus.offsets, corpus.offsets[s] + tokens, side="left" if side == "left" else "right")
    return np.clip(found - (side == "right"), s + least, corpus.last_N[d])


Choose = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]], "tuple[Examples, NDArray[np.int64]]"]


def _walk(corpus: Corpus, room: int, least: int, choose: Choose, seed: int, *numbers: int) -> Examples:
    """Walk through all documents side by side, one example of each at a time."""
    d, s = np.arange(len(corpus)), corpus.first_N
    found: list[Examples] = []
    while True:
        left = corpus.last_N[d] - s >= least
        d, s = d[left], s[left]
        if not len(d):
            break
        step = len(found)
        words = bits(6 * len(d), seed, *numbers, step).reshape(6, -1)
        examples, s = choose(d, s, words)
        found.append(_shortened(examples, room, seed, *numbers, step, _CUTS))
    none = np.zeros(0, np.int64)
    found.append(Examples(none, none, none, none, none, none > 0))
    return Examples(**{f.name: np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Examples)})


def _shortened(examples: Examples, room: int, seed: int, *numbers: int) -> Examples:
    """Take tokens from the longer segment, and from B where both are equal, until they fit: at either end by a coin."""
    a, b = examples.a_length, examples.b_length
    excess = np.maximum(a + b - room, 0)
    uneven = np.minimum(excess, np.abs(a - b))
    rest = excess - uneven
    from_a = np.where(a > b, uneven, 0) + rest // 2
    from_b = np.where(a > b, 0, uneven) + (rest + 1) // 2
    cuts = np.concatenate([from_a, from_b])
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(cuts)])
    coins = np.unpackbits(bits(-(-int(ends[-1]) // 64), seed, *numbers).view(np.uint8))
    heads = np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(coins, dtype=np.int64)])[ends])
    front_a, front_b = np.split(heads, 2)
    return Examples(
        examples.document, examples.a + front_a, a - from_a, examples.b + front_b, b - from_b, examples.follows
    )
