"""Tables on disk: CSV, TSV, JSONL and Parquet in; CSV, JSONL and Parquet out."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_jax.data.files import json_object
from transformer_jax.errors import UserError, closest

FORMATS = ".csv, .tsv, .jsonl or .parquet"
_NUMBER = re.compile(
    r"([-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?) ?([kmbgt]?)"  # a comma: thousands
)
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+(?:e[-+]?\d+)?\s*", re.IGNORECASE)
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Columns:
    """A file as it is: column by column, every cell as text or as the number the format gives."""

    path: Path
    cells: dict[str, list[Any]]
    lines: list[int]
    """Line of each row (Parquet: its number), for messages."""

    def name(self, asked: str, default: str, flag: str) -> str | None:
        """Find a column: the one asked for, or the default one if it is there (in any case).

        Raises:
            UserError: the one asked for is not there; the closest is named.
        """
        if asked in self.cells:
            return asked
        if asked:
            have = ", ".join(self.cells)
            raise UserError(
                f"{self.path} has no column '{asked}' ({flag}).{closest(asked, self.cells)} It has: {have}."
            )
        return next((column for column in self.cells if column.lower() == default), None)

    def numbers(self, column: str) -> list[float]:
        """Read a column as numbers ("1.3B" is 1.3e9); what is none is NaN."""
        return [number(cell) for cell in self.cells[column]]


def number(cell: Any) -> float:
    """Read one cell: a number, perhaps with K, M, B, T (G) for powers of a thousand; else NaN."""
    if isinstance(cell, (int, float)):
        return float(cell)
    match = _NUMBER.fullmatch(str(cell).strip().lower())
    return float(match[1].replace(",", "").replace("_", "")) * _SUFFIXES[match[2]] if match else math.nan


def read_columns(path: Path) -> Columns:
    """Read a table.

    Raises:
        UserError: no such file, a format that is none of ours, no rows, or a row that cannot be read (with its line).
    """
    reader = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: cannot tell the format of a table from the name; give {FORMATS}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}).") from error
    if not table.lines:
        raise UserError(f"{path}: the table has no rows.")
    return table


def _read_csv(path: Path) -> Columns:
    """Read cells between tabs (.tsv) or commas, or between semicolons, whose numbers may then have decimal commas."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        semicolons = path.suffix == ".csv" and "," not in first and ";" in first
        reader = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ";" if semicolons else ",")
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{path}: two columns are called '{twice}'.")
        rows, lines = [], []
        for row in reader:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                raise UserError(f"{path}:{reader.line_num}: {len(row)} cells, but the header has {len(header)}.")
            rows.append([_point(cell) for cell in row] if semicolons else row)
            lines.append(reader.line_num)
    return Columns(path, {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines)


def _point(cell: str) -> str:
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell


def _read_jsonl(path: Path) -> Columns:
    rows, lines = [], []
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        rows.append(json_object(text, f"{path}:{line}", "one object a line"))
        lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    return Columns(path, {name: [row.get(name) for row in rows] for name in names}, lines)


def _read_parquet(path: Path) -> Columns:
    # Imported here: it takes a third of a second, and the other formats do without.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}).") from error
    return Columns(path, table.to_pydict(), list(range(1, table.num_rows + 1)))


def write_columns(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows that share their keys; the name tells the format (.csv, .tsv, .jsonl, .parquet).

    Raises:
        UserError: another name.
    """
    names = list(rows[0]) if rows else []
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), path)
    else:
        raise UserError(f"{path}: cannot tell the format of a table from the name; give {FORMATS}.")
