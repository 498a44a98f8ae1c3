"""How the pieces of a vocabulary are spelled: the text each stands for, and which of them go on with a word."""

from __future__ import annotations

import json
import re
from typing import Any, Final, Literal

Spelling = Literal["bytes", "wordpiece", "metaspace", "plain"]
"""Byte-level BPE spells bytes as letters, WordPiece marks what goes on with a word by ##, SentencePiece what begins
one by U+2581; plain pieces are just their text."""

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def spelling_of(content: dict[str, Any]) -> Spelling:
    """Tell the spelling from the content of a `tokenizer.json`."""
    decoder = json.dumps(content.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        return "bytes"
    if '"WordPiece"' in decoder or content["model"].get("type") == "WordPiece":
        return "wordpiece"
    return "metaspace" if "▁" in decoder else "plain"


def surface(piece: str, spelling: Spelling) -> bytes:
    """Return the UTF-8 bytes of the text that a piece stands for (WordPiece keeps no blanks)."""
    if spelling == "bytes" and all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    if spelling == "wordpiece":
        return piece.removeprefix("##").encode()
    if spelling == "metaspace":
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return piece.encode()


def label(piece: str, spelling: Spelling) -> str:
    r"""Return a readable label: "▁the" with its space, "\xec\x9d" for parts of a character."""
    if spelling != "bytes":
        return piece
    return surface(piece, spelling).decode("utf-8", errors="backslashreplace").replace(" ", "▁")


def goes_on(piece: str, spelling: Spelling) -> bool:
    """Tell whether a piece that is not the first of a text goes on with the word before it."""
    if spelling == "wordpiece":
        return piece.startswith("##")
    return spelling != "plain" and not surface(piece, spelling)[:1].isspace()


def _byte_characters() -> dict[str, int]:
    """Map the characters that spell bytes in byte-level pieces (printable Latin-1 as itself, others from U+0100)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_characters()
