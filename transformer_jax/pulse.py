"""Whether all processes of a job are still there: one that hangs is named, and the others do not wait for ever."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
from orbax.checkpoint import multihost

from transformer_jax.logs import say

PATIENCE = 30
"""Seconds between two lines that say what a process waits for."""

EVERY = 5
"""Seconds between two meetings of all processes."""

SUSPENDED = 10
"""Seconds that a nap of one takes where this process itself did not run: the machine slept, or it was stopped."""

LOST = 75
"""Exit code where another process was lost: try again (EX_TEMPFAIL of sysexits.h)."""


class Pulse:
    """Meets the other processes every few seconds, beside the work, from when they have joined until the end.

    A process that is stopped, starved or cut off misses the meetings, although a collective that waits for it would
    wait for ever. One whose main thread alone is stuck does not.
    """

    def __init__(self, silent: int) -> None:
        self.silent = silent
        """Seconds of silence after which another process is taken for lost."""
        self.newest: Callable[[], str] | None = None
        """Says from where a restart goes on; while it is set, a loss ends this process."""
        self._heard = time.monotonic()
        self._missing: list[str] = []

    def start(self) -> None:
        """Begin, in two threads that end with the process."""
        for work in (self._meet, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def _meet(self) -> None:
        meeting = multihost.get_barrier_sync_fn()
        for number in itertools.count():
            try:
                meeting(key=f"tjax_pulse_{number}", timeout_ms=PATIENCE * 500)
            except jax.errors.JaxRuntimeError as error:
                # One that was away finds that these meetings are over, and hurries to the one that goes on.
                self._missing = missing(str(error))
                time.sleep(1)
            else:
                self._heard, self._missing = time.monotonic(), []
                time.sleep(EVERY)

    def _watch(self) -> None:
        said, last = 0, time.monotonic()
        while True:
            time.sleep(1)
            now = time.monotonic()
            if now - last > SUSPENDED:
                self._heard = now
            last = now
            silence, newest = now - self._heard, self.newest
            if newest is None or silence < PATIENCE:
                said = 0
            elif silence >= self.silent:
                say(
                    f"tjax: {_who()} has heard nothing of {self._whom()} for {silence:.0f} s: it hangs, or is cut off; "
                    f"{newest()}. Start all again with the same command: they continue there."
                )
                end(LOST)
            elif silence >= said + PATIENCE:
                said = round(silence)
                say(f"{_who()} has heard nothing of {self._whom()} for {said} s")

    def _whom(self) -> str:
        if self._missing:
            return f"process{'es' if len(self._missing) > 1 else ''} {', '.join(self._missing)}"
        return "process 0, where all meet" if jax.process_index() else "the others"


def missing(refusal: str) -> list[str]:
    """Return the numbers of the processes that a meeting waited for in vain, as far as JAX says."""
    named = refusal.partition("timed out task names:")[2].partition("RPC")[0]
    return re.findall(r"(?:^|[\s,:])(\d+)(?=[\s,]|$)", named)


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def end(code: int) -> NoReturn:
    """End at once: JAX's own way out waits for the processes that are not there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
