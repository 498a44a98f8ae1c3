"""Bad steps: which loss is a spike, and what a run keeps of a step that it did not apply.

RUN/anomalies.jsonl   one line for each, with what was done about it
RUN/anomalies/STEP/   batch.npz (the global batch) and norms.json (by parameter), of the first `KEPT`
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from transformer_jax.config import TrainConfig
from transformer_jax.data.loader import Batch

KEPT = 32
"""Bad steps of a run of which batch and norms are kept; the others have their line."""

DELAY = 2
"""A step is launched before the loss of the step before it is known, so its bound goes by those up to two before."""


class SpikeBound:
    """Highest usual loss: median + k standard deviations of the last ones, both robust to spikes among them.

    It is a function of the losses alone, so every process draws it in the same place, and a resumed run too.
    """

    def __init__(self, settings: TrainConfig, losses: Iterable[tuple[int, float]] = ()) -> None:
        self._on = settings.on_spike != "ignore"
        self._window, self._deviations = settings.spike_window, settings.spike_deviations
        self.losses = [(int(step), float(loss)) for step, loss in losses]
        """(step, loss) of the last steps, to be stored with the state."""

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step in; a spike too, so that a change that stays becomes the usual."""
        if np.isfinite(loss):
            self.losses = [*self.losses, (step, loss)][-self._window - DELAY :]

    def at(self, step: int) -> float:
        """Return the bound of a step; infinite if spikes are ignored or too little is known."""
        known = [loss for earlier, loss in self.losses if earlier <= step - DELAY][-self._window :]
        if not self._on or len(known) < self._window // 2:
            return float("inf")
        median = statistics.median(known)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in known)
        return median + self._deviations * deviation


@dataclass(frozen=True)
class Anomaly:
    """A step whose update was not applied."""

    step: int
    kind: Literal["nan", "spike"]
    policy: Literal["stop", "skip", "rollback"]
    """What was done."""
    base: int
    """Newest complete checkpoint at that time; the one that was gone back to. 0: the start of the run."""
    loss: float
    grad_norm: float
    limit: float
    """Highest loss that would not have been a spike."""
    examples: list[int]
    """Numbers of the training examples in its batch."""
    key: list[int]
    """Raw data of the run's random key; the step uses `fold_in(key, step - 1)`."""
    after: Any
    """Place in the data of the batch that follows it."""

    def __str__(self) -> str:
        """Say what happened."""
        if self.kind == "nan":
            return f"loss is {self.loss:.4g} and gradient norm {self.grad_norm:.4g} at step {self.step}"
        return f"loss is {self.loss:.4g} at step {self.step}, a spike (usual is up to {self.limit:.4g})"


class AnomalyLog:
    """The bad steps of a run, in the order in which they came; written by process 0."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.anomalies = read_anomalies(run)

    def resume(self, step: int) -> None:
        """Forget what was skipped after `step`: the run comes there again."""
        self.anomalies = [a for a in self.anomalies if a.policy != "skip" or a.step <= step]

    def rollbacks(self) -> int:
        """Count how often the run went back."""
        return sum(anomaly.policy == "rollback" for anomaly in self.anomalies)

    def keeps_evidence(self) -> bool:
        """Say whether batch and norms of one more are kept."""
        return len(self.anomalies) < KEPT

    def add(self, anomaly: Anomaly, batch: Batch | None, norms: dict[str, Any] | None) -> None:
        """Write a bad step down, with its global batch and its norms where they are kept."""
        self.anomalies.append(anomaly)
        if jax.process_index():
            return
        if batch is not None:
            folder = self.run / "anomalies" / str(anomaly.step)
            folder.mkdir(parents=True, exist_ok=True)
            packed = io.BytesIO()
            np.savez_compressed(packed, **batch)  # type: ignore[arg-type]
            (folder / "batch.npz").write_bytes(packed.getvalue())
            (folder / "norms.json").write_text(json.dumps(norms, indent=1) + "\n", encoding="utf-8")
        lines = "".join(json.dumps(_plain(asdict(a))) + "\n" for a in self.anomalies)
        (self.run / "anomalies.jsonl").write_text(lines, encoding="utf-8")


def read_anomalies(run: Path) -> list[Anomaly]:
    """Read `anomalies.jsonl` of a run; empty if nothing happened."""
    path = run / "anomalies.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    numbers = ("loss", "grad_norm", "limit")
    return [Anomaly(**line | {name: float(line[name]) for name in numbers}) for line in lines]


def place_after(step: int, anomalies: Iterable[Anomaly]) -> Any:
    """Return the place in the data from which a run goes on after `step`, if it once went back there."""
    places = [a.after for a in anomalies if a.policy == "rollback" and a.base == step]
    return places[-1] if places else None


def read_batch(run: Path, step: int) -> Batch | None:
    """Read the batch that was kept of a step, if it was."""
    path = run / "anomalies" / str(step) / "batch.npz"
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return dict(arrays)


def global_batch(batch: Batch) -> Batch:
    """Join the rows of all processes."""
    if jax.process_count() == 1:
        return batch

    def join(rows: Any) -> Any:
        # As bytes: JAX would cut the 64 bits of the example numbers in half.
        packed = np.ascontiguousarray(rows)[..., None].view(np.uint8)
        return np.asarray(multihost_utils.process_allgather(packed, tiled=True)).view(rows.dtype)[..., 0]

    return {name: join(rows) for name, rows in batch.items()}


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Write what is not finite as text: JSON has no word for it."""
    return {
        name: str(value) if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in record.items()
    }
