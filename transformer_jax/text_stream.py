"""Tokens become text as they come: nothing is shown that a later token could still change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from transformer_jax.data.tokenizer import Tokenizer

_BROKEN: Final = "\ufffd"
"""What bytes that are no character (yet) decode to."""
_TAIL: Final = 8
"""Tokens of context that decoding the next one needs: a character has at most four bytes."""
_LONGEST: Final = 64


class TextStream:
    """The text of one completion.

    Bytes of a character that is split over tokens are held back until it is whole, and what may be the beginning of
    a stop string until it is clear. The pieces, joined, are the text of all tokens, cut before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Begin after the tokens of a prompt; they decide whether a blank stands before the first word."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window = list(prompt[-_TAIL:])
        self._read = len(self._decoded())
        self._held = ""
        self.text = ""
        """All pieces so far."""
        self.stopped = False
        """A stop string was met; later tokens have no text."""

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decoded()
        whole = text.rstrip(_BROKEN)
        self._held += whole[self._read :]
        self._read = max(self._read, len(whole))
        if len(self._window) > _LONGEST and len(whole) == len(text):
            self._window = self._window[-_TAIL:]
            self._read = len(self._decoded())
        return self._release()

    def finish(self) -> str:
        """Return what was held back: no further token comes."""
        if self.stopped:
            return ""
        self._held += self._decoded()[self._read :]
        return self._release(final=True)

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, stop=False)

    def _release(self, final: bool = False) -> str:
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
        else:
            kept = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            piece = self._held[: len(self._held) - kept]
            self._held = self._held[len(piece) :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
