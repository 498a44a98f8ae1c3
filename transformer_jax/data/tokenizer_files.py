"""The files a tokenizer comes in: tokenizer.json, BERT's vocab.txt, GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from transformer_jax.errors import UserError

BERT_SPECIALS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_TEXT: Final = "<|endoftext|>"

_BPE_FILES: Final = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
_FILES: Final = ("tokenizer.json", "vocab.txt", *_BPE_FILES)
KNOWN: Final = "tokenizer.json, vocab.txt (BERT), vocab.json with merges.txt, or encoder.json with vocab.bpe (GPT-2)"


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer from a file, or from the first known file of a folder such as Hugging Face's.

    Raises `UserError` if nothing is there, or what is there is no tokenizer.
    """
    path = path.expanduser()
    if path.is_dir():
        names = [name for name in _FILES if (path / name).is_file()]
        if not names:
            raise UserError(f"{path}: no tokenizer in this folder; known are {KNOWN}.")
        path = path / names[0]
    if path.name in _BPE_FILES:
        return _byte_level_bpe(path, path.with_name(_BPE_FILES[path.name]))
    if path.suffix == ".txt":
        return _bert(path)
    return parse_tokenizer(_text(path), where=str(path))


def parse_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """Read the content of a `tokenizer.json`. Raises `UserError` naming `where` if it is none."""
    if not text:
        raise UserError(f"{where} is none: the model was imported without one; import it again with --tokenizer.")
    content = _json(text, where)
    # `tokenizers` itself raises a bare Exception for a foreign file, which is no type one should catch.
    if not isinstance(content, dict) or "vocab" not in (content.get("model") or ()):
        raise UserError(f"{where}: not a tokenizer.json of the `tokenizers` library: no vocabulary in it.")
    return tokenizers.Tokenizer.from_str(text)


def wordpiece(vocabulary: dict[str, int], lowercase: bool, strip_accents: bool | None) -> tokenizers.Tokenizer:
    """Return the tokenizer of BERT over a vocabulary; None strips accents exactly when it lower-cases, as BERT does."""
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return inner


def mark_bert_specials(inner: tokenizers.Tokenizer) -> None:
    """Register the special tokens that the vocabulary has, and let Hugging Face's readers add [CLS] and [SEP]."""
    inner.add_special_tokens([token for token in BERT_SPECIALS if inner.token_to_id(token) is not None])
    cls, sep = inner.token_to_id("[CLS]"), inner.token_to_id("[SEP]")
    if cls is not None and sep is not None:
        inner.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))


def _bert(path: Path) -> tokenizers.Tokenizer:
    lines = _text(path).removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    if "[UNK]" not in vocabulary:
        raise UserError(f"{path}: no [UNK] in it; a BERT vocabulary has one token a line.")
    beside = path.with_name("tokenizer_config.json")
    config = _json(_text(beside), str(beside)) if beside.exists() else {}
    # Without word from the config: a vocabulary without capitals is a lower-cased one.
    capitals = any(token != token.lower() for token in vocabulary if token not in BERT_SPECIALS and token[:1] != "[")
    inner = wordpiece(vocabulary, config.get("do_lower_case", not capitals), config.get("strip_accents"))
    mark_bert_specials(inner)
    return inner


def _byte_level_bpe(vocabulary_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    vocabulary = _json(_text(vocabulary_path), str(vocabulary_path))
    if not isinstance(vocabulary, dict) or not all(isinstance(i, int) for i in vocabulary.values()):
        raise UserError(f"{vocabulary_path}: not a vocabulary: it should map each token to its number.")
    merges = []
    for number, line in enumerate(_text(merges_path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2 or any(token not in vocabulary for token in (*pair, "".join(pair))):
            raise UserError(f"{merges_path}:{number}: '{line}' does not merge two tokens of {vocabulary_path}.")
        merges.append((pair[0], pair[1]))
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    inner.add_special_tokens(
        [token for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", END_OF_TEXT) if token in vocabulary]
    )
    return inner


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error}); known are {KNOWN}.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
