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
from transformer_jax.data.ragged import Ragged, RaggedWriter, load_ragged
from transformer_jax.data.sources import CHUNK, Pairs, chunks
from transformer_jax.data.tokenizer import Tokenizer

_FORMAT: Final = 2  # of the cached arrays; a change makes old caches unused
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
    (end,) = tokenizer.require_roles(("eos",), "the tokenizer")
    size = tokenizer.vocab_size
    with RaggedWriter(folder, "source", size) as sources, RaggedWriter(folder, "target", size) as targets:
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
            fits = [
                not filters.max_length or max(len(a), len(b)) < filters.max_length  # <eos> takes one place
                for a, b in zip(source_ids, target_ids, strict=True)
            ]
            dropped["length"] += fits.count(False)
            rows += [row for (row, _, _), fit in zip(kept, fits, strict=True) if fit]
            sources.add([[*ids, end] for ids, fit in zip(source_ids, fits, strict=True) if fit])
            targets.add([[*ids, end] for ids, fit in zip(target_ids, fits, strict=True) if fit])
    np.save(folder / "rows.npy", np.asarray(rows, np.int64))
    (folder / "dropped.json").write_text(json.dumps(dropped), encoding="utf-8")


def _load(key: str, folder: Path) -> Examples:
    dropped = json.loads((folder / "dropped.json").read_text(encoding="utf-8"))
    source, target = load_ragged(folder, "source"), load_ragged(folder, "target")
    return Examples(key, np.load(folder / "rows.npy"), source, target, dropped)


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
