"""From a dataset string to pairs by random access: a TFDS name, or the user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, Protocol

from transformer_jax.data.files import Rows, is_files, read_files
from transformer_jax.data.holdout import SPLITS, Split, hold_out
from transformer_jax.errors import UserError

CHUNK: Final = 10_000


class Pairs(Protocol):
    """Aligned (source, target) texts that are read by position."""

    @property
    def name(self) -> str:
        """What to call the pairs in messages."""

    @property
    def digest(self) -> str:
        """Hash that differs where the content differs."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Return the pairs `start` to `stop` (exclusive)."""


class MemoryPairs:
    """Pairs held in memory: the user's own files."""

    def __init__(self, name: str, pairs: list[tuple[str, str]], digest: str) -> None:
        self.name = name
        self.digest = digest
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Return the pairs `start` to `stop` (exclusive)."""
        return self._pairs[start:stop]


def chunks(pairs: Pairs, size: int = CHUNK) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yield (position of the first, pairs) from beginning to end."""
    for start in range(0, len(pairs), size):
        yield start, pairs.read(start, min(start + size, len(pairs)))


def open_splits(
    dataset: str, source: str, target: str, parts: dict[Split, str], data_dir: str = ""
) -> dict[Split, Pairs]:
    """Open train, validation and test of a dataset.

    Args:
        dataset: a TFDS name (`wmt14_translate/de-en`, `tjax_parallel/help_en_ko`), or files: `pairs.tsv`,
            `pairs.jsonl`, `a.de,a.en`, each also `.gz` or `.xz`.
        source: language code of the source side.
        target: language code of the target side.
        parts: for each split a TFDS split expression or a file; "" is the split of that name, or for files the share
            of `dataset` that is held out by group.
        data_dir: where TFDS keeps prepared datasets; "" is its own default.

    Raises `UserError` for whatever is absent or malformed.

    """
    if is_files(dataset):
        return _file_splits(dataset, source, target, parts)
    from transformer_jax.data.tfds_source import tfds_splits  # noqa: PLC0415 - TFDS takes a second to import

    return tfds_splits(dataset, source, target, {split: parts[split] or split for split in SPLITS}, data_dir)


def _file_splits(dataset: str, source: str, target: str, parts: dict[Split, str]) -> dict[Split, Pairs]:
    rows = read_files(dataset, source, target)
    held: list[Split] = ["train"] * len(rows.pairs)
    if not all(parts[split] for split in ("validation", "test")):
        held = [split if not parts[split] else "train" for split in hold_out(rows.groups, where=dataset)]
    splits: dict[Split, Pairs] = {}
    for split in SPLITS:
        if parts[split]:
            _reject_expression(split, parts[split])
            own = read_files(parts[split], source, target)
            splits[split] = MemoryPairs(parts[split], own.pairs, own.digest)
        else:
            splits[split] = _share(dataset, rows, held, split)
    return splits


def _share(dataset: str, rows: Rows, held: list[Split], split: Split) -> MemoryPairs:
    positions = [row for row, owner in enumerate(held) if owner == split]
    digest = hashlib.sha256(f"{rows.digest} {positions}".encode()).hexdigest()
    return MemoryPairs(f"{dataset} ({split})", [rows.pairs[row] for row in positions], digest)


def _reject_expression(split: Split, value: str) -> None:
    if not is_files(value):
        raise UserError(
            f"data.{split} = '{value}' is no file. For your own files it is a path; "
            "split expressions such as train[99%:] are for TFDS datasets."
        )
