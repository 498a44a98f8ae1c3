"""Batches to measure with: an experiment cut to a wanted size, and random contents that suit its kind of data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import DataConfig, Experiment, flatten
from transformer_jax.data.linear_functions import LinearFunctions
from transformer_jax.data.loader import PREFETCHED, rows_of_process
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.packed import PackedText
from transformer_jax.data.task_config import TaskConfig
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError

Batch = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

RESERVED = 4
"""Ids below this one are special in our tokenizers (padding, the start and the end of a sentence)."""


def sized(experiment: Experiment, rows: int = 0, length: int = 0) -> Experiment:
    """Return the experiment with batches of `rows` rows of `length` tokens; 0 keeps the recipe's own.

    The length of parallel text is that of each side. Masked text keeps its share of gaps.

    Raises:
        UserError: a number that is none, a length beyond the model's context, or data of another kind.
    """
    if rows < 0 or length < 0:
        raise UserError(f"--batch and --length must be at least 1, got {rows} and {length}.")
    if rows or length:
        experiment = replace(experiment, data=_resized(experiment.data, rows, length))
    context, shapes = context_of(experiment), shapes_of(experiment)
    longest = 2 * length_of(shapes) - 1 if "values" in shapes else length_of(shapes)  # x_1, y_1, ..., x_P
    if longest > context:
        raise UserError(
            f"--length {length_of(shapes)} is more than model.context={context} has room for: add --model.context "
            f"{longest}."
        )
    return experiment


def context_of(experiment: Experiment) -> float:
    """Return the most positions that the model reads at once; infinite where nothing bounds them."""
    context = dict(flatten(experiment)).get("model.context", math.inf)
    assert isinstance(context, int | float)
    return context


def _resized(data: DataConfig, rows: int, length: int) -> DataConfig:
    sizes: dict[str, Any]
    match data:
        case ParallelText():
            length = length or data.max_length
            rows = rows or max(data.batch_tokens // length // data.rows_multiple, 1) * data.rows_multiple
            sizes = {"batch_tokens": rows * length, "max_length": length, "bucket_lengths": ()}
        case PackedText():
            rows = rows or data.batch_rows
            sizes = {"batch_rows": rows, "context": length or data.context, "ramp": ()}
        case MaskedText():
            rows, length = rows or data.batch_rows, length or data.length
            gaps = max(round(data.max_predictions * length / data.length), 1)
            sizes = {"batch_rows": rows, "length": length, "max_predictions": gaps}
        case LinearFunctions():
            rows = rows or data.batch_rows
            sizes = {"batch_rows": rows, "held_out_rows": rows, "points": length or data.points, "curriculum": 0}
        case TaskConfig():
            rows = rows or data.batch_rows
            sizes = {"batch_rows": rows, "max_length": length or data.max_length}
            sizes |= {"bucket_lengths": ()} if hasattr(data, "bucket_lengths") else {}
        case _:
            raise UserError(f"--batch and --length do not know the data of kind {type(data).__name__}.")
    return replace(data, rows_multiple=rows, **sizes)


def shapes_of(experiment: Experiment) -> Shapes:
    """Return the shapes of the arrays of the largest batch that a model sees, by name."""
    shapes = experiment.data.batch_shapes().items()
    return {name: shape for name, (shape, _) in shapes if name != "example"}


def length_of(shapes: Shapes) -> int:
    """Return the tokens (or points) of a row, of the source where there are two sides."""
    return next(shapes[name] for name in ("source", "tokens", "segments") if name in shapes)[1]


def rows_of(shapes: Shapes) -> int:
    """Return the rows of a batch."""
    return next(iter(shapes.values()))[0]


def random_batch(experiment: Experiment, *, padded: bool = False) -> Batch:
    """Make up this process's rows of the largest batch of an experiment: random tokens, no padding, every label.

    Args:
        experiment: whose batch.
        padded: rows of parallel text fill between half and all of their length, as a bucket of sentences does.

    Raises:
        UserError: the batch has an array whose meaning is not known here.
    """
    described = {name: it for name, it in experiment.data.batch_shapes().items() if name != "example"}
    labels, random = dict(flatten(experiment)).get("model.labels") or 1, np.random.default_rng(0)
    vocabulary, shapes = experiment.model.vocab_size, {name: shape for name, (shape, _) in described.items()}
    mine = rows_of_process(np.arange(rows_of(shapes)), jax.process_index(), jax.process_count())
    batch = {
        name: _contents(name, shapes, dtype, vocabulary, labels, random).astype(dtype)[mine]
        for name, (_, dtype) in described.items()
    }
    if padded and "target" in batch:
        share = random.uniform(0.5, 1.0, (rows_of(shapes), 1))[mine]
        for side in ("source", "target"):
            length = batch[side].shape[1]
            batch[side] = np.where(np.arange(length) < np.ceil(share * length), batch[side], 0)
    return batch


def _contents(
    name: str, shapes: Shapes, dtype: str, vocabulary: int, labels: int, random: np.random.Generator
) -> NDArray[Any]:
    shape = shapes[name]
    match name:
        case "tokens" | "source" | "target" | "targets":
            return random.integers(min(RESERVED, vocabulary - 1), vocabulary, shape)
        case "segments":
            return np.ones(shape)
        case "positions":
            return np.broadcast_to(np.arange(shape[1]), shape)
        case "types":
            return np.broadcast_to(np.arange(shape[1]) * 2 // shape[1], shape)
        case "positions_masked":
            places = np.broadcast_to(np.arange(shapes["tokens"][1]), shapes["tokens"])
            return np.sort(random.permuted(places, axis=1)[:, : shape[1]], axis=1)
        case "inputs" | "values":
            return random.normal(size=shape)
        case "next":
            return random.integers(0, 2, shape)
        case "label":
            return random.normal(size=shape) if dtype == "float32" else random.integers(0, labels, shape)
        case "start" | "end":
            return random.integers(0, length_of(shapes), shape)
        case "bytes":
            return np.full(shape, 4.0 * length_of(shapes))
    raise UserError(f"bench cannot make up the array '{name}' of this kind of data: time it with --real-data.")


def read_ahead_of(data: DataConfig) -> int:
    """Return how many batches a loader may hold ready, in its buffer and in its threads' hands."""
    threads = getattr(data, "threads", 0)
    return (PREFETCHED + 1) * threads
