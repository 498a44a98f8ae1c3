"""Joint byte-level BPE: trained on both sides, lossless, with ids 0 to 3 for <pad>, <bos>, <eos> and <unk>."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from transformer_jax.errors import UserError

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
UNK: Final = 3
SPECIALS: Final = ("<pad>", "<bos>", "<eos>", "<unk>")
_ALIASES: Final = {
    "<pad>": ("[PAD]",),
    "<bos>": ("<s>", "[BOS]", "[CLS]"),
    "<eos>": ("</s>", "[EOS]", "[SEP]"),
    "<unk>": ("[UNK]",),
}
_LEAST_VOCABULARY: Final = len(SPECIALS) + 256


class Tokenizer:
    """A trained tokenizer whose special ids are those of this library.

    Text is only ever text: "<eos>" written in a sentence is five characters, not the end of it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str) -> None:
        """Adopt `inner`. Raises `UserError` naming `where` if its special tokens are absent or have other ids."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self._check_specials(where)
        decoder = json.loads(inner.to_str())["decoder"]
        self._byte_level = "ByteLevel" in json.dumps(decoder)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE of at most `vocab_size` tokens (fewer if the text has no more to merge).

        Raises `UserError` if the 256 bytes and the special tokens do not fit.
        """
        if vocab_size < _LEAST_VOCABULARY:
            raise UserError(
                f"model.vocab_size = {vocab_size} is too small for byte-level BPE: "
                f"256 bytes and {len(SPECIALS)} special tokens need at least {_LEAST_VOCABULARY}."
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, where="trained tokenizer")

    @classmethod
    def from_json(cls, text: str, where: str) -> Tokenizer:
        """Read the content of a `tokenizer.json`. Raises `UserError` naming `where` if it is none."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}).") from error
        # `tokenizers` itself raises a bare Exception for a foreign file, which is no type one should catch.
        if not isinstance(content, dict) or "vocab" not in (content.get("model") or ()):
            raise UserError(f"{where}: not a tokenizer.json of the `tokenizers` library: no vocabulary in it.")
        return cls(tokenizers.Tokenizer.from_str(text), where)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json` file. Raises `UserError` if it is absent or unusable."""
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read the tokenizer ({error}).") from error
        return cls.from_json(text, where=str(path))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ where the tokenization differs."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        return self._inner.to_str()

    def require(self, vocab_size: int, where: str) -> None:
        """Raise `UserError` if a model of `vocab_size` has no row for some token; `where` names the tokenizer."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{where} has {self.vocab_size} tokens but model.vocab_size = {vocab_size}; "
                f"set model.vocab_size to {self.vocab_size} or more."
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first <eos>; special tokens and ids beyond the vocabulary are skipped."""
        return self._inner.decode(list(_before_eos(ids)), skip_special_tokens=True)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        r"""Return a readable label for each id: "▁the" with its space, "\xec\x9d" for parts of a character."""
        return [self._label(int(i)) for i in ids]

    def _label(self, token_id: int) -> str:
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return f"<{token_id}>"
        if token_id < len(SPECIALS) or not self._byte_level:
            return piece
        if any(character not in _BYTE_OF for character in piece):
            return piece  # a token added by hand, which is not spelled in bytes
        raw = bytes(_BYTE_OF[character] for character in piece)
        return raw.decode("utf-8", errors="backslashreplace").replace(" ", "▁")

    def _check_specials(self, where: str) -> None:
        found: dict[str, int] = {}
        for right, name in enumerate(SPECIALS):
            candidates = [self._inner.token_to_id(token) for token in (name, *_ALIASES[name])]
            ids = [token_id for token_id in candidates if token_id is not None]
            if ids:
                found[name] = right if right in ids else ids[0]
        train = f"Train it with special_tokens={list(SPECIALS)}."
        if missing := [name for name in SPECIALS if name not in found]:
            raise UserError(f"{where}: the tokenizer has no {', '.join(missing)}. {train}")
        if wrong := [f"{name} = {found[name]}" for i, name in enumerate(SPECIALS) if found[name] != i]:
            raise UserError(f"{where}: the special tokens must have the ids 0 to 3, but {', '.join(wrong)}. {train}")


def _before_eos(ids: Iterable[int]) -> Iterator[int]:
    for token_id in ids:
        if token_id == EOS:
            return
        if token_id > UNK:
            yield int(token_id)


def _byte_characters() -> dict[str, int]:
    """Map the characters that spell bytes in byte-level pieces (printable Latin-1 as itself, others from U+0100)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_characters()
