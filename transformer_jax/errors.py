"""The one error a user can cause, and the one sentence they get for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says in one line what is wrong, where, and how to mend it.

    The command line prints it and exits with code 2. Nothing has been overwritten when it is raised.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def closest(name: str, options: Iterable[str]) -> str:
    """Say which of `options` was probably meant by `name`: ``" Did you mean 'width'?"``, or nothing."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal has ended work that can be continued by the same command; what was done is saved."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal
