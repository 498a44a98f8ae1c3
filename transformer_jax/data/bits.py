"""Random bits that are a function of a seed and a few numbers, in every process and for ever.

NumPy promises the bits of a bit generator, but not what the methods of `Generator` make of them, and an upgrade must
not change the order of a resumed run: everything here is made of raw bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_PER_COUNT: Final = 4  # words of 64 bits that Philox gives for each value of its counter


def bits(count: int, seed: int, *numbers: int) -> NDArray[np.uint64]:
    """Return `count` words that belong to (seed, *numbers)."""
    return np.random.Philox(np.random.SeedSequence((seed % 2**64, *numbers))).random_raw(count)


def bits_of_rows(rows_B: NDArray[np.int64], count: int, seed: int, *numbers: int) -> NDArray[np.uint64]:
    """Return uint64 [B, count]: the words of row i belong to (seed, *numbers, i), whatever rows are asked for."""
    counts = -(-count // _PER_COUNT)
    sequence = np.random.SeedSequence((seed % 2**64, *numbers))
    runs = np.split(rows_B, np.flatnonzero(np.diff(rows_B) != 1) + 1)
    words = [
        np.random.Philox(sequence).advance(int(run[0]) * counts).random_raw(len(run) * counts * _PER_COUNT)
        for run in runs
        if len(run)
    ]
    return np.concatenate([np.zeros(0, np.uint64), *words]).reshape(len(rows_B), counts * _PER_COUNT)[:, :count]


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers in [0, 1), one of each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(words: NDArray[np.uint64], limit: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return integers in [0, limit), one of each word."""
    return (uniform(words) * limit).astype(np.int64)
