"""Labelled rows as they are given (TSV, CSV, JSONL, CoNLL, TFDS), each checked where it stands."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from transformer_jax.data.examples import normalise
from transformer_jax.data.files import Lines, json_object, plain_suffix
from transformer_jax.errors import UserError, closest

Kind = Literal["classes", "number", "tags"]
Label = str | float | tuple[str, ...] | None
FORMS: Final = "rows.tsv, rows.csv, rows.jsonl or words.conll (each also .gz or .xz)"
SUFFIXES: Final = (".tsv", ".csv", ".jsonl", ".conll")


class Example(NamedTuple):
    """One labelled text, before it is tokenized."""

    text: str
    pair: str
    """The second text; "" where there is none."""
    words: tuple[str, ...]
    """The words of `text`, where the label is one tag a word."""
    label: Label
    """A class, a number, or tags; None where the data has no label for it (the test splits of GLUE)."""


class Columns(NamedTuple):
    """Which columns, features or keys hold what; "" is none, or not said. Columns without a name are "1", "2", ..."""

    text: str = ""
    pair: str = ""
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class RawRows:
    """The rows of one file by column, with their line numbers."""

    path: Path
    rows: list[tuple[int, dict[str, Any]]]
    named: bool
    """Whether the columns have names of their own."""
    digest: str

    @property
    def columns(self) -> list[str]:
        """The columns of the first row."""
        return list(self.rows[0][1])


def read_rows(path: Path, given: Columns) -> RawRows:
    """Read a file; a first line of TSV or CSV that holds the `given` column names (by default text, label) is a header.

    Raises `UserError` with file and line for what is malformed: ragged rows, no JSON, an unknown format.
    """
    suffix = plain_suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot tell the format from the name; give {FORMS}.")
    lines = Lines(path)
    if suffix == ".jsonl":
        return RawRows(path, list(_jsonl(lines)), True, lines.digest)
    if suffix == ".conll":
        return RawRows(path, list(_conll(lines)), False, lines.digest)
    table = list(_csv(lines) if suffix == ".csv" else _tsv(lines))
    first = table[0][1]
    wanted = {given.text or "text", given.label or "label"}
    named = wanted <= set(first)
    absent = [name for name in given if name and name not in first and not name.isdigit()]
    if absent:
        raise UserError(
            f"{path}:1: no column '{absent[0]}'; the line reads {_listed(first)}.{closest(absent[0], first)} "
            "A file without a header has the columns 1, 2, ...: name them by number."
        )
    names = first if named else [str(i) for i in range(1, len(first) + 1)]
    if len(set(names)) < len(names):
        raise UserError(f"{path}:1: a column name occurs twice: {_listed(names)}.")
    body = table[1:] if named else table
    if not body:
        raise UserError(f"{path}: nothing but a header.")
    for number, fields in body:
        if len(fields) != len(first):
            raise UserError(f"{path}:{number}: {len(fields)} columns; line {table[0][0]} has {len(first)}.")
    return RawRows(
        path, [(number, dict(zip(names, fields, strict=True))) for number, fields in body], named, lines.digest
    )


def resolve(raw: RawRows, given: Columns, kind: Kind) -> Columns:
    """Find the columns of a file; raises `UserError` where they are absent or cannot be told apart."""
    if raw.named:
        return named_columns(raw.columns, given, str(raw.path))
    for name in filter(None, given):
        if name not in raw.columns:
            raise UserError(f"{raw.path}: no column '{name}'; without a header they are {', '.join(raw.columns)}.")
    if given.text and given.label:
        return given
    if plain_suffix(raw.path) == ".conll":
        return given._replace(text=given.text or raw.columns[0], label=given.label or raw.columns[-1])
    if len(raw.columns) != 2 or given.pair or given.group:
        raise UserError(
            f"{raw.path}:1: {len(raw.columns)} columns without the header text, label; say which is which by name or "
            "number, for example data.text=1 data.label=2."
        )
    if given.text or given.label:
        other = next(name for name in raw.columns if name not in given)
        return given._replace(text=given.text or other, label=given.label or other)
    return _guess(raw, kind)


def named_columns(present: Sequence[str], given: Columns, where: str) -> Columns:
    """Complete `given` by the default names text, text_pair, label and group; raises `UserError` for an absent one."""
    columns = Columns(
        given.text or "text",
        given.pair or ("text_pair" if "text_pair" in present else ""),
        given.label or "label",
        given.group or ("group" if "group" in present else ""),
    )
    for field, name in zip(("text", "text_pair", "label", "group"), columns, strict=True):
        if name and name not in present:
            raise UserError(
                f"{where}: no column '{name}'; there are {', '.join(sorted(present))}.{closest(name, present)} "
                f"Set data.{field} to one of them."
            )
    return columns


def _guess(raw: RawRows, kind: Kind) -> Columns:
    """Tell label from text: labels are numbers, or recur while texts do not."""
    values = {name: [row[name] for _, row in raw.rows] for name in raw.columns}
    # The first row may turn out to be a header.
    later = {name: column[1:] or column for name, column in values.items()}
    if kind == "number":
        distinct = {name: 0 if all(map(_is_number, column)) else 1 for name, column in later.items()}
    elif kind == "tags":  # of tagged words what recurs is the single tag
        distinct = {name: len({part for value in column for part in value.split()}) for name, column in values.items()}
    else:
        distinct = {name: len(set(column)) for name, column in values.items()}
    label, text = sorted(raw.columns, key=lambda name: distinct[name])
    if distinct[label] == distinct[text]:
        raise UserError(
            f"{raw.path}: cannot tell which of the two columns is the label; say data.text=1 data.label=2, "
            "or the other way round."
        )
    first = raw.rows[0][1]
    if kind == "number":
        header = not _is_number(first[label])
    else:
        header = kind == "classes" and len(raw.rows) > 9 and first[label] not in later[label]
    if header:
        raise UserError(
            f"{raw.path}:1: a header? '{first[label]}' is a label in this row only. If so, say "
            f"data.text='{first[text]}' data.label='{first[label]}'; if not, data.text={text} data.label={label}."
        )
    return Columns(text=text, label=label)


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def parse(row: Mapping[str, Any], columns: Columns, kind: Kind, where: str, may_be_empty: bool = False) -> Example:
    """Take an example out of a row.

    Raises `UserError` naming `where` for an absent column, an empty text (unless `may_be_empty`), a label that is
    none, or tags that are not as many as the words.
    """
    for name in filter(None, columns[:3]):
        if name not in row:
            raise UserError(f"{where}: no '{name}'; there are {', '.join(sorted(row))}.")
    words: tuple[str, ...] = ()
    if kind == "tags":
        words = tuple(normalise(word) for word in _items(row[columns.text], columns.text, where))
        text = " ".join(words)
        if not all(words):
            raise UserError(f"{where}: an empty word in '{columns.text}'.")
    else:
        text = _text(row[columns.text], columns.text, where)
    pair = _text(row[columns.pair], columns.pair, where) if columns.pair else ""
    for name, value in ((columns.text, text), (columns.pair, pair)):
        if name and not value and not may_be_empty:
            raise UserError(f"{where}: the text in '{name}' is empty.")
    label = _label(row[columns.label], columns.label, kind, where)
    if label is None and not may_be_empty:
        raise UserError(f"{where}: '{columns.label}' is null; every row needs a label.")
    if isinstance(label, tuple) and len(label) != len(words):
        raise UserError(f"{where}: {len(words)} words but {len(label)} tags.")
    return Example(text, pair, words, label)


def _text(value: Any, name: str, where: str) -> str:
    text = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise UserError(f"{where}: '{name}' is {type(text).__name__}, not text.")
    return normalise(text)


def _items(value: Any, name: str, where: str) -> list[str]:
    if isinstance(value, str | bytes):
        return _text(value, name, where).split()
    if not isinstance(value, Sequence):
        raise UserError(f"{where}: '{name}' is {type(value).__name__}, not words.")
    return [_text(item, name, where) if isinstance(item, str | bytes) else str(item) for item in value]


def _label(value: Any, name: str, kind: Kind, where: str) -> Label:
    if value is None:
        return None
    if kind == "tags":
        return tuple(_items(value, name, where))
    if kind == "number":
        if isinstance(value, bool) or not (isinstance(value, int | float) or _is_number(str(value))):
            raise UserError(f"{where}: '{name}' is '{value}', not a number.")
        return float(value)
    if not isinstance(value, str | bytes | bool | int | float):
        raise UserError(f"{where}: '{name}' is {type(value).__name__}, not a class.")
    label = _text(value, name, where) if isinstance(value, str | bytes) else json.dumps(value)
    if not label:
        raise UserError(f"{where}: the label in '{name}' is empty.")
    return label


def _tsv(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        yield number, line.split("\t")


def _csv(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{lines.path}:{reader.line_num}: not CSV ({error}).") from error


def _jsonl(lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        yield number, json_object(line, f"{lines.path}:{number}", 'an object such as {"text": ..., "label": ...}')


def _conll(lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Gather sentences: a word and its columns a line, an empty line between sentences (-DOCSTART- is none)."""
    first, width, sentence = 0, 0, list[list[str]]()
    for number, line in [*lines, (0, "")]:
        fields = line.split()
        if fields:
            width = width or len(fields)
            if len(fields) != width or width < 2:
                raise UserError(f"{lines.path}:{number}: {len(fields)} columns; expected {max(width, 2)}.")
            first = first or number
            sentence.append(fields)
        elif sentence:
            if sentence[0][0] != "-DOCSTART-":
                yield first, {str(i): list(column) for i, column in enumerate(zip(*sentence, strict=True), start=1)}
            first, sentence = 0, []


def _listed(fields: Sequence[str]) -> str:
    shown = ", ".join(f"'{field[:30]}'" for field in fields[:6])
    return shown + (", ..." if len(fields) > 6 else "")
