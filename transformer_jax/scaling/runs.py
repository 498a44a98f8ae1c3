"""What a runs table holds: the row of a run, the arrays a fit reads, and what was left out, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from transformer_jax.scaling.files import write_columns
from transformer_jax.scaling.groups import SAME, within

DONE = ("done", "finished", "complete", "completed", "success", "ok")
"""What the column "status" says of a run that counts."""


@dataclass(frozen=True)
class Run:
    """One row of a runs table: a training run, or one evaluation of it. Unknown fields stay None."""

    run: str
    n: float
    """Parameters N by which laws are fitted: all that a token meets, so of experts only those that it takes."""
    d: float
    """Training tokens D up to this row."""
    c: float
    """Training FLOPs by 6ND."""
    loss: float
    """Loss on held-out text, nats a token."""
    n_total: float | None = None
    """All parameters; more than N with experts only."""
    n_non_embedding: float | None = None
    n_head: float | None = None
    """Parameters of the output layer."""
    d_unique: float | None = None
    """Distinct tokens; fewer than D where epochs repeat."""
    c_exact: float | None = None
    """Training FLOPs counted matmul by matmul, by the convention named next."""
    c_convention: str | None = None
    trunk: str | None = None
    """Run whose first steps it shares; such runs are not independent (`--run trunk --every-row` resamples them so)."""
    train_loss: float | None = None
    seed: int | None = None
    batch: float | None = None
    """Tokens a step."""
    learning_rate: float | None = None
    schedule: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    """Fingerprint of the text."""
    code: str | None = None
    """Commit."""
    config: str | None = None
    """Hash of the experiment's JSON."""
    device: str | None = None
    seconds: float | None = None
    mfu: float | None = None
    status: str | None = None
    """One of `DONE` counts."""
    excluded: str | None = None
    """Why the run does not count; empty if it does."""


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Write a runs table; the name tells the format (.csv, .tsv, .jsonl, .parquet)."""
    write_columns([asdict(run) for run in runs], path)


@dataclass(frozen=True)
class Points:
    """Runs, or rows of training curves, as arrays of equal length."""

    run: np.ndarray
    """Index of the run."""
    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.N)

    def take(self, rows: np.ndarray) -> Points:
        """Select rows, by index or mask."""
        return Points(*(getattr(self, item.name)[rows] for item in fields(self)))

    def last_of_each(self) -> np.ndarray:
        """Return the row with the most tokens of every run, in the order of the runs."""
        order = np.lexsort((self.D, self.run))
        return order[np.flatnonzero(np.diff(self.run[order], append=-1))]

    @property
    def size(self) -> np.ndarray:
        """Index of the model size: N within 1 % of each other are one."""
        return within(np.log(self.N), SAME)


@dataclass(frozen=True)
class Exclusion:
    """Rows that do not count, for one reason."""

    reason: str
    lines: list[int]


@dataclass(frozen=True)
class Table:
    """A table of runs, mapped and checked."""

    path: Path
    names: list[str]
    """Name of every run, by index."""
    curves: Points
    """Every row that counts."""
    runs: Points
    """What forms are fitted to: the last row of every run, or all rows (`TableOptions.every_row`)."""
    also_N: dict[str, np.ndarray]
    """Other counts of the parameters of `runs`."""
    rows: list[Run]
    """Every row of the file, with its reason where it does not count."""
    excluded: list[Exclusion]
    notes: list[str] = field(default_factory=list)
    """How columns were read, in sentences."""

    def exclusions(self) -> list[str]:
        """Return a sentence for every reason."""
        return [f"{len(e.lines)} of {len(self.rows)} rows: {e.reason} (lines {_some(e.lines)})" for e in self.excluded]


def _some(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:8])) + (", ..." if len(lines) > 8 else "")
