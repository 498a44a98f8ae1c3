"""A trained sequence-to-sequence model, opened: text in, text and attention out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.checkpoint import load_meta, load_params
from transformer_jax.config import DecodeConfig, Experiment, MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.generate import beam_search, greedy
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.nn.weights import Weights, hold, holding
from transformer_jax.sharding import batch_sharding, batch_shards, make_mesh
from transformer_jax.storage import run_path


@dataclass(frozen=True)
class Translation:
    """One output of the search."""

    source: str
    text: str
    score: float
    """log p / ((5 + length) / 6)^alpha."""


@dataclass(frozen=True)
class Translator:
    """A run's model on the devices at hand."""

    experiment: Experiment
    tokenizer: Tokenizer
    skeleton: Skeleton
    params: Params
    mesh: jax.sharding.Mesh
    steps: list[int]
    """The checkpoints whose parameters are averaged."""

    @staticmethod
    def open(run: str | Path, average: int | None = None, weights: Weights = "float") -> Translator:
        """Load the newest `average` checkpoints (the experiment's own number unless given).

        `weights` says how matrices are held (`nn/weights.py`).

        Raises:
            UserError: the folder holds no readable checkpoint, or too few.
        """
        run = run_path(run)
        experiment, tokenizer_json = load_meta(run)
        # Decoding keeps one cache per layer, and pictures need the attention weights: unrolled, plain attention.
        compute = replace(experiment.compute, layers="unrolled", attention="xla", remat="none")
        skeleton = Skeleton.of(experiment.model, compute)
        mesh = make_mesh(MeshConfig())
        params, steps = load_params(run, skeleton, mesh, average or experiment.decode.average)
        tokenizer = Tokenizer.from_json(tokenizer_json, where=f"the tokenizer of {run}")
        held = hold(skeleton, params, weights, mesh)
        return Translator(experiment, tokenizer, holding(skeleton, weights), held, mesh, steps)

    def translate(self, sentences: Iterable[str], decode: DecodeConfig | None = None) -> Iterator[Translation]:
        """Yield one translation a sentence, in order, a batch at a time. An empty sentence stays empty."""
        decode = decode or self.experiment.decode
        if min(decode.beam, decode.batch) < 1:
            raise UserError(f"decode.beam and decode.batch must be at least 1, got {decode.beam} and {decode.batch}.")
        iterator = iter(sentences)
        while batch := list(islice(iterator, decode.batch)):
            yield from self._translate_batch(batch, decode)

    def attention(self, source: str, target: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
        """Return attention weights by kind, each [L, N, T, S], and the labels of source and target tokens.

        Row t of "cross" and "decoder" belongs to the target token it predicts; columns of "decoder" are the tokens
        already written, the beginning of the sentence first.
        """
        source_ids, target_ids = self._ids([source])[0], self._ids([target])[0]
        shifted = np.asarray([[self.specials[0], *target_ids[:-1]]], np.int32)
        model = self.skeleton.bind(self.params)
        maps = jax.jit(model.attention_maps)(np.asarray([source_ids], np.int32), shifted)
        weights = {name: np.asarray(value)[:, 0] for name, value in maps.items()}
        return weights, self.tokenizer.tokens(source_ids), self.tokenizer.tokens(target_ids)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        normal = [unicodedata.normalize("NFC", text).strip() for text in texts]
        return [[*ids, self.specials[1]] for ids in self.tokenizer.encode_batch(normal)]

    def _translate_batch(self, sentences: list[str], decode: DecodeConfig) -> Iterator[Translation]:
        ids = self._ids(sentences)
        # Few compiled shapes: rows and length are powers of two (at least 8 tokens), rows divide over the devices.
        shards = batch_shards(self.mesh)
        rows = -(-_power_of_two(len(ids)) // shards) * shards
        length = max(_power_of_two(max(map(len, ids))), 8)
        source_BS = np.zeros((rows, length), np.int32)
        for row, tokens in zip(source_BS, ids, strict=False):
            row[: len(tokens)] = tokens
        tokens_BT, scores_B = self._search(self.params, self._put(source_BS), decode)
        for sentence, output, score in zip(sentences, np.asarray(tokens_BT), np.asarray(scores_B), strict=False):
            empty = not sentence.strip()
            text = "" if empty else self.tokenizer.decode(output.tolist())
            yield Translation(sentence, text, 0.0 if empty else float(score))

    def _put(self, source_BS: np.ndarray) -> jax.Array:
        return jax.device_put(source_BS, batch_sharding(self.mesh))

    @cached_property
    def specials(self) -> tuple[int, int]:
        """Ids of the tokens that begin and end a sentence."""
        bos, eos = self.tokenizer.require_roles(("bos", "eos"), f"the tokenizer of {self.experiment.name}")
        return bos, eos

    @cached_property
    def _search(self) -> Any:
        return jax.jit(partial(search, self.skeleton, specials=self.specials), static_argnums=2)


def search(
    skeleton: Skeleton, params: Params, source_BS: jax.Array, decode: DecodeConfig, *, specials: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Find the best output of each source: tokens [B, T] and scores [B]; beam 1 is greedy."""
    model = skeleton.bind(params)
    max_steps = source_BS.shape[1] + decode.extra_length
    # The input's length without its end token, plus the paper's allowance (Vaswani 2017, section 6.1).
    limit_B = (source_BS != 0).sum(-1) - 1 + decode.extra_length
    state_B, memory_B = model.start(source_BS, max_steps)
    options: dict[str, Any] = {"limit_B": limit_B, "max_steps": max_steps, "length_penalty": decode.length_penalty}
    options |= dict(zip(("bos", "eos"), specials, strict=True))
    if decode.beam == 1:
        return greedy(model.step, state_B, memory_B, **options)
    tokens_BMT, scores_BM = beam_search(model.step, state_B, memory_B, beams=decode.beam, **options)
    return tokens_BMT[:, 0], scores_BM[:, 0]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
