"""What to write, and what was written: options, completions, and a row on its way from one to the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformer_jax.errors import UserError
from transformer_jax.sampling import Sampling
from transformer_jax.text_stream import TextStream


@dataclass(frozen=True)
class Generation(Sampling):
    """What to write: how much, how often, and until when."""

    max_tokens: int = 128
    """Most tokens of a completion; the context of the model is a limit too."""
    stop: tuple[str, ...] = ()
    """Strings before which a completion ends; they are not part of it."""
    seed: int = 0
    """Sample i depends on the seed, i and the prompt alone."""
    n: int = 1
    """Completions of each prompt."""
    logprobs: int = 0
    """How many of the most probable tokens to report at each place, by the model itself, before any filter."""
    beam: int = 0
    """Hypotheses of a beam search for the most probable completion; 0 samples."""
    length_penalty: float = 0.6
    """Exponent alpha of ((5 + length) / 6)^alpha in beam search (Wu 2016, equation 14)."""
    batch: int = 64
    """Rows written at once."""

    def check(self, vocab_size: int) -> None:
        """Raise `UserError` for a value that makes no sense."""
        super().check(vocab_size)
        for name in ("max_tokens", "n", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        for name in ("seed", "beam", "length_penalty"):
            if not 0 <= getattr(self, name) < 2**31:
                raise UserError(f"--{name.replace('_', '-')} must not be negative or huge, got {getattr(self, name)}.")
        if not 0 <= self.logprobs <= vocab_size:
            raise UserError(f"--logprobs must lie between 0 and the vocabulary of {vocab_size}, got {self.logprobs}.")
        if "" in self.stop:
            raise UserError("--stop: an empty string would stop at once; leave it out.")
        if self.beam and (self.filters() != Sampling(self.temperature).filters() or self.logprobs):
            raise UserError("--beam looks for the most probable text: no filter and no --logprobs beside it.")
        if self.beam and self.n > self.beam:
            raise UserError(f"--n {self.n} wants more completions than --beam {self.beam} keeps.")


@dataclass
class Completion:
    """One continuation of a prompt."""

    prompt: str
    sample: int = 0
    """Which of the n; of a beam search the best is 0."""
    text: str = ""
    finish: Literal["", "eos", "stop", "length", "context"] = ""
    """Why it ends: the end token, a stop string, max_tokens, the end of the context; "" while it is written."""
    tokens: list[int] = field(default_factory=list)
    """As the model wrote them, with what ended the text."""
    log_probs: list[float] = field(default_factory=list)
    """Of each token, in nats, by the model itself, before any filter; empty after a beam search."""
    ranked: list[dict[int, float]] = field(default_factory=list)
    """The most probable tokens at each place, with their log-probabilities."""
    score: float | None = None
    """Of a beam search: log p / ((5 + length) / 6)^alpha."""


@dataclass
class Speed:
    """What was written in which time, and how the draft model fared; the clock runs from its making."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    seconds: float = 0.0
    first: tuple[int, float] = (0, 0.0)
    """The tokens that came first, and when: loading and compilation lie before them."""
    drafted: int = 0
    accepted: int = 0

    def add(self, tokens: int) -> None:
        """Count tokens that were just written."""
        self.seconds = time.perf_counter() - self.began
        self.tokens += tokens
        self.first = self.first if self.first[0] else (tokens, self.seconds)

    @property
    def rate(self) -> float:
        """Tokens a second after the first ones."""
        return (self.tokens - self.first[0]) / max(self.seconds - self.first[1], 1e-9)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the model agreed to."""
        return self.accepted / max(self.drafted, 1)

    def __str__(self) -> str:
        text = f"{self.tokens} tokens in {self.seconds:.1f} s"
        if self.tokens > self.first[0]:
            text += f" ({self.first[1]:.1f} s to the first), then {self.rate:.1f} tokens/s"
        return text + (f"; {self.acceptance:.0%} of {self.drafted} drafted tokens accepted" if self.drafted else "")


class News(NamedTuple):
    """The next tokens of one row."""

    tokens: Sequence[int]
    log_probs: Sequence[float] = ()
    ranked: Sequence[dict[int, float]] = ()


@dataclass
class Line:
    """A completion that is being written."""

    completion: Completion
    prompt: list[int]
    """Tokens the model has read."""
    limit: int
    """Most tokens."""
    limited_by: Literal["length", "context"]
    stream: TextStream

    def take(self, news: News, eos: int | None) -> str:
        """Add tokens until one of them ends the text; return the text that is now certain."""
        done, piece = self.completion, ""
        for i, token in enumerate(news.tokens):
            if done.finish:
                break
            done.tokens.append(token)
            done.log_probs.extend(news.log_probs[i : i + 1])
            done.ranked.extend(news.ranked[i : i + 1])
            if token == eos:
                done.finish = "eos"
            else:
                piece += self.stream.push(token)
                if self.stream.stopped:
                    done.finish = "stop"
                elif len(done.tokens) == self.limit:
                    done.finish = self.limited_by
            if done.finish:
                piece += self.stream.finish()
                # What was held back may be a stop string itself, at the very end.
                done.finish = "stop" if self.stream.stopped else done.finish
        done.text += piece
        return piece
