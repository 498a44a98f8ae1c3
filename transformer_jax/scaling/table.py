"""How a table of anyone's is mapped, checked and reported.

Nothing is dropped silently: every row that does not count is in `Table.excluded`, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.files import read_columns
from transformer_jax.scaling.reader import RowReader
from transformer_jax.scaling.runs import Exclusion, Points, Table


@dataclass(frozen=True)
class TableOptions:
    """Which columns hold what, and which rows count."""

    n: str = ""
    """Column of the parameters N; by default "n". Two of N, D and C do. "Params (M)*1e6" and "steps*batch" multiply."""
    d: str = ""
    """Column of the training tokens D; by default "d"; without one, D = C / (6N)."""
    c: str = ""
    """Column of the training FLOPs C; by default "c"; without one, C = 6ND."""
    loss: str = ""
    """Column of the loss; by default "loss". "log(ppl)" takes the logarithm of a perplexity."""
    run: str = ""
    """Column that names the run, where a run has several rows (its training curve); by default "run"."""
    where: tuple[str, ...] = ()
    """Only rows with these values, as "dataset=C4"."""
    every_row: bool = False
    """Fit forms to every row of a training curve, not to the last of each run: for runs at a constant learning rate."""
    drop_highest_loss: int = 0
    """Leave out this many runs of the highest loss."""
    flops_factor: float = 2.0
    """A row whose C differs from 6ND by more than this factor does not count."""
    also_n: tuple[str, ...] = ()
    """Other columns that count parameters: the fit is repeated with each."""


def read_table(path: Path, options: TableOptions) -> Table:
    """Read, map and check a table.

    Raises:
        UserError: a column that is not there (the closest is named), a column without numbers, a run of several
            sizes, FLOPs that never agree with 6ND, or nothing left.
    """
    columns = read_columns(path)
    reader = RowReader(columns)
    notes: list[str] = []
    reader.select(options.where)
    N = reader.optional(options.n, "n", "--n", notes)
    loss = reader.positive(options.loss, "loss", "--loss", notes)
    D, C = reader.optional(options.d, "d", "--d", notes), reader.optional(options.c, "c", "--c", notes)
    N, D, C = reader.third_of(N, D, C, options.flops_factor, notes)
    also = {name: reader.positive(name, name, "--also-n", notes) for name in options.also_n}
    names, run = reader.runs(options.run, notes)
    points = Points(run, N, D, C, loss)
    reader.duplicates(points, named=bool(names))
    reader.one_size_each(points, names)
    reader.unfinished(points)
    reader.drop_highest(points, options.drop_highest_loss)
    reader.mixed(points, notes)
    kept = np.flatnonzero(reader.keep)
    if not len(kept):
        raise UserError(
            f"{path}: no row is left. Left out: {'; '.join(f'{len(v)}, {k}' for k, v in reader.reasons.items())}."
        )
    curves = points.take(kept)
    rows = np.arange(len(curves)) if options.every_row else curves.last_of_each()
    return Table(
        path=path,
        names=names or [f"line {line}" for line in columns.lines],
        curves=curves,
        runs=curves.take(rows),
        also_N={name: values[kept][rows] for name, values in also.items()},
        rows=reader.rows(points, names),
        excluded=[Exclusion(reason, lines) for reason, lines in reader.reasons.items()],
        notes=notes,
    )
