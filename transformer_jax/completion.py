"""A trained decoder-only model, opened: text in, its continuation out, or the likelihood of a given one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, cast

import jax

from transformer_jax.checkpoint import load_meta, load_params
from transformer_jax.config import Experiment, MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding import TURNS, Decoding
from transformer_jax.errors import UserError
from transformer_jax.generation import Completion, Generation, Line, News, Speed
from transformer_jax.models import LanguageModelConfig
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.nn.weights import Weights, hold, holding
from transformer_jax.objectives import Seq2Seq
from transformer_jax.prompts import PromptEncoder
from transformer_jax.sampling import Chunk
from transformer_jax.sharding import make_mesh
from transformer_jax.speculative import check_drafted
from transformer_jax.storage import run_path
from transformer_jax.text_stream import TextStream

SMOOTH: Final = 0.1
"""Seconds: a call that takes longer is followed by a shorter one, so that text keeps flowing."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    log_probs: list[float]
    """Of each of its tokens, in nats."""
    greedy: bool
    """Each of its tokens is the most probable one."""

    @property
    def log_prob(self) -> float:
        """Of the whole continuation."""
        return float(sum(self.log_probs))


@dataclass(frozen=True)
class Completer:
    """A run's model on the devices at hand, with a draft model beside it or none.

    Opening reads settings and tokenizer only; parameters are loaded when they are first needed.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    skeleton: Skeleton
    mesh: jax.sharding.Mesh
    load: Callable[[], Params]
    """Reads the parameters."""
    draft: Completer | None = None
    draft_tokens: int = 0

    @staticmethod
    def open(
        run: str | Path, average: int = 1, mesh: MeshConfig | None = None, weights: Weights = "float"
    ) -> Completer:
        """Open a run folder; the parameters are those of the newest `average` checkpoints.

        Args:
            run: the run folder.
            average: checkpoints to average.
            mesh: how devices are arranged; by default each holds the whole model, and they share the rows.
            weights: how matrices are held (`nn/weights.py`).

        Raises:
            UserError: there is no checkpoint, or it is no decoder-only model.
        """
        run = run_path(run)
        experiment, tokenizer_json = load_meta(run)
        if not isinstance(experiment.model, LanguageModelConfig):
            way = (
                "`tjax translate` writes with it" if isinstance(experiment.objective, Seq2Seq) else "see `tjax --help`"
            )
            raise UserError(f"{run} holds a {type(experiment.model).__name__}, which is no decoder-only model; {way}.")
        # Decoding keeps one cache per layer: unrolled, plain attention.
        compute = replace(experiment.compute, layers="unrolled", attention="xla", remat="none")
        skeleton, devices = Skeleton.of(experiment.model, compute), make_mesh(mesh or MeshConfig())
        tokenizer = Tokenizer.from_json(tokenizer_json, where=f"the tokenizer of {run}")

        def load() -> Params:
            return hold(skeleton, load_params(run, skeleton, devices, average)[0], weights, devices)

        return Completer(experiment, tokenizer, holding(skeleton, weights), devices, load)

    def drafted_by(self, draft: Completer, draft_tokens: int = 4) -> Completer:
        """Return the same model with a smaller one that drafts `draft_tokens` tokens a turn (see `speculative.py`).

        Raises:
            UserError: the draft has another vocabulary, or drafts too much.
        """
        check_drafted(draft_tokens)
        ours, theirs = (c.tokenizer.tokens(range(c.config.vocab_size)) for c in (self, draft))
        if ours != theirs:
            places = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            first = next(places, min(len(ours), len(theirs)))
            raise UserError(
                f"the draft '{draft.experiment.name}' has another vocabulary ({len(theirs)} tokens) than "
                f"'{self.experiment.name}' ({len(ours)}), which differs from token {first} on; "
                "train both with one tokenizer."
            )
        return replace(self, draft=draft, draft_tokens=draft_tokens)

    @property
    def config(self) -> LanguageModelConfig:
        """Sizes of the model."""
        return cast(LanguageModelConfig, self.skeleton.config)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """How the model wants to be prompted."""
        return PromptEncoder(self.tokenizer, self.config.context)

    def check(self, prompts: Sequence[str], generation: Generation, where: str = "the prompt") -> None:
        """Raise `UserError` for bad input, before anything is loaded or compiled; `where` names the prompts."""
        generation.check(self.config.vocab_size)
        if generation.beam and self.draft:
            raise UserError("a draft model speeds up sampling, not --beam; leave one of them out.")
        if not prompts:
            raise UserError(f"{where}: there is nothing to complete.")
        self.encoder.encode(prompts, where)

    def complete(self, prompt: str, generation: Generation | None = None) -> Iterator[str]:
        """Yield the (first) continuation of a prompt piece by piece, as it is written.

        Raises:
            UserError: bad input.
        """
        generation = generation or Generation()
        self.check([prompt], generation)
        return (piece for _, piece in self.stream([Completion(prompt)], generation))

    def complete_all(
        self, prompts: Sequence[str], generation: Generation | None = None, speed: Speed | None = None
    ) -> Iterator[Completion]:
        """Yield n completions of each prompt, in order, a batch at a time; each is what it would be alone.

        Raises:
            UserError: bad input.
        """
        generation = generation or Generation()
        self.check(prompts, generation)
        rows = [Completion(prompt, sample) for prompt in prompts for sample in range(generation.n)]
        batches = [rows[i : i + generation.batch] for i in range(0, len(rows), generation.batch)]
        return (row for batch in batches for row in self._finished(batch, generation, speed))

    def stream(
        self, rows: Sequence[Completion], generation: Generation, speed: Speed | None = None
    ) -> Iterator[tuple[Completion, str]]:
        """Fill in `rows`, all at once; yield a row and a new piece of its text as soon as there is one."""
        speed = speed or Speed()
        lines = self._lines(rows, generation)
        for news in self._searched(lines, generation) if generation.beam else self._sampled(lines, generation, speed):
            before = sum(len(row.tokens) for row in rows)
            pieces = [line.take(new, self.tokenizer.eos) for line, new in zip(lines, news, strict=True)]
            speed.add(sum(len(row.tokens) for row in rows) - before)
            yield from ((row, piece) for row, piece in zip(rows, pieces, strict=True) if piece)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Judge the second text of each pair as the continuation of the first (see `PromptEncoder.encode_pairs`).

        Raises:
            UserError: text the tokenizer does not know, a continuation without tokens, or more than the model reads.
        """
        encoded, most = self.encoder.encode_pairs(pairs), self.config.context + 1
        for (_, continuation), (before, after) in zip(pairs, encoded, strict=True):
            if len(before) + len(after) > most:
                raise UserError(
                    f"'{continuation[:40]}' after its context makes {len(before) + len(after)} tokens, but the model "
                    f"judges at most {most}; shorten the context."
                )
        return self.score_tokens(encoded)

    def score_tokens(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int = 16) -> list[Score]:
        """Judge tokens after others, of which there must be one at least; `batch` rows at once."""
        scores: dict[int, Score] = {}
        # Rows of like length share a batch, so that little is padded.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            judged = self._decoding.likelihoods(self._weights, [[*pairs[i][0], *pairs[i][1]] for i in chosen])
            for i, log_prob_T, best_T in zip(chosen, *judged, strict=False):
                after = slice(len(pairs[i][0]) - 1, len(pairs[i][0]) + len(pairs[i][1]) - 1)
                scores[i] = Score(log_prob_T[after].tolist(), bool(best_T[after].all()))
        return [scores[i] for i in range(len(pairs))]

    @cached_property
    def _weights(self) -> tuple[Params, ...]:
        return (self.load(), *(self.draft._weights if self.draft else ()))

    @cached_property
    def _decoding(self) -> Decoding:
        eos = -1 if self.tokenizer.eos is None else self.tokenizer.eos
        pad = max(eos, 0) if self.tokenizer.pad is None else self.tokenizer.pad
        skeletons = (self.skeleton, self.draft.skeleton) if self.draft else (self.skeleton,)
        return Decoding(skeletons, self.mesh, self.config.context, eos, pad, self.draft_tokens)

    def _lines(self, rows: Sequence[Completion], generation: Generation) -> list[Line]:
        texts = list(dict.fromkeys(row.prompt for row in rows))
        prompts = dict(zip(texts, self.encoder.encode(texts), strict=True))
        lines = []
        for row in rows:
            prompt = prompts[row.prompt]
            room = self.config.context + 1 - len(prompt)  # the last token need not be read
            most = min(generation.max_tokens, room)
            stream = TextStream(self.tokenizer, prompt, generation.stop)
            lines.append(Line(row, prompt, most, "length" if most == generation.max_tokens else "context", stream))
        return lines

    def _finished(self, rows: list[Completion], generation: Generation, speed: Speed | None) -> list[Completion]:
        for _ in self.stream(rows, generation, speed):
            pass
        return rows

    def _sampled(self, lines: list[Line], generation: Generation, speed: Speed) -> Iterator[list[News]]:
        prompts, prompt_R = _distinct([line.prompt for line in lines])
        filters, options = generation.filters(), {"alternatives": generation.logprobs}
        writing = self._decoding.prefill(
            self._weights,
            prompts,
            prompt_R,
            sample_R=[line.completion.sample for line in lines],
            limit_R=[line.limit for line in lines],
            seed=generation.seed,
            filters=filters,
        )
        turns = 1
        writing, ahead = self._decoding.advance(self._weights, writing, [False] * len(lines), filters, turns, **options)
        while not all(line.completion.finish for line in lines):
            # The next tokens are asked for before the text of these is made; what is asked in vain costs no turn.
            since, chunk = time.perf_counter(), ahead
            closed = [bool(line.completion.finish) for line in lines]
            writing, ahead = self._decoding.advance(self._weights, writing, closed, filters, turns, **options)
            chunk = jax.device_get(chunk)
            turns = max(turns // 2, 1) if time.perf_counter() - since > SMOOTH else min(2 * turns, TURNS)
            speed.drafted += int(chunk.turns_B.sum()) * self.draft_tokens
            speed.accepted += int((chunk.offered_B - chunk.turns_B).sum())
            yield [_news(chunk, row) for row in range(len(lines))]

    def _searched(self, lines: list[Line], generation: Generation) -> Iterator[list[News]]:
        prompts, prompt_R = _distinct([line.prompt for line in lines])
        limits = [next(line.limit for line in lines if line.prompt == prompt) for prompt in prompts]
        tokens_BMT, scores_BM = self._decoding.search(
            self._weights, prompts, limits, beams=generation.beam, length_penalty=generation.length_penalty
        )
        news = []
        for line, prompt in zip(lines, prompt_R, strict=True):
            line.completion.score = float(scores_BM[prompt, line.completion.sample])
            tokens = tokens_BMT[prompt, line.completion.sample]
            news.append(News(tokens[tokens < self.config.vocab_size].tolist()))
        yield news


def _distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Return each prompt once, and which of them each was."""
    place = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return [list(prompt) for prompt in place], [place[tuple(prompt)] for prompt in prompts]


def _news(chunk: Chunk, row: int) -> News:
    count = int(chunk.count_B[row])
    places = zip(*(x[row, :count].tolist() for x in chunk.ranked_BCN), strict=True)
    ranked = [dict(zip(tokens, log_probs, strict=True)) for tokens, log_probs in places]
    return News(chunk.tokens_BC[row, :count].tolist(), chunk.log_prob_BC[row, :count].tolist(), ranked)
