"""Runs that begin alike are trained once up to where they part: one trunk, and branches off it (Haegele 2024).

Two experiments that differ only in when their learning rate begins to fall compute the same steps before. So the one
that keeps its rate longest is the trunk; at the step at which another begins to fall, that one's run folder is made
from the trunk's checkpoint (parameters, optimizer, random key, place in the data) and trained to its own end. The
result is the same, to the bit, as if it had been trained from the start.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformer_jax.checkpoint import steps_of
from transformer_jax.config import Experiment
from transformer_jax.logs import read_metrics
from transformer_jax.optim import cooldown_start


@dataclass(frozen=True)
class Branch:
    """An experiment, and how many of its first steps it shares with the trunk."""

    experiment: Experiment
    shared: int


@dataclass(frozen=True)
class Family:
    """Experiments that begin alike: branches in the order in which they leave, the trunk last (it shares nothing)."""

    branches: tuple[Branch, ...]

    @property
    def trunk(self) -> Experiment:
        """The experiment that keeps its learning rate longest."""
        return self.branches[-1].experiment

    @property
    def name(self) -> str | None:
        """Name of the trunk; None for a single run."""
        return self.trunk.name if len(self.branches) > 1 else None


def stable_steps(experiment: Experiment) -> int:
    """Count the steps before the learning rate begins to fall; 0 for a schedule that its end shapes throughout."""
    schedule = experiment.optim.schedule
    if schedule.kind == "constant":
        return experiment.train.steps
    if schedule.kind != "wsd":
        return 0
    return min(cooldown_start(schedule), experiment.train.steps)


def families(experiments: Sequence[Experiment]) -> list[Family]:
    """Group experiments that begin alike, in the order of their first appearance."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        alike = _beginning(experiment) if stable_steps(experiment) else f"alone: {experiment.name}"
        groups.setdefault(alike, []).append(experiment)
    found = []
    for members in groups.values():
        ordered = sorted(members, key=lambda e: (stable_steps(e), e.train.steps))
        found.append(Family((*(Branch(e, stable_steps(e)) for e in ordered[:-1]), Branch(ordered[-1], 0))))
    return found


def _beginning(experiment: Experiment) -> str:
    """Return everything that determines the steps before the learning rate falls."""
    schedule = replace(experiment.optim.schedule, kind="constant", steps=0, final=0.0, decay_fraction=0.0)
    optim = replace(experiment.optim, schedule=schedule)
    train = replace(experiment.train, steps=1, log_every=1, eval_every=1, save_every=1, keep=1)
    return replace(experiment, name="", optim=optim, train=train).to_json()


def fork(trunk: Path, experiment: Experiment, shared: int, run: Path) -> int:
    """Make the run folder of a branch from the trunk's newest checkpoint that both share, unless it exists.

    Returns:
        The step that the new folder begins at; 0 if there was nothing to share.
    """
    step = max((step for step in steps_of(trunk) if step <= shared), default=0)
    if steps_of(run) or not step:
        return 0
    scratch = run.with_name(f"{run.name}.incomplete")
    for leftover in (scratch, run):
        shutil.rmtree(leftover, ignore_errors=True)
    saved = scratch / "checkpoints" / str(step)
    shutil.copytree(trunk / "checkpoints" / str(step), saved)
    meta = saved / "meta" / "metadata"
    stored = json.loads(meta.read_text(encoding="utf-8")) | {"experiment": experiment.to_json()}
    meta.write_text(json.dumps(stored), encoding="utf-8")
    records = [json.dumps(record) + "\n" for record in read_metrics(trunk) if record["step"] <= step]
    (scratch / "metrics.jsonl").write_text("".join(records), encoding="utf-8")
    scratch.rename(run)
    return step
