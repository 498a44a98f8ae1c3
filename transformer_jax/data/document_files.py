"""The user's own documents: plain text, or JSON lines, each also compressed; read as a stream, however large."""

from __future__ import annotations

import glob
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.files import json_object, plain_suffix
from transformer_jax.data.holdout import blocks
from transformer_jax.data.progress import shown
from transformer_jax.errors import UserError

Boundary = Literal["file", "blank_line"]
FORMS: Final = "a.txt, b.jsonl or a pattern such as 'books/*.txt' (each also .gz or .xz), several with commas between"

_OPEN: Final[dict[str, Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMAT: Final = 1  # of what is kept of a look through; a change makes old caches unused
_TABLES: Final = (".tsv", ".csv", ".json", ".parquet")


def is_document_files(name: str) -> bool:
    """Tell the user's own files from the name of a TFDS dataset."""
    known = plain_suffix(Path(name)) in (".txt", ".jsonl", *_TABLES)
    return known or "*" in name or "?" in name or Path(name).expanduser().exists()


def text_hash(text: str) -> int:
    """Return 64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class FileDocuments:
    """The documents of some files, in the order of the files' names."""

    def __init__(self, pattern: str, field: str, boundary: Boundary) -> None:
        """Look through the files that `pattern` stands for; what was found is kept until a file changes.

        Raises `UserError` with file and line for whatever is absent or malformed.
        """
        self.name = pattern
        self._paths = _expand(pattern)
        self._field, self._boundary = field, boundary
        stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        key = fingerprint("documents", _FORMAT, stamps, field, boundary)
        folder = cached(f"documents-{key}", lambda folder: np.save(folder / "hashes.npy", self._scan()))
        self._hashes: NDArray[np.uint64] = np.load(folder / "hashes.npy")
        self.digest = hashlib.sha256(self._hashes.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            yield from _documents(path, self._field, self._boundary)

    def groups(self) -> list[str]:
        """Name the group of each document that stays together when some are held out.

        Neighbours between blank lines are often parts of one text: they stay together in blocks. Of other documents
        those with the same text do.
        """
        return (
            blocks(len(self)) if self._boundary == "blank_line" else [f"{hash_:x}" for hash_ in self._hashes.tolist()]
        )

    def _scan(self) -> NDArray[np.uint64]:
        documents = shown(iter(self), f"Looking through {self.name}", None)
        hashes = np.fromiter(map(text_hash, documents), np.uint64)
        if not len(hashes):
            raise UserError(f"{self.name}: there is no text in it.")
        return hashes


def _expand(pattern: str) -> list[Path]:
    # The pattern may be absolute, which Path.glob refuses.
    names = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207
    paths = sorted(map(Path, names))
    files = [path for path in paths if path.is_file()]
    if paths and not files:
        raise UserError(f"{pattern} is a folder; name the files in it, as '{pattern.rstrip('/')}/*.txt'.")
    if not files:
        raise UserError(f"{pattern}: there is no such file.")
    for path in files:
        if plain_suffix(path) in _TABLES:
            raise UserError(f"{path}: documents are plain text, or .jsonl with the text in one field; convert it.")
    return files


def _documents(path: Path, field: str, boundary: Boundary) -> Iterator[str]:
    lines = _lines(path)
    if plain_suffix(path) == ".jsonl":
        yield from (text for text in _json_texts(path, lines, field) if text.strip())
        return
    if boundary == "file":
        whole = "".join(line for _, line in lines)
        if whole.strip():
            yield whole
        return
    gathered: list[str] = []
    for _, line in lines:
        if line.strip():
            gathered.append(line)
        elif gathered:
            yield "".join(gathered)
            gathered = []
    if gathered:
        yield "".join(gathered)


def _json_texts(path: Path, lines: Iterator[tuple[int, str]], field: str) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        row = json_object(line, f"{path}:{number}", f"an object with the key '{field}'")
        if field not in row:
            has = f"the keys are {', '.join(sorted(row))}; set data.field to one of them" if row else "no keys at all"
            raise UserError(f"{path}:{number}: no key '{field}': {has}.")
        if not isinstance(row[field], str):
            raise UserError(f"{path}:{number}: '{field}' is {type(row[field]).__name__}, not text.")
        yield row[field]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1, with their line ends, which are made those of Unix."""
    number = 0
    try:
        with cast("IO[bytes]", _OPEN.get(path.suffix, open)(path, "rb")) as file:
            for number, raw in enumerate(file, start=1):
                line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode("utf-8")
                yield number, line.removesuffix("\n").removesuffix("\r") + "\n" if line.endswith("\n") else line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}); "
            "convert the file, for example with iconv -t UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error}).") from error
