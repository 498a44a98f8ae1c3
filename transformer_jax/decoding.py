"""The compiled side of a decoder-only model: prefill, turns of writing, beams and likelihoods.

Each is compiled once for a bucket: rows, prompt length and places of the cache are rounded up to few sizes. The cache
is donated from call to call, parameters lie as in training, rows over the batch axes of the mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from transformer_jax.generate import beam_search
from transformer_jax.models.gpt import DecoderState, GPTConfig
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.sampling import Chunk, Filters, Writing, judged, one_token, write
from transformer_jax.sharding import batch_sharding, batch_shards, constrain
from transformer_jax.speculative import Pair, speculative

TURNS: Final = 16
"""Most turns of one call."""
LEAST: Final = 16
"""Smallest length that others are rounded up to."""
SCORED: Final = 128
"""Positions of a row whose logits are held at a time when likelihoods are computed."""

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Decoding:
    """One model, or one that another drafts for, ready to be compiled; `weights` are the parameters in that order."""

    skeletons: tuple[Skeleton, ...]
    mesh: Mesh
    context: int
    """Most positions of the first model."""
    eos: int
    """-1: there is none."""
    pad: int
    drafted: int = 0

    def prefill(
        self,
        weights: tuple[Params, ...],
        prompts: Ids,
        prompt_R: Sequence[int],
        *,
        sample_R: Sequence[int],
        limit_R: Sequence[int],
        seed: int,
        filters: Filters,
    ) -> Writing:
        """Read prompts, each once, and begin rows that continue them.

        Args:
            weights: the parameters.
            prompts: their tokens, each at least one.
            prompt_R: which prompt each row continues.
            sample_R: number of each row among those of its prompt.
            limit_R: most tokens of each row.
            seed: of all rows; row r draws with `fold_in(seed, sample_R[r])`.
            filters: say whether the rows keep account of what occurred.
        """
        tokens_BT, length_B = self._padded(prompts)
        rows = self._rows(len(prompt_R))
        spare = (0, rows - len(prompt_R))
        row = np.stack([np.pad(np.asarray(x, np.int32), spare) for x in (prompt_R, sample_R, limit_R)])
        longest = max(len(prompts[p]) + limit for p, limit in zip(prompt_R, limit_R, strict=True))
        places = self._bucket(longest + self.drafted, self.context + 1 + self.drafted)
        with jax.set_mesh(self.mesh):
            return self._start(weights, tokens_BT, length_B, *self._put(*row), seed, filters, places=places)

    def advance(
        self,
        weights: tuple[Params, ...],
        writing: Writing,
        closed: Sequence[bool],
        filters: Filters,
        turns: int,
        *,
        alternatives: int,
    ) -> tuple[Writing, Chunk]:
        """Write until all rows are closed or `turns` are over; `writing` is used up, `closed` closes rows before."""
        spare = len(writing.last_B) - len(closed)
        (closed_R,) = self._put(np.asarray([*closed, *[True] * spare]))
        with jax.set_mesh(self.mesh):
            return self._write(weights, writing, closed_R, filters, turns, alternatives=alternatives)

    def search(
        self, weights: tuple[Params, ...], prompts: Ids, limits: Sequence[int], *, beams: int, length_penalty: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Find the best continuations: tokens [B, M, T], of which those from `vocab_size` on are none, and scores."""
        tokens_BT, length_B = self._padded(prompts)
        (limit_B,) = self._put(np.pad(np.asarray(limits, np.int32), (0, len(tokens_BT) - len(limits))))
        longest = max(len(ids) + limit for ids, limit in zip(prompts, limits, strict=True))
        places, steps = self._bucket(longest, self.context + 1), self._bucket(max(limits), self.context)
        with jax.set_mesh(self.mesh):
            found = self._beams(
                *(weights, tokens_BT, length_B, limit_B), length_penalty, places=places, steps=steps, beams=beams
            )
        tokens_BMT, scores_BM = jax.device_get(found)
        return tokens_BMT[: len(prompts)], scores_BM[: len(prompts)]

    def likelihoods(self, weights: tuple[Params, ...], rows: Ids) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Judge tokens by those before them: log-probability of token t + 1, and if it is the best, both [B, T]."""
        tokens_BT, _ = self._padded(rows, longest=self.context + 1)
        with jax.set_mesh(self.mesh):
            judgement = self._judge(weights[0], tokens_BT)
        log_prob_BT, best_BT = jax.device_get(judgement)
        return log_prob_BT, best_BT

    @cached_property
    def _start(self) -> Any:
        def start(
            weights: tuple[Params, ...],
            tokens_BT: jax.Array,
            length_B: jax.Array,
            prompt_R: jax.Array,
            sample_R: jax.Array,
            limit_R: jax.Array,
            seed: jax.Array,
            filters: Filters,
            places: int,
        ) -> Writing:
            states = [self._state(i, weights, tokens_BT, length_B, places) for i in range(len(weights))]
            last_B = tokens_BT[jnp.arange(len(length_B)), length_B - 1]
            seen_BV = None
            if filters.repetition_penalty is not None:
                nowhere = self.skeletons[0].config.vocab_size
                real_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
                seen_BV = jnp.zeros((len(last_B), nowhere), bool)
                rows_B1 = jnp.arange(len(last_B))[:, None]
                seen_BV = seen_BV.at[rows_B1, jnp.where(real_BT, tokens_BT, nowhere)].set(True, mode="drop")
            state, last_R, seen_RV = jax.tree.map(
                lambda leaf: leaf[prompt_R], (Pair(*states) if self.drafted else states[0], last_B, seen_BV)
            )
            key_R = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), sample_R)
            return _laid_out(Writing(state, last_R, key_R, jnp.zeros_like(limit_R), limit_R, limit_R <= 0, seen_RV))

        return jax.jit(start, static_argnames="places")

    @cached_property
    def _write(self) -> Any:
        def advance(
            weights: tuple[Params, ...],
            writing: Writing,
            closed_R: jax.Array,
            filters: Filters,
            turns: jax.Array,
            alternatives: int,
        ) -> tuple[Writing, Chunk]:
            read = [skeleton.bind(params).extend for skeleton, params in zip(self.skeletons, weights, strict=True)]

            def step(state: DecoderState, token_R: jax.Array) -> tuple[jax.Array, DecoderState]:
                if not self._reads_two(len(token_R)):
                    logits_R1V, state = read[0](state, token_R[:, None])
                    return logits_R1V[:, 0], state
                logits_RTV, longer = read[0](state, jnp.stack([token_R, token_R], axis=1))
                return logits_RTV[:, 0], longer._replace(length_B=state.length_B + 1)

            turn = (
                speculative(read[0], read[1], self.drafted, filters, alternatives)
                if self.drafted
                else one_token(step, filters, alternatives)
            )
            writing, chunk = write(
                turn,
                writing._replace(closed_B=writing.closed_B | closed_R),
                turns=turns,
                capacity=TURNS,
                width=1 + self.drafted,
                eos=self.eos,
                pad=self.pad,
                alternatives=alternatives,
            )
            return _laid_out(writing), chunk

        return jax.jit(advance, static_argnames="alternatives", donate_argnames="writing")

    @cached_property
    def _beams(self) -> Any:
        def search(
            weights: tuple[Params, ...],
            tokens_BT: jax.Array,
            length_B: jax.Array,
            limit_B: jax.Array,
            length_penalty: float,
            places: int,
            steps: int,
            beams: int,
        ) -> tuple[jax.Array, jax.Array]:
            model = self.skeletons[0].bind(weights[0])
            last_B = tokens_BT[jnp.arange(len(length_B)), length_B - 1]

            def step(
                state: tuple[DecoderState, jax.Array], _: tuple[()], token_R: jax.Array
            ) -> tuple[jax.Array, tuple[DecoderState, jax.Array]]:
                # The first step reads the last token of the prompt, another one for each row.
                past, first_R = state
                logits_R1V, past = model.extend(past, jnp.where(first_R >= 0, first_R, token_R)[:, None])
                return logits_R1V[:, 0], (past, jnp.full_like(first_R, -1))

            none = self.skeletons[0].config.vocab_size  # beyond the vocabulary: nothing is forbidden but by the model
            state = self._state(0, weights, tokens_BT, length_B, places), last_B
            options: dict[str, Any] = {"bos": none, "pad": none, "eos": self.eos, "max_steps": steps, "beams": beams}
            return beam_search(step, state, (), limit_B=limit_B, length_penalty=length_penalty, **options)

        return jax.jit(search, static_argnames=("length_penalty", "places", "steps", "beams"))

    @cached_property
    def _judge(self) -> Any:
        def judge(params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = self.skeletons[0].bind(params)
            x_BTD, next_BT = model.features(tokens_BT), jnp.roll(tokens_BT, -1, axis=1)
            rows, length = tokens_BT.shape
            pieces = -(-length // SCORED)
            size = -(-length // pieces)

            def cut(x_BTX: jax.Array) -> jax.Array:
                ends = ((0, 0), (0, pieces * size - length), *[(0, 0)] * (x_BTX.ndim - 2))
                return jnp.pad(x_BTX, ends).reshape(rows, pieces, size, *x_BTX.shape[2:]).swapaxes(0, 1)

            def judge_piece(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                log_prob_BT, (best_BT1, _) = judged(model.logits(piece[0]), piece[1], 1)
                return log_prob_BT, best_BT1[..., 0] == piece[1]

            judgement = jax.lax.map(judge_piece, (cut(x_BTD), cut(next_BT)))
            return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, : length - 1], judgement)

        return jax.jit(judge)

    def _state(
        self, i: int, weights: tuple[Params, ...], tokens_BT: jax.Array, length_B: jax.Array, places: int
    ) -> DecoderState:
        """Let model i read prompts but for their last token, which the first turn reads."""
        _, state = self.skeletons[i].bind(weights[i]).start(tokens_BT, length_B, places)
        return state._replace(length_B=length_B - 1)

    def _reads_two(self, rows: int) -> bool:
        """Tell whether a token is read with another behind it, which is taken back at once: a single row on a GPU.

        XLA multiplies one alone with a matrix element by element, and writes what comes out, as large as the matrix, to
        memory. The second would choose experts of its own.
        """
        config = self.skeletons[0].config
        dense = isinstance(config, GPTConfig) and not config.experts.count
        return dense and rows == 1 and jax.default_backend() == "gpu"

    def _padded(self, rows: Ids, longest: int | None = None) -> list[jax.Array]:
        """Return tokens [B, T] in a bucket, and lengths [B]; rows without tokens count one."""
        length = self._bucket(max(map(len, rows)), longest or self.context)
        tokens_BT = np.full((self._rows(len(rows)), length), max(self.pad, 0), np.int32)
        length_B = np.ones(len(tokens_BT), np.int32)
        for i, ids in enumerate(rows):
            tokens_BT[i, : len(ids)] = ids
            length_B[i] = len(ids)
        return self._put(tokens_BT, length_B)

    def _put(self, *arrays: NDArray[Any]) -> list[jax.Array]:
        return [jax.device_put(array, batch_sharding(self.mesh)) for array in arrays]

    def _rows(self, n: int) -> int:
        shards = batch_shards(self.mesh)
        return -(-_power_of_two(n) // shards) * shards

    @staticmethod
    def _bucket(n: int, most: int) -> int:
        return min(max(_power_of_two(n), LEAST), max(most, n))


def _laid_out(writing: Writing) -> Writing:
    """Lay every leaf out by its letters, the same in every call: a cache is BKSH, all others begin with rows."""
    return jax.tree.map(lambda leaf: constrain(leaf, "BKSH" if leaf.ndim == 4 else "BSKH"[: leaf.ndim]), writing)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
