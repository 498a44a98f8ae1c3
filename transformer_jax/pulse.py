"""Whether all processes of a job are there and come along: one that hangs is named, and none waits for ever."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
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

PLACES = "tjax_places"
"""Where the processes tell each other how far they are, in the key-value store of the job."""

ENDS = "tjax_ends"
"""Where the first to find the job lost says why."""

STUCK = 1800
"""Seconds for which one may stand still while others wait: longer than what one does alone (compile, read, write)."""

IDLE = "no step was under way"
"""What is said of a loss before or after training."""

LOST = 75
"""Exit code where another process was lost: try again (EX_TEMPFAIL of sysexits.h)."""


class Pulse:
    """Meets the other processes every few seconds, beside the work, from when they have joined until the end.

    A process that is stopped, starved or cut off misses the meetings, although a collective that waits for it would
    wait for ever. One whose main thread alone is stuck does not: so each also tells its place, the number of programs
    for all processes that its main thread has come to. Where one lies behind and nobody moves, it is named, and says at
    which line of code it is.
    """

    def __init__(self, silent: int, stuck: int = STUCK) -> None:
        self.silent, self.stuck = silent, stuck
        """Seconds after which another process is taken for lost: of silence, and of standing still."""
        self.place = 0
        """Programs for all processes that the main thread has come to."""
        self.newest: Callable[[], str] | None = lambda: IDLE
        """Says from where a restart goes on; while it is set, a loss ends this process."""
        self._heard = time.monotonic()
        self._missing: list[str] = []
        self._said = threading.Lock()
        self._who = who()  # not to be asked for while JAX aborts this process
        self._places: dict[int, int] = {}
        self._moved, self._stood = self._heard, 0.0

    def start(self) -> None:
        """Begin, in two threads that end with the process."""
        for work in (self._meet, self._watch):
            threading.Thread(target=work, daemon=True).start()
        # In C: Python would run a handler of its own when this thread comes to it, and the process is gone by then.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

    def _aborted(self, _: int) -> None:
        """Say what it means that JAX aborts this process: process 0, where all meet, is gone.

        It does so within milliseconds, in a thread of its own that may hold locks of JAX: nothing of JAX is called.
        """
        if (newest := self.newest) is None:
            return
        if self._said.acquire(blocking=False):
            _say_lost(f"{self._who} was aborted by JAX, as the lines above say", newest)
        else:
            time.sleep(1)  # another thread says it, and ends the process
        end(LOST)

    def _meet(self) -> None:
        meeting, store = multihost.get_barrier_sync_fn(), multihost.get_jax_distributed_client()
        for number in itertools.count():
            try:
                self._heed(store.key_value_dir_get(ENDS))
                store.key_value_set(f"{PLACES}/{jax.process_index()}", str(self.place), allow_overwrite=True)
                meeting(key=f"tjax_pulse_{number}", timeout_ms=PATIENCE * 500)
            except jax.errors.JaxRuntimeError as error:
                # One that was away finds that these meetings are over, and hurries to the one that goes on.
                self._missing = missing(str(error))
                time.sleep(1)
            else:
                self._heard, self._missing = time.monotonic(), []
                if number % (PATIENCE // EVERY) == 0:
                    self._look(store.key_value_dir_get)
                time.sleep(EVERY)

    def _look(self, told: Callable[[str], list[tuple[str, str]]]) -> None:
        """Note how far all are; the others are asked for only if this process stands still itself."""
        own, places = jax.process_index(), {jax.process_index(): self.place}
        if self._places.get(own) == self.place:
            places = {int(key.rpartition("/")[2]): int(place) for key, place in told(PLACES)}
        now = time.monotonic()
        if places != self._places:
            self._places, self._moved = places, now
        self._stood = now - self._moved

    def _watch(self) -> None:
        said, last = 0, time.monotonic()
        while True:
            time.sleep(1)
            now = time.monotonic()
            if now - last > SUSPENDED:
                self._heard, self._moved, self._stood = now, now, 0.0
            last = now
            if (newest := self.newest) is None:
                continue
            seconds, most, trouble, why = now - self._heard, self.silent, self._silence, "it hangs, or is cut off"
            if seconds < PATIENCE and self._behind():
                seconds, most, trouble, why = self._stood, self.stuck, self._standstill, "one does not come along"
            if seconds < PATIENCE:
                said = 0
            elif seconds >= most:
                self.lose(f"{trouble(seconds)}: {why}", newest)
            elif seconds >= said + PATIENCE:
                said = round(seconds)
                say(trouble(seconds))

    def _heed(self, told: list[tuple[str, str]]) -> None:
        """End where another has found the job lost, unless this process is through."""
        if told and (newest := self.newest) is not None:
            self.lose(f"{who()} ends too ({told[0][1]})", newest)

    def lose(self, trouble: str, newest: Callable[[], str]) -> NoReturn:
        """Say once why the job is lost and from where a restart goes on, tell the others, and end this process.

        Process 0 goes last: where all meet there is nobody then, and JAX aborts who has not ended yet, with a stack
        trace. It waits for as long as they may take to hear of it, between two meetings.
        """
        if self._said.acquire(blocking=False):
            _say_lost(trouble, newest)
            # Where process 0 does not answer, neither does this.
            telling = threading.Thread(target=_tell, args=(trouble,), daemon=True)
            telling.start()
            telling.join(EVERY)
        if jax.process_index() == 0:
            time.sleep(EVERY + PATIENCE // 2)
        end(LOST)

    def _silence(self, seconds: float) -> str:
        whom = "process 0, where all meet" if jax.process_index() else "the others"
        return f"{who()} has heard nothing of {_named(self._missing) if self._missing else whom} for {seconds:.0f} s"

    def _behind(self) -> list[str]:
        """Return the processes that have come less far than others."""
        least = min(self._places.values(), default=0)
        if least == max(self._places.values(), default=0):
            return []
        return [str(process) for process, place in sorted(self._places.items()) if place == least]

    def _standstill(self, seconds: float) -> str:
        behind = self._behind()
        if str(jax.process_index()) in behind:
            return f"{who()} keeps the others waiting for {seconds:.0f} s, at {_line_of_main_thread()}"
        return f"{who()} has waited {seconds:.0f} s for {_named(behind)}"


def _say_lost(trouble: str, newest: Callable[[], str]) -> None:
    say(f"tjax: {trouble}; {newest()}. Start all again with the same command: they go on from what was saved.")


def _tell(why: str) -> None:
    # ValueError: JAX has left the job already.
    with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError):
        multihost.get_jax_distributed_client().key_value_set(f"{ENDS}/first", why)


def missing(refusal: str) -> list[str]:
    """Return the numbers of the processes that a meeting waited for in vain, as far as JAX says."""
    named = refusal.partition("timed out task names:")[2].partition("RPC")[0]
    return re.findall(r"(?:^|[\s,:])(\d+)(?=[\s,]|$)", named)


def _named(processes: list[str]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(processes)}"


def _line_of_main_thread() -> str:
    """Name the innermost line of ours, and what it has called."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    ours = [line for line in stack if Path(line.filename).is_relative_to(Path(__file__).parent)]
    lines = [*ours[-1:], *(stack[-1:] if stack[-1:] != ours[-1:] else [])]
    return ", in ".join(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno} ({one.name})" for one in lines)


def who() -> str:
    """Name this process for a line to the user."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def end(code: int) -> NoReturn:
    """End at once: JAX's own way out waits for the processes that are not there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
