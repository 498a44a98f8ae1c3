"""Sentences of a document: its lines, and within a line what ends with a full stop or its like."""

from __future__ import annotations

import re
from typing import Final, Literal

SentenceEnds = Literal["punctuation", "lines"]

_CLOSING: Final = r"[\"'”’»)\]」』）]*"
# . ! ? … end a sentence before a blank (English, German, Korean); their ideographic forms do anywhere.
_END: Final = re.compile(rf"[.!?…]+{_CLOSING}(?=\s)|[。！？]+{_CLOSING}")
_NO_END: Final = frozenset("mr mrs ms dr st prof vs cf e.g i.e no fig approx jr sr bzw z.b d.h ca".split())  # noqa: SIM905


def sentences(text: str, ends: SentenceEnds) -> list[str]:
    """Cut a document into sentences, without the blanks between them.

    Every line ends one. With "punctuation" so do . ! ? … before a blank and 。！？, with the quotes and brackets they
    close, unless a small letter follows, or what precedes the stop is an initial or one of a few abbreviations.
    """
    lines = [line.strip() for line in text.split("\n")]
    if ends == "lines":
        return [line for line in lines if line]
    return [sentence for line in lines for sentence in _cut(line)]


def _cut(line: str) -> list[str]:
    found, begin = [], 0
    for match in _END.finditer(line):
        following = line[match.end() :].lstrip()
        if match[0].startswith(".") and (following[:1].islower() or _abbreviated(line[begin : match.start()])):
            continue
        found.append(line[begin : match.end()].strip())
        begin = match.end()
    rest = line[begin:].strip()
    return [*found, rest] if rest else found


def _abbreviated(before: str) -> bool:
    word = before.rpartition(" ")[2].lstrip("(\"'“‘[")
    return word.lower() in _NO_END or (len(word) == 1 and word.isupper() and word != "I")
