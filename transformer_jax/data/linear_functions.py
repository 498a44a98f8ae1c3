"""`LinearFunctions`: functions shown by examples, drawn anew for every row (Garg 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import DataConfig
from transformer_jax.data.bits import bits_of_rows, uniform
from transformer_jax.data.holdout import Split
from transformer_jax.data.loader import ENDLESS, Batch, read_ahead, rows_of_process
from transformer_jax.data.plan import EMPTY
from transformer_jax.data.row_plan import check_rows
from transformer_jax.errors import UserError, closest

if TYPE_CHECKING:
    import grain

    from transformer_jax.data.tokenizer import Tokenizer

Kind = Literal["linear", "noisy", "sparse", "scaled"]
NUMBERS: Final[dict[Split, int]] = {"train": 0, "validation": 1, "test": 2}
"""Of the splits, to draw each from bits of its own."""
CURRICULUM: Final = (5, 11)
"""Dimensions and examples with which a curriculum begins (Garg 2022, appendix A.2)."""


@dataclass(frozen=True)
class LinearFunctions(DataConfig):
    """Functions f(x) = w x, one a row, shown by examples x_1, f(x_1), x_2, f(x_2), ... (Garg 2022, section 3).

    The numbers of w and x are standard normal. Of the other kinds, "noisy" adds standard normal noise to every value,
    "sparse" leaves 15 % of the numbers of w (at least one), "scaled" makes x three times as large (section 4).

    A batch is {"inputs": float32 [B, P, Z], "values": float32 [B, P], "segments": int32 [B, P] (1 real, 0 padding);
    "example": int64 [B]}. Validation and test functions are the same for every seed.
    """

    dimension: int = 20
    """Numbers of an input."""
    points: int = 41
    """Examples of a function; the last is predicted after all others."""
    kind: Kind = "linear"
    """What is drawn."""
    test: Literal["", "linear", "noisy", "sparse", "scaled"] = ""
    """What is drawn for the test split: a kind; empty is that of training."""
    curriculum: int = 0
    """Steps after which a dimension and two examples are added, from 5 and 11 on (appendix A.2); 0 begins with all."""
    batch_rows: int = 64
    """Rows of a batch, over all hosts."""
    rows_multiple: int = 8
    """Every batch has a multiple of this many rows, so that a mesh can divide it."""
    held_out_rows: int = 1280
    """Functions of the validation split, and of the test split."""
    threads: int = 4
    """Threads that draw batches ahead of the step; 0 draws them when they are asked for."""

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other."""
        for name, least in (("dimension", 1), ("points", 1), ("rows_multiple", 1), ("curriculum", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} must be at least {least}, got {getattr(self, name)}.")
        check_rows("data.batch_rows", self.batch_rows, self.rows_multiple)
        check_rows("data.held_out_rows", self.held_out_rows, self.rows_multiple)
        if self.test and self.test not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise UserError(f"there are no functions '{self.test}', only {kinds}.{closest(self.test, get_args(Kind))}")

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> FunctionData:
        """Return the data; there is nothing to read, and no text."""
        self.check()
        return FunctionData(self)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of a batch, over all processes."""
        rows, points = self.batch_rows, self.points
        return {
            "inputs": ((rows, points, self.dimension), "float32"),
            "values": ((rows, points), "float32"),
            "segments": ((rows, points), "int32"),
            "example": ((rows,), "int64"),
        }


class FunctionData:
    """Implements `transformer_jax.data.loader.OpenData` for functions that are drawn."""

    def __init__(self, config: LinearFunctions) -> None:
        """Remember what is to be drawn."""
        self._config = config
        self.tokenizer: Tokenizer | None = None
        """There is no text."""

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts."""
        config = self._config
        return {
            "functions": {"train": config.kind, "validation": config.kind, "test": config.test or config.kind},
            "dimension": config.dimension,
            "points": config.points,
            "held_out": config.held_out_rows,
        }

    def describe(self) -> str:
        """Return one line for the log."""
        config = self._config
        grows = f"; a dimension and two examples more every {config.curriculum:,} steps" if config.curriculum else ""
        return (
            f"data: {config.kind} functions of {config.dimension} numbers, {config.points} examples each, drawn for "
            f"every row; {config.held_out_rows:,} for validation and test{grows}"
        )

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training; see `OpenData.train_iterator`."""
        config, size = self._config, self._config.batch_rows

        def assemble(step: int) -> Batch:
            rows_B = rows_of_process(np.arange(step * size, (step + 1) * size), process_index, process_count)
            return draw(config, config.kind, rows_B, seed, "train", _stage(config, step))

        return read_ahead(range(ENDLESS), assemble, config.threads)

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the functions of the validation split, each once."""
        return self._held_out("validation", self._config.kind, process_index, process_count)

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the functions of the test split, each once."""
        kind = self._config.test or self._config.kind
        return self._held_out("test", kind, process_index, process_count)

    def text(self, example: int) -> str:
        """Name a training function; it has no text."""
        return f"function {example}"

    def _held_out(self, split: Split, kind: Kind, process: int, processes: int) -> Iterator[Batch]:
        size, rows = self._config.batch_rows, self._config.held_out_rows
        numbers = np.pad(np.arange(rows), (0, -rows % size), constant_values=EMPTY)
        one = partial(draw, self._config, kind, seed=0, split=split)
        for begin in range(0, len(numbers), size):
            yield one(rows_of_process(numbers[begin : begin + size], process, processes))


def draw(
    config: LinearFunctions,
    kind: Kind,
    rows_B: NDArray[np.int64],
    seed: int,
    split: Split,
    stage: tuple[int, int] | None = None,
) -> Batch:
    """Draw the functions of these rows; row i is a function of (seed, split, i), and -1 is a row of padding.

    Kinds differ in nothing but what their name says: with one seed they are made of the same numbers. A `stage` is the
    dimensions and examples that are not left out: 0 in x, and padding.
    """
    P, Z = config.points, config.dimension
    dimension, points = stage or (Z, P)
    normal_count = Z + P * Z + P
    words = bits_of_rows(np.maximum(rows_B, 0), 2 * normal_count + Z, seed, NUMBERS[split])
    w_BZ, inputs, noise_BP = np.split(_normal(words[:, : 2 * normal_count]), [Z, Z + P * Z], axis=1)
    inputs_BPZ = inputs.reshape(len(rows_B), P, Z) * (3.0 if kind == "scaled" else 1.0)
    inputs_BPZ[..., dimension:] = 0
    if kind == "sparse":
        rank_BZ = words[:, 2 * normal_count :].argsort(axis=1).argsort(axis=1)
        w_BZ = w_BZ * (rank_BZ < max(round(0.15 * Z), 1))
    values_BP = np.einsum("BPZ,BZ->BP", inputs_BPZ, w_BZ) + (noise_BP if kind == "noisy" else 0.0)
    return {
        "inputs": inputs_BPZ.astype(np.float32),
        "values": values_BP.astype(np.float32),
        "segments": ((rows_B >= 0)[:, None] & (np.arange(P) < points)).astype(np.int32),
        "example": rows_B.astype(np.int64),
    }


def _normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn pairs of words into standard normal numbers (Box and Muller 1958)."""
    first, second = uniform(words[:, ::2]), uniform(words[:, 1::2])
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)


def _stage(config: LinearFunctions, step: int) -> tuple[int, int]:
    """Return the dimensions and examples of a training step."""
    if not config.curriculum:
        return config.dimension, config.points
    grown = step // config.curriculum
    return min(CURRICULUM[0] + grown, config.dimension), min(CURRICULUM[1] + 2 * grown, config.points)
