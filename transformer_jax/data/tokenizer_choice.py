"""Which tokenizer a run gets: its own, the one that is named, or one trained on its text, which is then kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.tokenizer import Tokenizer


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


def kept(train: Callable[[], Tokenizer], *made_from: object) -> Tokenizer:
    """Train a tokenizer, or read it from the cache if it was made from the same (JSON-able) before.

    WordPiece differs from one training to the next: the first stays.
    """

    def write(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(train().to_json(), encoding="utf-8")

    key = fingerprint(*made_from, tokenizers.__version__)
    return Tokenizer.load(cached(f"tokenizer-{key}", write) / "tokenizer.json")
