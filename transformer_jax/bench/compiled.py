"""Compiling the training step ahead of time, cold and from the cache, and what the compiler says of it."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from transformer_jax import compilation_cache
from transformer_jax.planning.hlo import parse
from transformer_jax.planning.traffic import memory_traffic
from transformer_jax.train import BatchShapes, Trainer

_CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@dataclass(frozen=True)
class Step:
    """The program that is timed."""

    call: Any
    """(state, batch) -> (state, metrics); the old state's memory is reused."""
    trace_seconds: float
    """From the Python function to what the compiler reads."""
    cold_seconds: float
    """Of the compiler, without a cache."""
    warm_seconds: float | None
    """The same from the persistent cache on disk; None where this backend keeps none."""
    hlo: str
    """SHA-256 of the optimised program, names of source lines left out."""
    memory: int
    """Bytes of one device where most is taken, arguments included, as the compiler says."""
    traffic: int
    """Bytes that one device moves between memory and arithmetic units in a step: loops followed, fusions counted once.

    From the optimised program; the compiler's own count takes the body of a loop once.
    """


def compile_step(trainer: Trainer, shapes: BatchShapes, *, warm: bool = True) -> Step:
    """Compile the training step for batches of these shapes, and with `warm` once more from a cache on disk."""
    with empty_cache():
        start = time.perf_counter()
        lowered = trainer.lower_train_step(shapes)
        traced = time.perf_counter()
        call = lowered.compile()
        compiled = time.perf_counter()
        again = _from_cache(trainer, shapes) if warm else None
    text = call.as_text() or ""
    memory: Any = call.memory_analysis()
    return Step(
        call=call,
        trace_seconds=traced - start,
        cold_seconds=compiled - traced,
        warm_seconds=again,
        hlo=fingerprint(text),
        memory=max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes),
        traffic=memory_traffic(parse(text)),
    )


def _from_cache(trainer: Trainer, shapes: BatchShapes) -> float | None:
    """Seconds to compile what was compiled before, or None if it was compiled anew."""
    hits: list[str] = []

    def note(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    lowered = trainer.lower_train_step(shapes)
    jax.monitoring.register_event_listener(note)
    try:
        start = time.perf_counter()
        lowered.compile()
        seconds = time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_listener(note)
    return seconds if hits else None


@contextmanager
def empty_cache() -> Iterator[None]:
    """Use a persistent compilation cache that is empty, and afterwards the one before."""
    with (
        tempfile.TemporaryDirectory(prefix="tjax-bench-") as folder,
        compilation_cache.configured(**_CACHE, jax_compilation_cache_dir=folder),
    ):
        yield


def fingerprint(text: str) -> str:
    """Hash the text of an optimised program without its metadata (source lines), which change without it."""
    bare = re.sub(r", metadata=\{[^}]*\}|^HloModule [^,]*", "", text, flags=re.M)
    bare = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*", "\n", bare)
    return hashlib.sha256(bare.encode()).hexdigest()
