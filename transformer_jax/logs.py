"""What a run says while it works: metrics.jsonl, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from transformer_jax.storage import is_remote, upload

BETWEEN_UPLOADS = 30.0
"""Seconds after which the metrics of a run in a bucket are brought there again."""

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything meant for people goes to standard error; standard output carries results."""


def say(message: str) -> None:
    """Print one line for people."""
    console.print(message, markup=False)


class MetricsLog:
    """Metrics by step, in `metrics.jsonl` and as TensorBoard events.

    Opened at a step, it forgets what an interrupted run wrote after that step, so that the file of a killed and
    resumed run reads like that of an uninterrupted one. A bucket cannot append: there both are written on this
    machine, and uploaded whole every `BETWEEN_UPLOADS` seconds, at every checkpoint and at the end.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._run = run
        self._scratch = tempfile.TemporaryDirectory() if is_remote(run) else None
        self._folder = Path(self._scratch.name) if self._scratch else run
        self._uploaded = time.monotonic()
        path = self._folder / "metrics.jsonl"
        kept = [record for record in read_metrics(run) if record["step"] <= step]
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        if time.monotonic() - self._uploaded > BETWEEN_UPLOADS:
            self.upload()

    def upload(self) -> None:
        """Bring both files to the bucket, if the run is in one."""
        if self._scratch:
            self._events.flush()
            upload(self._folder, self._run)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Flush both files."""
        self._file.close()
        self._events.close()
        self.upload()
        if self._scratch:
            self._scratch.cleanup()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a run; a last line cut short by a kill is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Meter:
    """Progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, progress: Progress, first: int, total: int, seconds_between_lines: float = 10.0) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task("", total=total, completed=first, status="compiling")
        self._between, self._last_line = seconds_between_lines, time.monotonic()
        self._began, self._first = time.monotonic(), first

    def update(self, step: int, status: str) -> None:
        """Show that `step` steps are done."""
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        if not console.is_terminal and now - self._last_line >= self._between:
            self._last_line = now
            left = (now - self._began) / max(step - self._first, 1) * (self._total - step)
            say(f"step {step}/{self._total}  {status}  {left / 60:.1f} min left")


@contextmanager
def meter(first: int, total: int) -> Iterator[Meter]:
    """Show progress from step `first` to `total` while the block runs."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield Meter(progress, first, total)


def print_json(value: Any) -> None:
    """Print one JSON object, and nothing else, on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
