"""Text to ids and back: any tokenizer of the field, its special tokens known by their role."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from transformer_jax.data import pieces
from transformer_jax.data.tokenizer_files import (
    BERT_SPECIALS,
    END_OF_TEXT,
    mark_bert_specials,
    parse_tokenizer,
    read_tokenizer,
    wordpiece,
)
from transformer_jax.errors import UserError

Role = Literal["pad", "bos", "eos", "unk", "cls", "sep", "mask"]
SPELLINGS: Final[dict[Role, tuple[str, ...]]] = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", END_OF_TEXT, "[CLS]"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|end_of_text|>", END_OF_TEXT, "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
"""How the special tokens of each role are written; the first that a tokenizer has counts."""

SPECIALS: Final = ("<pad>", "<bos>", "<eos>", "<unk>")
"""What the tokenizers trained here begin with, WordPiece apart (which has `BERT_SPECIALS`)."""
_LEAST_VOCABULARY: Final = len(SPECIALS) + 256


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with ids by role: `pad`, `bos`, `eos`, `unk`, `cls`, `sep`, `mask`.

    A role the tokenizer has no token for is None. Text is only ever text: "<eos>" written in a sentence is five
    characters, not the end of it.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Adopt `inner`, without the truncation and the padding it may come with."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self._spelling = pieces.spelling_of(json.loads(inner.to_str()))
        added = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        # An ordinary piece may happen to be spelled "<s>": where special tokens are marked, only those count.
        known = added or inner.get_vocab()
        self._roles: dict[Role, int | None] = {
            role: next((known[spelling] for spelling in spellings if spelling in known), None)
            for role, spellings in SPELLINGS.items()
        }
        self.pad, self.bos, self.eos, self.unk, self.cls, self.sep, self.mask = self._roles.values()
        self.specials: frozenset[int] = frozenset(added.values()) | {i for i in self._roles.values() if i is not None}
        """Ids of all special tokens; decoding leaves them out."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE of at most `vocab_size` tokens (fewer if the text has no more to merge).

        Lossless and deterministic, with ids 0 to 3 for <pad>, <bos>, <eos> and <unk>. Raises `UserError` if the 256
        bytes and the special tokens do not fit.
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
        return cls(inner)

    @classmethod
    def train_wordpiece(cls, texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
        """Train BERT's WordPiece: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then at most `vocab_size` - 5 pieces.

        Accents stay, since stripping them would take Hangul apart. The result differs a little from run to run: keep
        what was trained. Raises `UserError` for a vocabulary without room for letters.
        """
        if vocab_size < _LEAST_VOCABULARY:
            raise UserError(f"model.vocab_size = {vocab_size} is too small for WordPiece; give {_LEAST_VOCABULARY}.")
        inner = wordpiece({}, lowercase, strip_accents=False)
        # Each letter takes two pieces, with and without ##: at most half of the vocabulary goes to letters.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=list(BERT_SPECIALS),
            limit_alphabet=vocab_size // 4,
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        mark_bert_specials(inner)
        return cls(inner)

    @classmethod
    def characters(cls, texts: Iterable[str]) -> Tokenizer:
        """Make every character of `texts` a token, after <pad>, <bos>, <eos> and <unk>; others become <unk>."""
        letters: set[str] = set()
        for text in texts:
            letters.update(unicodedata.normalize("NFC", text))
        vocabulary = {token: i for i, token in enumerate((*SPECIALS, *sorted(letters)))}
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))  # BPE without a merge
        inner.normalizer = normalizers.NFC()
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens(list(SPECIALS))
        return cls(inner)

    @classmethod
    def from_json(cls, text: str, where: str) -> Tokenizer:
        """Read the content of a `tokenizer.json`. Raises `UserError` naming `where` if it is none."""
        return cls(parse_tokenizer(text, where))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a file, or a folder such as Hugging Face's or that of a run (see `tokenizer_files.KNOWN`).

        Raises `UserError` if nothing is there, or what is there is no tokenizer.
        """
        return cls(read_tokenizer(path))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
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

    def require_roles(self, roles: Sequence[Role], where: str) -> tuple[int, ...]:
        """Return the ids of `roles`; raise `UserError` naming those that are absent. `where` names the tokenizer."""
        ids = tuple(i for role in roles if (i := self._roles[role]) is not None)
        if len(ids) < len(roles):
            missing = [role for role in roles if self._roles[role] is None]
            spelled = "; ".join(f"{role}: {', '.join(SPELLINGS[role])}" for role in missing)
            raise UserError(
                f"{where} has no special token for {', '.join(missing)} (it would be written {spelled}); "
                "choose another tokenizer, or leave data.tokenizer empty to train one."
            )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of each text, and of each token the characters [begin, end) of the text that it covers.

        Blanks around a token are not part of it, and characters that belong together (an accent, the parts of a
        syllable) are in the same token. Pieces of one character (an emoji in bytes) all cover that character.
        """
        encodings = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, _whole_characters(text, e.offsets)) for text, e in zip(texts, encodings, strict=True)]

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are written out, as in "Paris is the [MASK] of France."."""
        return self._marked.encode(text, add_special_tokens=False).ids

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.to_json())  # which reads special tokens as such

    def decode(self, ids: Iterable[int], stop: bool = True) -> str:
        """Return the text up to the first `eos` (`stop=False`: to the end).

        Special tokens and ids beyond the vocabulary are skipped; so is an `eos` that opens the text where it serves
        as `bos` too.
        """
        return self._inner.decode(list(self._real(ids, stop)), skip_special_tokens=False)

    def _real(self, ids: Iterable[int], stop: bool) -> Iterator[int]:
        for position, token_id in enumerate(map(int, ids)):
            if stop and token_id == self.eos and (position or token_id != self.bos):
                return
            if token_id >= 0 and token_id not in self.specials:
                yield token_id

    def tokens(self, ids: Iterable[int]) -> list[str]:
        r"""Return a readable label for each id: "▁the" with its space, "\xec\x9d" for parts of a character."""
        return [self._label(int(i)) for i in ids]

    def _label(self, token_id: int) -> str:
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return f"<{token_id}>"
        return piece if token_id in self.specials else pieces.label(piece, self._spelling)

    def token_bytes(self) -> NDArray[np.int32]:
        """Return int32 [V]: how many UTF-8 bytes of text each token stands for; 0 for special tokens.

        Added up they are the length of the text, except that WordPiece keeps no blanks and that what became <unk> is
        lost.
        """
        count_V = np.zeros(self.vocab_size, np.int32)
        for piece, token_id in self._inner.get_vocab(with_added_tokens=True).items():
            if token_id not in self.specials:
                count_V[token_id] = len(pieces.surface(piece, self._spelling))
        return count_V

    def continuations(self) -> NDArray[np.bool_]:
        """Return bool [V]: which tokens go on with the word before them (whole-word masking)."""
        goes_on_V = np.zeros(self.vocab_size, np.bool_)
        for piece, token_id in self._inner.get_vocab(with_added_tokens=True).items():
            goes_on_V[token_id] = token_id not in self.specials and pieces.goes_on(piece, self._spelling)
        return goes_on_V


def _whole_characters(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    # What directly follows a token and belongs to none was composed into it by NFC.
    composed = {
        end: end + len(text[end:limit].split(maxsplit=1)[0])
        for (_, end), limit in zip(offsets, [*(begin for begin, _ in offsets[1:]), len(text)], strict=True)
        if text[end:limit][:1].strip()
    }
    whole = []
    for begin, end in offsets:
        covered = text[begin : composed.get(end, end)]
        blanks = len(covered) - len(covered.lstrip()) if covered.strip() else 0
        whole.append((begin + blanks, begin + blanks + len(covered.strip() or covered)))
    return whole
