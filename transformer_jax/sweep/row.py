"""A run as a row of the table, and as rows of its training curve: typed, with provenance."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformer_jax.config import Experiment
from transformer_jax.data.cache import fingerprint
from transformer_jax.hardware import utilisation
from transformer_jax.logs import read_metrics
from transformer_jax.provenance import provenance
from transformer_jax.scaling.runs import Run
from transformer_jax.storage import whole
from transformer_jax.sweep.counts import CONVENTION, counts

FILE = "row.json"
"""In the folder of a run that has ended: its row."""


def planned(experiment: Experiment, trunk: str | None) -> Run:
    """Return what is known of a run before it begins; its loss is NaN."""
    found, schedule = counts(experiment), experiment.optim.schedule
    shape = f" {schedule.steps}, {schedule.decay_fraction:g} of it falling" if schedule.kind == "wsd" else ""
    return Run(
        run=experiment.name,
        n=found.N,
        d=found.D,
        c=found.six_nd,
        loss=float("nan"),
        n_total=found.N_total,
        n_non_embedding=found.N_non_embedding,
        n_head=found.N_head,
        c_exact=found.exact,
        c_convention=CONVENTION,
        trunk=trunk,
        seed=experiment.train.seed,
        batch=found.batch,
        learning_rate=schedule.peak,
        schedule=schedule.kind + shape,
        config=fingerprint(experiment.to_json()),
        status="planned",
    )


def finished(row: Run, experiment: Experiment, run: Path, data: dict[str, Any]) -> Run:
    """Complete the row of a run that has reached its end, from what it has logged.

    Args:
        row: as planned.
        experiment: what was trained.
        run: its folder.
        data: the facts of its data (`OpenData.summary`).
    """
    records, where = read_metrics(run), provenance()
    train = [r for r in records if r["split"] == "train"]
    late = [r["nll"] for r in train if r["step"] > 0.9 * experiment.train.steps]
    last = [r for r in records if r["split"] == "validation"][-1]
    rate = statistics.median(r["tokens_per_second"] for r in train)
    unique = _unique(data)
    speed = rate * (row.c_exact or 0) / row.d
    return replace(
        row,
        loss=last["nll"],
        train_loss=statistics.mean(late) if late else None,
        d_unique=None if unique is None else min(unique, row.d),
        tokenizer=data.get("tokenizer"),
        data=data.get("fingerprint"),
        code=where["commit"],
        device=f"{where['devices']} x {where['device']}",
        seconds=round(last["seconds"], 3),
        mfu=utilisation(speed, where["device"], where["devices"], experiment.compute.dtype),
        status="done",
    )


def _unique(data: dict[str, Any]) -> int | None:
    """Return the tokens of an epoch, where the data counts them."""
    for name in ("targets", "tokens"):
        if isinstance(by_split := data.get(name), dict) and "train" in by_split:
            return int(by_split["train"])
    return None


def failed(row: Run, reason: str) -> Run:
    """Complete the row of a run that could not be trained."""
    where = provenance()
    device = f"{where['devices']} x {where['device']}"
    return replace(row, status="failed", excluded=reason, code=where["commit"], device=device)


def curve(row: Run, run: Path) -> list[Run]:
    """Return a row for every validation of a run that has ended, the last of them its own."""
    if row.status != "done":
        return [row]
    records = [r for r in read_metrics(run) if r["split"] == "validation"]
    steps = records[-1]["step"]

    def at(record: dict[str, Any]) -> Run:
        share = record["step"] / steps
        exact = None if row.c_exact is None else round(row.c_exact * share)
        return replace(
            row, d=round(row.d * share), c=round(row.c * share), c_exact=exact, loss=record["nll"],
            train_loss=None, seconds=round(record["seconds"], 3),
        )  # fmt: skip

    return [*(at(record) for record in records[:-1] if record["step"] < steps), row]


def write_row(row: Run, run: Path) -> None:
    """Keep the row of a run that has ended in its folder."""
    run.mkdir(parents=True, exist_ok=True)
    with whole(run / FILE) as scratch:
        scratch.write_text(json.dumps(asdict(row), indent=2) + "\n", encoding="utf-8")


def forget_row(run: Path) -> None:
    """Remove the row of a run, so that it counts as not ended."""
    (run / FILE).unlink(missing_ok=True)


def read_row(run: Path) -> Run | None:
    """Read the row of a run; None if it has not ended."""
    path = run / FILE
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    known = {item.name for item in fields(Run)}
    return Run(**{name: value for name, value in stored.items() if name in known})
