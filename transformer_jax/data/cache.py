"""Results that are kept on disk between runs, each under a key that names all it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: `$XDG_CACHE_HOME/transformer_jax`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer_jax"


def fingerprint(*parts: object) -> str:
    """Return 16 hex digits that stand for JSON-able `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache folder `name`, which `write(folder)` fills if it does not exist yet.

    A folder appears complete or not at all, also when several processes make it at once.
    """
    final = cache_dir() / name
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"incomplete.{name}.", dir=final.parent))
    try:
        write(scratch)
        scratch.rename(final)
    except OSError:
        if not final.exists():
            raise  # not lost to another process that made the same: a real failure
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
