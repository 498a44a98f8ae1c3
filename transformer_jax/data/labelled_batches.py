"""What the data of all fine-tuning shares: batches of as many rows at every length, and the checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import tokenizers

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.plan import Bucket, geometric_buckets
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError


class BatchFields(Protocol):
    """The fields of a data configuration that give its batches their shapes."""

    @property
    def dataset(self) -> str:
        """What is read."""

    @property
    def max_length(self) -> int:
        """Longest sequence, special tokens included."""

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, over all processes."""

    @property
    def rows_multiple(self) -> int:
        """What a mesh may divide the rows by."""

    @property
    def bucket_lengths(self) -> tuple[int, ...]:
        """Lengths to which batches are padded."""

    @property
    def threads(self) -> int:
        """Threads that assemble batches."""


def check_batches(data: BatchFields, least_length: int) -> None:
    """Raise `UserError` for values that contradict each other."""
    if not data.dataset:
        raise UserError("data.dataset is empty; name a TFDS dataset or your own file.")
    if data.max_length < least_length:
        raise UserError(f"data.max_length must be at least {least_length}, got {data.max_length}.")
    if data.threads < 0:
        raise UserError(f"data.threads must not be negative, got {data.threads}.")
    if data.rows_multiple < 1:
        raise UserError(f"data.rows_multiple must be at least 1, got {data.rows_multiple}.")
    if data.batch_rows < 1 or data.batch_rows % data.rows_multiple:
        raise UserError(
            f"data.batch_rows must be a positive multiple of data.rows_multiple = {data.rows_multiple}, "
            f"got {data.batch_rows}."
        )
    lengths = data.bucket_lengths
    if lengths and (list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or lengths[-1] != data.max_length):
        raise UserError(
            f"data.bucket_lengths must be positive, ascend and end with data.max_length = {data.max_length}, "
            f"got {lengths}."
        )


def buckets_of(data: BatchFields, first: int = 16) -> tuple[Bucket, ...]:
    """Return the buckets, all with the same number of rows: every step averages over as many examples."""
    lengths = data.bucket_lengths or geometric_buckets(data.max_length, first)
    return tuple(Bucket(length, data.batch_rows) for length in lengths)


def choose_tokenizer(
    saved: str | None, path: str, vocab_size: int, train: Callable[[], Tokenizer]
) -> tuple[Tokenizer, str]:
    """Return a tokenizer and what to call it: that of the run, or the one at `path`, or a trained one.

    Raises `UserError` if it cannot be read, or a model of `vocab_size` has no row for some of its tokens.
    """
    if saved is not None:
        tokenizer, where = Tokenizer.from_json(saved, where="tokenizer of the run"), "the tokenizer of the run"
    elif path:
        tokenizer, where = Tokenizer.load(Path(path)), path
    else:
        tokenizer, where = train(), "the trained tokenizer"
    tokenizer.require(vocab_size, where)
    return tokenizer, where


def trained_tokenizer(
    digest: str, texts: Callable[[], Iterable[str]], vocab_size: int, wordpiece: bool, lowercase: bool
) -> Tokenizer:
    """Train WordPiece, or byte-level BPE, on `texts` (whose hash is `digest`), or take it from the cache."""

    def write(folder: Path) -> None:
        if wordpiece:
            tokenizer = Tokenizer.train_wordpiece(texts(), vocab_size, lowercase)
        else:
            tokenizer = Tokenizer.train(texts(), vocab_size)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    key = fingerprint(digest, vocab_size, wordpiece, lowercase, tokenizers.__version__)
    return Tokenizer.load(cached(f"tokenizer-{key}", write) / "tokenizer.json")
