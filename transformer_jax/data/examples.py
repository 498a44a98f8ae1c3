"""Usable pairs of a split: normalised, filtered, tokenized, and kept as flat arrays that are cached on disk."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.holdout import Split
from transformer_jax.data.sources import CHUNK, Pairs, chunks
from transformer_jax.data.tokenizer import EOS, PAD, Tokenizer

_FORMAT: Final = 1  # of the cached arrays; a change makes old caches unused
_SHOW_PROGRESS_FROM: Final = 200_000


@dataclass(frozen=True)
class Filters:
    """Which pairs are used; 0 means no limit."""

    min_words: int = 0
    """Fewest whitespace words on either side."""
    max_words: int = 0
    """Most whitespace words on either side."""
    max_length: int = 0
    """Most tokens on either side, <eos> included."""


@dataclass(frozen=True)
class Ragged:
    """Token sequences of different length, one after the other."""

    flat: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    """Where each begins in `flat`, and at last its end: one more than there are sequences."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    def padded(self, examples_B: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """Return the sequences `examples_B` as int32 [B, length], padded with 0; -1 is a row of padding."""
        real_B = examples_B >= 0
        begin_B = self.offsets[np.where(real_B, examples_B, 0)]
        length_B = np.where(real_B, self.offsets[np.where(real_B, examples_B, 0) + 1] - begin_B, 0)
        position_T = np.arange(length)
        inside_BT = position_T < length_B[:, None]
        tokens_BT = np.full(inside_BT.shape, PAD, np.int32)
        tokens_BT[inside_BT] = self.flat[(begin_B[:, None] + position_T)[inside_BT]]
        return tokens_BT


@dataclass(frozen=True)
class Examples:
    """The usable pairs of one split. An example is known by its position here."""

    key: str
    """Stands for the texts, the filters and the tokenizer they were made with."""
    rows: NDArray[np.int64]
    """Position of each example among the pairs it came from."""
    source: Ragged
    target: Ragged
    dropped: dict[str, int]
    """How many pairs were left out, by reason: "empty", "words", "length"."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longer side of each example, <eos> included."""
        return np.maximum(self.source.lengths, self.target.lengths)


def normalise(text: str) -> str:
    """Return `text` in NFC without white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def reason_to_drop(source: str, target: str, filters: Filters) -> str | None:
    """Say why a normalised pair is not used ("empty" or "words"), or None. Needs no tokenizer."""
    if not source or not target:
        return "empty"
    for side in (source, target):
        words = len(side.split())
        if words < filters.min_words or (filters.max_words and words > filters.max_words):
            return "words"
    return None


def usable_texts(pairs: Pairs, filters: Filters, stride: int = 1) -> Iterator[str]:
    """Yield both sides of the normalised pairs that pass the filters on words, of every `stride`-th chunk."""
    for start, chunk in _shown(pairs, "Training the tokenizer on"):
        if start // CHUNK % stride == 0:
            for pair in chunk:
                source, target = map(normalise, pair)
                if reason_to_drop(source, target, filters) is None:
                    yield source
                    yield target


def tokenized(pairs: Pairs, tokenizer: Tokenizer, filters: Filters) -> Examples:
    """Return the usable examples of `pairs`, from the cache where the same have been tokenized before."""
    key = fingerprint(_FORMAT, pairs.digest, tokenizer.fingerprint, vars(filters))
    return _load(key, cached(f"tokens-{key}", lambda folder: _save(folder, pairs, tokenizer, filters)))


def _save(folder: Path, pairs: Pairs, tokenizer: Tokenizer, filters: Filters) -> None:
    dropped = {"empty": 0, "words": 0, "length": 0}
    rows: list[int] = []
    sides: tuple[_Writer, _Writer] = (_Writer(tokenizer.vocab_size), _Writer(tokenizer.vocab_size))
    for start, chunk in _shown(pairs, "Tokenizing"):
        kept: list[tuple[int, str, str]] = []
        for row, pair in enumerate(chunk, start=start):
            source, target = map(normalise, pair)
            if reason := reason_to_drop(source, target, filters):
                dropped[reason] += 1
            else:
                kept.append((row, source, target))
        source_ids = tokenizer.encode_batch([source for _, source, _ in kept])
        target_ids = tokenizer.encode_batch([target for _, _, target in kept])
        for (row, _, _), *both in zip(kept, source_ids, target_ids, strict=True):
            if filters.max_length and max(map(len, both)) >= filters.max_length:  # <eos> takes one place
                dropped["length"] += 1
                continue
            rows.append(row)
            for side, ids in zip(sides, both, strict=True):
                side.add(ids)
        for side in sides:
            side.flush()
    np.save(folder / "rows.npy", np.asarray(rows, np.int64))
    for name, side in zip(("source", "target"), sides, strict=True):
        np.save(folder / f"{name}.flat.npy", side.flat())
        np.save(folder / f"{name}.offsets.npy", side.offsets())
    (folder / "dropped.json").write_text(json.dumps(dropped), encoding="utf-8")


def _load(key: str, folder: Path) -> Examples:
    def ragged(name: str) -> Ragged:
        # An empty file cannot be mapped, and the offsets are small.
        offsets = np.load(folder / f"{name}.offsets.npy")
        return Ragged(np.load(folder / f"{name}.flat.npy", mmap_mode="r" if offsets[-1] else None), offsets)

    dropped = json.loads((folder / "dropped.json").read_text(encoding="utf-8"))
    return Examples(key, np.load(folder / "rows.npy"), ragged("source"), ragged("target"), dropped)


class _Writer:
    """Collects sequences as compact arrays: a list of Python integers would take ten times the memory."""

    def __init__(self, vocab_size: int) -> None:
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._chunks: list[NDArray[np.unsignedinteger]] = []
        self._lengths: list[int] = []
        self._pending: list[int] = []

    def add(self, ids: list[int]) -> None:
        self._pending += [*ids, EOS]
        self._lengths.append(len(ids) + 1)

    def flush(self) -> None:
        self._chunks.append(np.asarray(self._pending, self._dtype))
        self._pending = []

    def flat(self) -> NDArray[np.unsignedinteger]:
        return np.concatenate([np.zeros(0, self._dtype), *self._chunks])

    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.asarray(self._lengths, np.int64))])


def _shown(pairs: Pairs, doing: str) -> Iterable[tuple[int, list[tuple[str, str]]]]:
    return track(
        chunks(pairs),
        description=f"{doing} {pairs.name}",
        total=-(-len(pairs) // CHUNK),
        console=Console(stderr=True),
        disable=len(pairs) < _SHOW_PROGRESS_FROM,
    )


def overlap(train: Pairs, held_out: dict[Split, list[tuple[str, str]]]) -> dict[Split, int]:
    """Count the normalised pairs of each held-out split that also stand, word for word, in `train`."""
    unseen = {pair for pairs in held_out.values() for pair in pairs}
    for _, chunk in _shown(train, "Looking for held-out pairs in"):
        unseen.difference_update((normalise(source), normalise(target)) for source, target in chunk)
    return {split: sum(pair not in unseen for pair in pairs) for split, pairs in held_out.items()}
