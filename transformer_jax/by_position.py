"""The loss by how much text stood before a token: what a model makes of its context (Kaplan 2020, figure 7)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import Experiment
from transformer_jax.data.loader import Batch
from transformer_jax.errors import UserError
from transformer_jax.nn.module import Params
from transformer_jax.objectives import CausalLM, cross_entropy
from transformer_jax.train import Trainer

RESAMPLES = 1000


@dataclass(frozen=True)
class ByPosition:
    """Sums over held-out tokens by their position T in the text at hand, for each of X batches."""

    nll_XT: NDArray[np.float64]
    """Nats."""
    tokens_XT: NDArray[np.float64]

    @property
    def nll(self) -> list[float | None]:
        """Mean nats of a token that has 0, 1, 2, ... tokens before it; None where no text is so long."""
        return _means(self.nll_XT.sum(0), self.tokens_XT.sum(0))

    def groups(self) -> list[dict[str, Any]]:
        """Means over positions 0, 1, 2 to 3, 4 to 7, ...: "first", "last", "tokens", "nll", "interval" (95 %).

        The interval is that of resampled batches.
        """
        batches, length = self.nll_XT.shape
        ends = [0, *(2**i for i in range(length.bit_length()) if 2**i < length), length]
        draws = np.random.default_rng(0).integers(batches, size=(RESAMPLES if batches > 1 else 0, batches))
        found = []
        for first, end in itertools.pairwise(ends):
            nll_X, tokens_X = (sums[:, first:end].sum(1) for sums in (self.nll_XT, self.tokens_XT))
            if not tokens_X.sum():
                continue
            resampled = [mean for mean in _means(nll_X[draws].sum(1), tokens_X[draws].sum(1)) if mean is not None]
            found.append(
                {
                    "first": first,
                    "last": end - 1,
                    "tokens": int(tokens_X.sum()),
                    "nll": float(nll_X.sum() / tokens_X.sum()),
                    "interval": np.percentile(resampled, (2.5, 97.5)).tolist() if resampled else None,
                }
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain lists: "nll" and "tokens" by position, and "groups"."""
        return {"nll": self.nll, "tokens": self.tokens_XT.sum(0).astype(int).tolist(), "groups": self.groups()}


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float | None]:
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def next_tokens(experiment: Experiment) -> CausalLM:
    """Return the objective of a run that predicts next tokens; raises `UserError` for any other."""
    objective = experiment.objective
    if not isinstance(objective, CausalLM):
        raise UserError(
            f"--by-position scores next tokens, but '{experiment.name}' is trained by {type(objective).__name__}."
        )
    return objective


def by_position(trainer: Trainer, params: Params, batches: Iterable[Batch]) -> ByPosition:
    """Score every token of packed documents by its position in its document (of a row, where it begins before).

    Raises:
        UserError: a run that does not predict the next token, or no batches.
    """
    objective = next_tokens(trainer.experiment)

    def sums(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model, targets_BT = trainer.skeleton.bind(params), batch["targets"]
        x_BTD = model.read(batch)
        nll_BT = _nll(model, x_BTD, jnp.maximum(targets_BT, 0), objective.chunk or targets_BT.shape[1])
        length = targets_BT.shape[1]
        place_BT = jnp.where(targets_BT >= 0, batch.get("positions", jnp.arange(length)), length)  # absent: one text
        zeros_T = jnp.zeros(length)
        return zeros_T.at[place_BT].add(nll_BT, mode="drop"), zeros_T.at[place_BT].add(1.0, mode="drop")

    with jax.set_mesh(trainer.mesh):
        step = jax.jit(sums)
        parts = [step(params, trainer.put(batch)) for batch in batches]
    if not parts:
        raise UserError("the test split is empty.")
    nll, tokens = zip(*jax.device_get(parts), strict=True)
    return ByPosition(np.asarray(nll, np.float64), np.asarray(tokens, np.float64))


def _nll(model: Any, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
    """Nats of every target, float32 [B, T]; the logits of `chunk` positions are held at a time."""
    rows, length = targets_BT.shape
    pieces = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        ends = ((0, 0), (0, pieces * chunk - length), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, ends).reshape(rows, pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    nll_PBC = jax.lax.map(lambda piece: cross_entropy(model.logits(piece[0]), piece[1]), (cut(x_BTD), cut(targets_BT)))
    return nll_PBC.swapaxes(0, 1).reshape(rows, -1)[:, :length]
