"""Tokenized documents: kept on disk as flat arrays, found by number, never held as Python integers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.document_files import text_hash
from transformer_jax.data.documents import Documents, Part
from transformer_jax.data.progress import shown
from transformer_jax.data.ragged import Ragged, RaggedWriter, load_ragged
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokenizer_choice import kept

_FORMAT: Final = 1  # of the cached arrays; a change makes old caches unused
_CHUNK: Final = 4_000_000  # characters that are tokenized at once
_LONGEST: Final = 1_000_000  # characters of a piece: the tokenizer takes some 200 bytes a token while it works
_WINDOW: Final = 10_000  # characters in which a place to cut is looked for
_BOUNDARY: Final = re.compile(r"(?<=\S\n)(?=\S)|(?= \S)")
_TOKENIZER_DOCUMENTS: Final = 200_000  # of more, evenly spaced ones train the tokenizer
_TOKENIZER_CHARACTERS: Final = 500_000_000

Units = Callable[[str], Sequence[str]]
"""Cuts a document into the texts that are tokenized one by one: sentences, or pieces of bounded length."""


def pieces(text: str) -> list[str]:
    """Cut a very long text where no token reaches across: before a line, or before the blank of a word."""
    cut, begin = [], 0
    while len(text) - begin > _LONGEST:
        limit = begin + _LONGEST
        found = [m.start() for m in _BOUNDARY.finditer(text, max(begin + 1, limit - _WINDOW), limit + 2)]
        end = next((place for place in reversed(found) if place <= limit), limit)
        cut.append(text[begin:end])
        begin = end
    return [*cut, text[begin:]]


def trained(parts: Sequence[Part], kind: str, train: Callable[[Iterator[str]], Tokenizer]) -> Tokenizer:
    """Train a tokenizer on documents (evenly spaced ones of very many), or read it from the cache.

    `kind` says what is trained, for the key of the cache.
    """
    return kept(lambda: train(_bounded(_texts(parts))), [part.digest for part in parts], kind)


def _texts(parts: Sequence[Part]) -> Iterator[str]:
    stride = max(1, sum(len(part.rows) for part in parts) // _TOKENIZER_DOCUMENTS)
    for part in parts:
        doing = f"Training the tokenizer on {part.documents.name}"
        for text in shown(part.texts(stride), doing, -(-len(part.rows) // stride)):
            yield from pieces(text)


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        if (read := read + len(text)) > _TOKENIZER_CHARACTERS:
            return


@dataclass(frozen=True)
class Tokens:
    """The tokens of a whole collection of documents."""

    key: str
    """Stands for the texts, the way they were cut, and the tokenizer."""
    units: Ragged
    documents: NDArray[np.int64]
    """Where the units of each document begin, and at last their end: one more than there are documents."""
    bytes: NDArray[np.int64]
    """UTF-8 bytes that the tokens of each document stand for."""
    hashes: NDArray[np.uint64]
    """Of the text of each document."""


def tokenized(documents: Documents, tokenizer: Tokenizer, units: Units, mode: str) -> Tokens:
    """Return the tokens of `documents`, from the cache where the same have been tokenized before in this `mode`."""
    key = fingerprint(_FORMAT, documents.digest, tokenizer.fingerprint, mode)
    folder = cached(f"corpus-{key}", lambda folder: _save(folder, documents, tokenizer, units))
    arrays = [np.load(folder / f"{name}.npy") for name in ("documents", "bytes", "hashes")]
    return Tokens(key, load_ragged(folder, "units"), *arrays)


def _save(folder: Path, documents: Documents, tokenizer: Tokenizer, units: Units) -> None:
    counts, sizes, hashes = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    bytes_V = tokenizer.token_bytes()
    with RaggedWriter(folder, "units", tokenizer.vocab_size) as writer:
        for chunk in _chunks(shown(documents, f"Tokenizing {documents.name}", len(documents))):
            cut = [units(text) if text.strip() else [] for text in chunk]
            ids = tokenizer.encode_batch([unit for of_document in cut for unit in of_document])
            flat = writer.add([of_unit for of_unit in ids if of_unit])
            ends = np.cumsum([0, *map(len, cut)])
            counts.append(np.diff(_summed([bool(of_unit) for of_unit in ids])[ends]))
            sizes.append(np.diff(_summed(bytes_V[flat])[_summed([len(of_unit) for of_unit in ids])[ends]]))
            hashes.append(np.fromiter(map(text_hash, chunk), np.uint64, len(chunk)))
    np.save(folder / "documents.npy", np.cumsum(np.concatenate(counts)))
    np.save(folder / "bytes.npy", np.concatenate(sizes))
    np.save(folder / "hashes.npy", np.concatenate(hashes))


def _summed(values: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the sums of the first 0, 1, 2, ... values."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def _chunks(documents: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size > _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Corpus:
    """Documents from any number of collections, numbered from 0 to N; those without a token are left out."""

    keys: Sequence[str]
    stores: Sequence[NDArray[np.unsignedinteger]]
    """The tokens of each collection; addresses count them all, one collection after the other."""
    offsets: NDArray[np.int64]
    """Address at which each unit of each collection begins, and at which the last of a collection ends."""
    first_N: NDArray[np.int64]
    """Of each document the first unit, and the end: its tokens are at offsets[first] to offsets[last]."""
    last_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]
    hashes_N: NDArray[np.uint64]
    empty: int
    """Documents that were left out."""

    @classmethod
    def of(cls, parts: Sequence[Part], tokenizer: Tokenizer, units: Units, mode: str) -> Corpus:
        """Tokenize what has not been tokenized yet, and number the documents of `parts` one part after the other."""
        tokens = [tokenized(part.documents, tokenizer, units, mode) for part in parts]
        rows = [part.rows[np.diff(t.documents)[part.rows] > 0] for part, t in zip(parts, tokens, strict=True)]
        addresses = _summed([len(t.units.flat) for t in tokens])
        places = _summed([len(t.units.offsets) for t in tokens])
        return cls(
            keys=[t.key + hashlib.sha256(r.tobytes()).hexdigest() for t, r in zip(tokens, rows, strict=True)],
            stores=[t.units.flat for t in tokens],
            offsets=np.concatenate([t.units.offsets + base for t, base in zip(tokens, addresses, strict=False)]),
            first_N=np.concatenate([t.documents[r] + base for t, r, base in zip(tokens, rows, places, strict=False)]),
            last_N=np.concatenate(
                [t.documents[r + 1] + base for t, r, base in zip(tokens, rows, places, strict=False)]
            ),
            bytes_N=np.concatenate([t.bytes[r] for t, r in zip(tokens, rows, strict=True)]),
            hashes_N=np.concatenate([t.hashes[r] for t, r in zip(tokens, rows, strict=True)]),
            empty=sum(len(part.rows) for part in parts) - sum(map(len, rows)),
        )

    def __len__(self) -> int:
        return len(self.first_N)

    @cached_property
    def begin_N(self) -> NDArray[np.int64]:
        """Address at which each document begins."""
        return self.offsets[self.first_N]

    @cached_property
    def length_N(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return self.offsets[self.last_N] - self.begin_N

    def gather(self, address_P: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the tokens at these addresses."""
        if len(self.stores) == 1:
            return self.stores[0][address_P].astype(np.int32)
        bases = _summed([len(flat) for flat in self.stores])
        store_P = np.searchsorted(bases, address_P, "right") - 1
        tokens_P = np.empty(len(address_P), np.int32)
        for store in np.unique(store_P):
            here_P = store_P == store
            tokens_P[here_P] = self.stores[store][address_P[here_P] - bases[store]]
        return tokens_P

    def tokens(self, document: int) -> NDArray[np.int32]:
        """Return the tokens of one document."""
        return self.gather(self.begin_N[document] + np.arange(self.length_N[document]))
