"""The user's own parallel files: TSV, JSONL, or two text files with one sentence a line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformer_jax.data.holdout import blocks
from transformer_jax.errors import UserError

_DECOMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {".gz": gzip.decompress, ".xz": lzma.decompress}
_FORMATS: Final = (".tsv", ".jsonl")
FORMS: Final = "pairs.tsv, pairs.jsonl, or two texts as a.de,a.en (each also .gz or .xz)"


@dataclass(frozen=True)
class Rows:
    """Aligned pairs in the order of the file, the group each belongs to, and a digest of the bytes read."""

    pairs: list[tuple[str, str]]
    groups: list[str]
    digest: str


def is_files(dataset: str) -> bool:
    """Tell the user's own files from the name of a TFDS dataset (whose own commas come with an equals sign)."""
    parts = dataset.split(",")
    two_texts = len(parts) == 2 and "=" not in dataset
    return two_texts or any(plain_suffix(Path(part)) in _FORMATS or Path(part).is_file() for part in parts)


def read_files(files: str, source: str, target: str) -> Rows:
    """Read `files` ("pairs.tsv", "pairs.jsonl" or "a.de,a.en") with the languages `source` and `target`.

    Raises `UserError` with file and line for anything that is not aligned UTF-8 text.
    """
    paths = [Path(part.strip()).expanduser() for part in files.split(",")]
    if len(paths) == 2:
        return _read_two_texts(paths[0], paths[1])
    if len(paths) > 2:
        raise UserError(f"{files}: {len(paths)} files; give one file or two parallel ones, as {FORMS}.")
    (path,) = paths
    suffix = plain_suffix(path)
    if suffix not in _FORMATS:
        raise UserError(f"{path}: cannot tell the format from the name; give {FORMS}.")
    lines = Lines(path)
    triples = list(_tsv(lines) if suffix == ".tsv" else _jsonl(lines, source, target))
    groups = [group for _, _, group in triples]
    grouped = sum(group is not None for group in groups)
    if grouped not in (0, len(groups)):
        line = next(i for i, group in enumerate(groups, start=1) if (group is None) == (groups[0] is not None))
        raise UserError(f"{path}:{line}: some rows name a group and some do not; give it in all of them or in none.")
    named = [group for group in groups if group is not None] or blocks(len(triples))
    return Rows([(a, b) for a, b, _ in triples], named, lines.digest)


def plain_suffix(path: Path) -> str:
    """Return the suffix of a file, that of compression apart: ".tsv" of "pairs.tsv.gz"."""
    return Path(path.stem).suffix if path.suffix in _DECOMPRESS else path.suffix


class Lines:
    """The decoded lines of one file with their numbers from 1, without their line ends.

    The file may be compressed (.gz, .xz); it is hashed in `digest`. Raises `UserError` for one that cannot be read, is
    empty, or is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = _DECOMPRESS.get(path.suffix, bytes)(path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file.") from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from error
        if not content.strip():
            raise UserError(f"{path}: the file is empty.")
        self.path = path
        self.digest = hashlib.sha256(content).hexdigest()
        # Only \n ends a line: str.splitlines also cuts at U+2028 and others, and would shift one side.
        self._raw = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")

    def __len__(self) -> int:
        return len(self._raw)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, raw in enumerate(self._raw, start=1):
            try:
                yield number, raw.removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.path}:{number}: not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{raw[error.start]:02x}); convert the file, for example with iconv -t UTF-8."
                ) from error


def _read_two_texts(source: Path, target: Path) -> Rows:
    a, b = Lines(source), Lines(target)
    if len(a) != len(b):
        raise UserError(
            f"{source} has {len(a)} lines but {target} has {len(b)}: "
            f"line {min(len(a), len(b)) + 1} has no counterpart; parallel files need one sentence a line."
        )
    pairs = [(x, y) for (_, x), (_, y) in zip(a, b, strict=True)]
    return Rows(pairs, blocks(len(pairs)), hashlib.sha256((a.digest + b.digest).encode()).hexdigest())


def _tsv(lines: Lines) -> Iterator[tuple[str, str, str | None]]:
    columns = 0
    for number, line in lines:
        fields = line.split("\t")
        columns = columns or len(fields)
        if len(fields) not in (2, 3) or len(fields) != columns:
            expected = f"{columns}, as in line 1" if columns in (2, 3) and number > 1 else "2, or 3 with a group"
            raise UserError(f"{lines.path}:{number}: {len(fields)} tab-separated columns; expected {expected}.")
        yield fields[0], fields[1], fields[2] if columns == 3 else None


def _jsonl(lines: Lines, source: str, target: str) -> Iterator[tuple[str, str, str | None]]:
    for number, line in lines:
        where = f"{lines.path}:{number}"
        row = json_object(line, where, f"an object with the keys '{source}' and '{target}'")
        group = row.get("group")
        yield *pick(row, source, target, where), None if group is None else str(group)


def json_object(text: str, where: str, wanted: str = "an object") -> dict[str, Any]:
    """Parse one JSON object. Raises `UserError` that begins with `where` and says what was `wanted`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected {wanted}.")
    return value


def pick(row: dict[str, Any], source: str, target: str, where: str) -> tuple[str, str]:
    """Take the two sides out of one example: under the language codes, or under "source" and "target".

    They may lie one level down, under "translation". Bytes are decoded. Raises `UserError` naming the keys present.
    """
    fields = row.get("translation", row)
    if not isinstance(fields, dict):
        raise UserError(f"{where}: 'translation' is not an object with the keys '{source}' and '{target}'.")
    keys = ("source", "target") if {"source", "target"} <= fields.keys() else (source, target)
    if missing := [key for key in keys if key not in fields]:
        raise UserError(
            f"{where}: no key '{missing[0]}'; the keys are {', '.join(sorted(fields))}. "
            "Set the source and target languages of the data to two of them."
        )
    sides = [value.decode("utf-8") if isinstance(value := fields[key], bytes) else value for key in keys]
    for key, side in zip(keys, sides, strict=True):
        if not isinstance(side, str):
            raise UserError(f"{where}: '{key}' is {type(side).__name__}, not text.")
    return sides[0], sides[1]
