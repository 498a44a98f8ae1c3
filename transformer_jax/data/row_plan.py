"""The order of packed rows: which row of which source is in each place of batch number n, found without iterating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.loader import ENDLESS
from transformer_jax.errors import UserError


def shares(weights: Sequence[Fraction], rows: int) -> list[int]:
    """Return how many of the first `rows` rows each member of a mixture has: within one row of its weight.

    One member after the other takes its share of what is left, which never takes back a row that was given.
    """
    given, left = [], Fraction(1)
    for weight in weights:
        given.append(int(rows * weight / left) if left else 0)
        rows, left = rows - given[-1], left - weight
    return given


@dataclass(frozen=True)
class RowPlan:
    """The endless sequence of batches: `plan[n]` is (source [B], row of that source [B]), a pure function of n."""

    weights: Sequence[Fraction]
    rows: int
    """Rows of a batch after the ramp."""
    ramp: Sequence[tuple[int, int]] = ()
    """(rows, steps) of the stages before."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return source and row number of every row of batch `step`."""
        begin, end = self.rows_before(step), self.rows_before(step + 1)
        taken = list(zip(shares(self.weights, begin), shares(self.weights, end), strict=True))
        source_B = np.repeat(np.arange(len(taken)), [b - a for a, b in taken])
        return source_B, np.concatenate([np.arange(a, b) for a, b in taken])

    def rows_before(self, step: int) -> int:
        """Rows of all batches before `step`."""
        total = 0
        for rows, steps in self.ramp:
            total += rows * min(step, steps)
            step -= min(step, steps)
        return total + step * self.rows


def check_rows(field: str, rows: int, multiple: int) -> None:
    """Raise `UserError` if a batch would have no rows, or rows that the mesh cannot divide."""
    if rows < 1 or rows % multiple:
        raise UserError(f"{field} = {rows} is no multiple of data.rows_multiple = {multiple}.")
