"""What a sweep shows while it works: a live table on a terminal, a line a run elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.live import Live
from rich.table import Table

from transformer_jax.logs import console, say
from transformer_jax.scaling.runs import Run
from transformer_jax.sweep.cost import Cost, duration

SHOWN = 16
"""Runs that the table has room for; those that matter least now are counted only."""

_STYLE = {"running": "bold", "failed": "red", "done": "green"}


class Board:
    """The state of every run, and the time left."""

    def __init__(self, rows: Sequence[Run], cost: Mapping[str, Cost], mine: Sequence[str]) -> None:
        """Begin with the rows as they stand.

        Args:
            rows: of all runs, in the order in which they are shown.
            cost: of every run.
            mine: names of the runs that this process trains.
        """
        self.rows = {row.run: row for row in rows}
        self._cost, self._mine = cost, mine
        self._began, self._since = time.monotonic(), 0.0
        self._expected = 0.0
        """Seconds that the runs ended so far were expected to take."""
        self._live: Live | None = None

    def begin(self, name: str) -> None:
        """A run begins, or goes on."""
        self.rows[name] = replace(self.rows[name], status="running")
        self._since = time.monotonic()
        self._show(f"{name}: N {self.rows[name].n:.3g}, D {self.rows[name].d:.3g}, {self.rows[name].c:.2g} FLOPs")

    def end(self, row: Run) -> None:
        """A run has ended, well or not."""
        self.rows[row.run] = row
        self._expected += self._cost[row.run].seconds or 0.0
        took = duration(time.monotonic() - self._since)
        result = f"loss {row.loss:.4f}" if row.status == "done" else f"failed: {row.excluded}"
        self._show(f"{row.run}: {result} ({took}); {self.progress()}")

    def progress(self) -> str:
        """Say how far the sweep is, and how long it will take."""
        states = [self.rows[name].status for name in self._mine]
        ended = sum(state in ("done", "failed") for state in states)
        failed = f", {states.count('failed')} failed" if "failed" in states else ""
        left = self.left()
        rest = f", about {duration(left)} left" if left else ""
        return f"{ended} of {len(states)} ended{failed}{rest}"

    def left(self) -> float | None:
        """Seconds to the end: what was expected of the runs to come, corrected by what the others took."""
        to_come = [self._cost[n].seconds for n in self._mine if self.rows[n].status not in ("done", "failed")]
        if None in to_come:
            return None
        spent = time.monotonic() - self._began
        slower = spent / self._expected if self._expected and spent > 1 else 1.0
        return sum(second for second in to_come if second is not None) * slower

    def _show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(self.table())
        else:
            say(line)

    def table(self) -> Table:
        """Draw: failed and running runs first, then the last that ended and the next to come."""
        table = Table(title=self.progress(), title_justify="left", box=None, pad_edge=False)
        for column in ("run", "N", "D", "FLOPs (6ND)", "state", "loss", "time"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right")
        rows = list(self.rows.values())
        now = next((i for i, row in enumerate(rows) if row.status == "running"), len(rows) - 1)
        near = sorted(range(len(rows)), key=lambda i: (rows[i].status not in ("running", "failed"), abs(i - now)))
        for i in sorted(near[:SHOWN]):
            row = rows[i]
            state = row.status or ""
            loss = "" if math.isnan(row.loss) else f"{row.loss:.4f}"
            took = duration(row.seconds) if row.seconds else ""
            cells = (row.run, f"{row.n:.3g}", f"{row.d:.3g}", f"{row.c:.2g}", state, loss, took)
            table.add_row(*cells, style=_STYLE.get(state, ""))
        if len(rows) > SHOWN:
            table.add_row(f"... {len(rows) - SHOWN} more", style="dim")
        return table

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the table on the terminal while the block runs."""
        if not console.is_terminal:
            yield
            return
        with Live(self.table(), console=console, refresh_per_second=2) as self._live:
            yield
        self._live = None
