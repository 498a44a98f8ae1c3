"""Asked to stop: SIGTERM when a machine is taken away, Ctrl-C by its user; then the run saves, and can be continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

from transformer_jax.logs import say


class Stops:
    """Whether a run was asked to stop: on any of its hosts, and answered after the same step on all."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal, once `now` has been true; of a signal to another host it is SIGTERM."""
        self._received: str | None = None
        self._calls = 0

    def now(self) -> bool:
        """Say whether to stop before the next step; every process asks equally often."""
        if jax.process_count() == 1:
            self.name = self._received
        else:
            # JAX listens for SIGTERM and lets all hosts agree on the step; it wants a number that only grows.
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.name = self._received or signal.SIGTERM.name
                say(f"a host of this job was asked to stop ({self.name}): all save after the same step")
        return self.name is not None

    def note(self, number: int, _frame: Any) -> None:
        """Handle a signal; a second Ctrl-C interrupts."""
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        say(f"{self._received}: saving, then stopping (press Ctrl-C again to stop at once)")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # tells the others


@contextmanager
def stops() -> Iterator[Stops]:
    """Listen for SIGTERM and Ctrl-C while the block runs."""
    asked = Stops()
    # Among several hosts SIGTERM is JAX's: a handler of ours would replace the one that tells the others.
    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, asked.note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
