"""A kept batch, run again on the state that met it: where what is not finite arises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.anomalies import Anomaly, SpikeBound, place_after, read_anomalies, read_batch
from transformer_jax.checkpoint import BROKEN, read_state, steps_of, warm_start
from transformer_jax.config import Experiment, MeshConfig, read_experiment
from transformer_jax.diagnosis import Diagnosis, diagnose, first_nan
from transformer_jax.errors import UserError
from transformer_jax.logs import meter, say
from transformer_jax.sharding import AXES
from transformer_jax.train import Guard, Trainer, TrainState


@dataclass(frozen=True)
class Replay:
    """What came out of a kept batch this time."""

    anomaly: Anomaly
    """What the run saw."""
    checkpoint: int
    """Step whose state was read; 0: the start of the run."""
    diagnosis: Diagnosis
    first_nan: str
    """Operation and line that make the first NaN; empty if none does."""

    def to_json(self) -> dict[str, Any]:
        """Return one JSON-able object."""
        layers = {name: norms.to_json() for name, norms in self.diagnosis.layers().items()}
        return {
            "step": self.anomaly.step,
            "kind": self.anomaly.kind,
            "policy": self.anomaly.policy,
            "then": {"loss": _number(self.anomaly.loss), "grad_norm": _number(self.anomaly.grad_norm)},
            "examples": self.anomaly.examples,
            "checkpoint": self.checkpoint,
            **self.diagnosis.to_json(),
            "layers": layers,
            "first_nan": self.first_nan or None,
        }


def replay(run: Path, step: int | None = None, experiment: Experiment | None = None) -> Replay:
    """Run the kept batch of a bad step again, without changing the run.

    The state is that of the newest checkpoint before it, with the steps in between trained again.

    Args:
        run: the run folder.
        step: the bad step; the last one unless given.
        experiment: that of the run, perhaps with another mesh or precision.

    Raises:
        UserError: nothing was kept of that step, or the checkpoint before it is gone.
    """
    anomalies = read_anomalies(run)
    if not anomalies:
        raise UserError(f"{run} has met no NaN and no spike: it has no anomalies.jsonl.")
    step = anomalies[-1].step if step is None else step
    batch = read_batch(run, step)
    examples = [] if batch is None else [int(i) for i in batch["example"] if i >= 0]
    same = [i for i, a in enumerate(anomalies) if a.step == step and a.examples == examples]
    if batch is None or not same:
        kept = sorted({a.step for a in anomalies if read_batch(run, a.step) is not None})
        raise UserError(f"{run} keeps no batch of step {step}; it has those of {', '.join(map(str, kept)) or 'none'}.")
    trainer = Trainer.of(_at_hand(experiment or read_experiment(run / "experiment.json")))
    checkpoint, state = _state_before(run, step, anomalies[: same[-1] + 1], trainer)
    diagnosis = diagnose(trainer, state, batch)
    sound = math.isfinite(diagnosis.loss) and math.isfinite(diagnosis.grad_norm)
    return Replay(anomalies[same[-1]], checkpoint, diagnosis, "" if sound else first_nan(trainer, state, batch))


def _at_hand(experiment: Experiment) -> Experiment:
    """Take all devices as copies of the model where the mesh of the run does not fit them."""
    sizes = [getattr(experiment.mesh, axis) for axis in AXES]
    if -1 in sizes or math.prod(sizes) == jax.device_count():
        return experiment
    say(f"the run had {math.prod(sizes)} devices, here are {jax.device_count()}: last digits may differ")
    return replace(experiment, mesh=MeshConfig())


def _state_before(run: Path, step: int, anomalies: Sequence[Anomaly], trainer: Trainer) -> tuple[int, TrainState]:
    """Return the state that met the last of `anomalies`, at `step`, and the checkpoint that it was made from."""
    base = anomalies[-1].base
    for checkpoint in sorted((s for s in steps_of(run) if s <= base), reverse=True):
        try:
            state, meta = read_state(run, checkpoint, trainer)
        except BROKEN as error:
            say(f"checkpoint {checkpoint} cannot be read ({' '.join(str(error).split())[:200]})")
            continue
        return checkpoint, _trained(state, checkpoint, step - 1, meta, anomalies[:-1], trainer, run)
    if base:
        raise UserError(
            f"the state before step {step} cannot be made again: checkpoint {base} of {run} is gone; "
            "a larger train.keep keeps more of them."
        )
    state = trainer.init()
    if trainer.experiment.init.run:
        state = warm_start(trainer, state, say)
    return 0, _trained(state, 0, step - 1, {}, anomalies[:-1], trainer, run)


def _trained(
    state: TrainState,
    step: int,
    end: int,
    meta: dict[str, Any],
    anomalies: Sequence[Anomaly],
    trainer: Trainer,
    run: Path,
) -> TrainState:
    """Train from `step` to `end` as the run did, with its data, its bounds and the places to which it had moved."""
    if step == end:
        return state
    settings, config = trainer.experiment.train, trainer.experiment
    data = config.data.open(config.model.vocab_size, (run / "tokenizer.json").read_text(encoding="utf-8"))
    iterator, train_step = data.train_iterator(settings.seed), trainer.train_step()
    if meta:
        iterator.set_state(meta["data"])
    bound = SpikeBound(settings, meta.get("losses", ()))
    say(f"training again from step {step} to {end}")
    with meter(step, end) as bar:
        while step < end:
            if (place := place_after(step, anomalies)) is not None:
                iterator.set_state(place)
            step += 1
            state, metrics = train_step(
                state, trainer.put(next(iterator)), Guard(np.float32(bound.at(step)), np.bool_(True))
            )
            bound.add(step, float(metrics["loss"]))
            bar.update(step, f"loss {float(metrics['loss']):.3f}")
    return state


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
