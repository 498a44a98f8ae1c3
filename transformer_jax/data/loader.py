"""What training, evaluation and generation see of a dataset, and how its batches are read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from transformer_jax.errors import UserError

if TYPE_CHECKING:
    import grain

    from transformer_jax.data.plan import EpochPlan
    from transformer_jax.data.tokenizer import Tokenizer

Entry_co = TypeVar("Entry_co", covariant=True)

Batch = dict[str, NDArray[Any]]
"""Arrays with the rows of one process: what they are is for the kind of data to say."""


class OpenData(Protocol):
    """A dataset that has been read and tokenized.

    What the arrays of a batch are is for the kind of data to say, but every batch has "example", int64 [B]: the number
    of the training example in each row, or -1 where a row is all padding. B counts the rows of one process; those of
    all processes, one after the other, are the global batch.
    """

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of all texts; None where there is no text."""

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts: counts by split, what was dropped and why, fingerprint."""

    def describe(self) -> str:
        """Return one line for the log: counts, vocabulary, what was left out."""

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training, whose order is a function of `seed` alone.

        `get_state` and `set_state` of the iterator resume at the next batch, also with another `process_count`.
        """

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterable[Batch]:
        """Return the batches of one pass over the validation examples, each exactly once."""

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterable[Batch]:
        """Return the batches of one pass over the test examples. Raises `UserError` if there is no test split."""

    def text(self, example: int) -> str:
        """Return the text of a training example, by its number in a batch."""


class Plan(Protocol[Entry_co]):
    """The endless sequence of what goes into each batch, by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry_co: ...


ENDLESS: Final = 1 << 40
"""Length of a plan without end: larger than any run."""

PREFETCHED: Final = 4
"""Batches that each thread keeps ready."""


def rows_of_process(examples_B: NDArray[np.int64], process_index: int, process_count: int) -> NDArray[np.int64]:
    """Return this process's contiguous block of the global batch, as `make_array_from_process_local_data` wants it.

    Raises `UserError` if the rows cannot be divided evenly.
    """
    if len(examples_B) % process_count:
        raise UserError(
            f"batches of {len(examples_B)} rows cannot be divided among {process_count} processes; "
            f"set data.rows_multiple to a multiple of {process_count}."
        )
    rows = len(examples_B) // process_count
    return examples_B[process_index * rows : (process_index + 1) * rows]


def read_ahead(
    plan: Plan[Entry_co], assemble: Callable[[Entry_co], Batch], threads: int
) -> grain.DatasetIterator[Batch]:
    """Return an iterator over `plan` whose batches are assembled by `threads` threads (0: when asked for)."""
    import grain  # noqa: PLC0415 - with JAX and Orbax it takes a second, and only training reads

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCHED * threads)
    return iter(grain.MapDataset.source(plan).map(assemble).to_iter_dataset(options))


def distinct_shapes(plans: Sequence[EpochPlan]) -> list[tuple[int, int, int]]:
    """List the shapes (B, S, T) of all batches of `plans`, shortest first."""
    used = {
        bucket
        for plan in plans
        for bucket, examples in zip(plan.buckets, plan.examples_per_bucket, strict=True)
        if examples
    }
    return sorted(((b.rows, b.length, b.length) for b in used), key=lambda shape: shape[1])
