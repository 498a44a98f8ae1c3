"""Which rows are held out: whole groups, never single rows, since neighbouring rows say almost the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from transformer_jax.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")

_SHARE: Final = 20  # validation and test are one twentieth of the rows each
_BLOCK: Final = 20  # neighbouring rows that stay together where no group is given
_LEAST_BLOCKS: Final = 60


def blocks(rows: int) -> list[str]:
    """Name the group of each of `rows` rows: contiguous blocks of 20, fewer where that would leave too few blocks."""
    block = max(1, min(_BLOCK, rows // _LEAST_BLOCKS))
    return [f"block {row // block}" for row in range(rows)]


def hold_out(groups: Sequence[str], where: str) -> list[Split]:
    """Assign every row to a split, about 90/5/5, so that no group is in two of them.

    The order in which groups are considered is that of their SHA-256: the same in every process and Python.
    `where` names the data in the `UserError` raised when there are fewer than three groups.
    """
    sizes = Counter(groups)
    if len(sizes) < 3:
        raise UserError(
            f"{where}: {len(groups)} rows in {len(sizes)} groups cannot be split into train, validation and test; "
            "name a validation and a test file of your own."
        )
    # The two smallest groups always fit, so that neither held-out split is empty.
    share = max(len(groups) // _SHARE, sorted(sizes.values())[1])
    rows = {"validation": 0, "test": 0}
    split: dict[str, Split] = {}
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        held: Split = "validation" if rows["validation"] <= rows["test"] else "test"
        if rows[held] + sizes[group] <= share:
            rows[held] += sizes[group]
            split[group] = held
        else:
            split[group] = "train"
    return [split[group] for group in groups]
