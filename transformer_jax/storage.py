"""Where a run lives: a folder, or a bucket (gs://, s3://) with the same methods."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from transformer_jax.errors import UserError, closest

NEEDS = {"gs": "gcsfs", "s3": "s3fs"}
"""Package through which each kind of bucket is reached."""


def run_path(where: str | os.PathLike[str]) -> Path:
    """Return a run folder as a `Path`; of a bucket it is `etils.epath`'s, which has the same methods.

    Raises:
        UserError: a kind of bucket that is not known, or the package for it is not installed.
    """
    text = os.fspath(where)
    # `Path("gs://bucket/run")` has lost a slash.
    match = re.match(r"(\w+):/+(.*)", text)
    if not match:
        return Path(where)
    scheme, rest = match.groups()
    if scheme not in NEEDS:
        known = ", ".join(f"{name}://" for name in NEEDS)
        raise UserError(f"{text}: a run can be in a folder or in {known}.{closest(scheme, NEEDS)}")
    path: Path = epath.Path(f"{scheme}://{rest}")
    try:
        path.exists()
    except ImportError as error:
        raise UserError(f"{scheme}:// needs {NEEDS[scheme]}: pip install {NEEDS[scheme]} ({error}).") from error
    return path


def folder_here(where: str | os.PathLike[str], what: str) -> Path:
    """Return a folder of this machine for what is not kept in buckets.

    Raises:
        UserError: it is in a bucket.
    """
    if re.match(r"\w+:/+", os.fspath(where)):
        raise UserError(
            f"--out {where}: {what} is kept in a folder of this machine (or one that machines share); give one, and "
            "copy it to the bucket afterwards."
        )
    return Path(where)


def is_remote(path: Path) -> bool:
    """Say whether a path is in a bucket: no appending, no disk that could be full."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """Return the path from the root; of a bucket, it is that already."""
    return path if is_remote(path) else path.absolute()


def upload(folder: Path, path: Path) -> None:
    """Copy the files of a folder of this machine to a path, over those of the same name."""
    for file in folder.rglob("*"):
        if file.is_file():
            target = path / file.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


def move(folder: Path, target: Path) -> None:
    """Move a folder, over whatever is at the target; in a bucket, where nothing can be renamed, file by file."""
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        folder.rename(target)
        return
    for file in _files(folder):
        copied = target / file.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        file.copy(copied)  # type: ignore[attr-defined]  # of epath
    remove(folder)


def _files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # of epath
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written_here(path: Path) -> Iterator[Path]:
    """Give a file of this machine to programs that cannot write elsewhere; it is at `path` when the block ends."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
        upload(Path(folder), path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, of which `path` is made at the end: whole or not at all, whoever else writes it too."""
    scratch = path.with_name(f"incomplete.{uuid.uuid4().hex}.{path.name}")
    yield scratch
    scratch.replace(path)
