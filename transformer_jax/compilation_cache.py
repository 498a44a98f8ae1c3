"""Compiled programs are kept between runs, in JAX's own persistent cache: the same command starts sooner again."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from transformer_jax.data.cache import cache_dir, fingerprint
from transformer_jax.logs import say

_CONFIG: Any = jax.config  # its settings are attributes that a type checker does not see

LARGEST = 4 * 2**30
"""Bytes kept; those that were not used for longest go first."""


def keep() -> None:
    """Keep compiled programs under the user's cache folder, unless JAX was told where, or not to.

    JAX_COMPILATION_CACHE_DIR names another folder (or bucket), JAX_ENABLE_COMPILATION_CACHE=false switches it off. JAX
    finds an entry by the program, the versions, the flags and the kind of device.
    """
    if where() or not _CONFIG.jax_enable_compilation_cache:
        return
    folder = _own()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"compiled programs are not kept: {folder}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)


def leave() -> None:
    """Compile anew in a job of several processes: only the first writes, so the others would lag behind where it reads.

    A folder that JAX was told stays in use: it may be shared.
    """
    if where() == str(_own()):
        jax.config.update("jax_enable_compilation_cache", False)


@contextmanager
def configured(**settings: Any) -> Iterator[None]:
    """Change settings of JAX's cache inside the block; JAX notices a change only when its cache is opened anew."""
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def where() -> str:
    """Return the folder in use, or ""."""
    return (_CONFIG.jax_compilation_cache_dir or "") if _CONFIG.jax_enable_compilation_cache else ""


def _own() -> Path:
    """Programs for CPUs use what the processor can do: unlike machines that share a home have folders of their own."""
    file, said = Path("/proc/cpuinfo"), platform.processor()
    if file.exists():
        first = file.read_text(encoding="utf-8").partition("\n\n")[0]
        said = "\n".join(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features")))
    return cache_dir() / "compiled" / fingerprint(platform.machine(), said)
