"""One session of a run, from the step at which it was restored.

For each step n:
    1. take the next batch (Grain's threads have prepared it)
    2. launch step n; do not wait for it
    3. read the metrics of step n - 1 and log them; if it was bad (NaN, a spike), neither it nor step n has changed the
       state: keep what shows why, then stop, skip it, or go back
    4. every eval_every steps, and at the end: evaluate on the validation split
    5. every save_every steps, at the end, and on SIGTERM or Ctrl-C on any host: wait for step n, check it, save
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from transformer_jax.anomalies import Anomaly, AnomalyLog, SpikeBound, global_batch, place_after
from transformer_jax.checkpoint import Checkpoints, Restored, steps_of
from transformer_jax.data.loader import Batch, OpenData
from transformer_jax.diagnosis import diagnose
from transformer_jax.distributed import advance
from transformer_jax.errors import UserError
from transformer_jax.logs import Meter, MetricsLog, meter, read_metrics, say
from transformer_jax.objectives import means
from transformer_jax.preemption import Stops
from transformer_jax.sharding import replicated
from transformer_jax.train import Guard, Trainer


@dataclass(frozen=True)
class _Launched:
    """A step whose metrics nobody has read yet."""

    step: int
    batch: Batch
    before: Any
    """Place in the data of its batch."""
    after: Any
    """Place in the data behind it."""
    limit: float
    metrics: Any


class Session:
    """The moving parts of a run: state, step, place in the data, what is launched."""

    def __init__(
        self, trainer: Trainer, data: OpenData, iterator: Any, checkpoints: Checkpoints, run: Path, restored: Restored
    ) -> None:
        self.trainer, self.data, self.iterator, self.checkpoints, self.run = trainer, data, iterator, checkpoints, run
        self.settings = trainer.experiment.train
        self.train_step, self.eval_step = trainer.train_step(), trainer.eval_step()
        self.anomalies = AnomalyLog(run)
        self.first = restored.step
        self.log: MetricsLog | None = None
        self.seconds_before = max((record["seconds"] for record in read_metrics(run)), default=0.0)
        self.validation_loss: float | None = None
        self.began = time.monotonic()
        self._start_from(restored)

    def _start_from(self, restored: Restored) -> None:
        """Stand at a restored step, and forget what came after it."""
        self.state, self.step = restored.state, restored.step
        self.bound = SpikeBound(self.settings, restored.losses)
        self.anomalies.resume(restored.step)
        if self.log:
            self.log.close()
        self.log = MetricsLog(self.run, restored.step) if jax.process_index() == 0 else None
        self._settled()
        self.tokens, self.since = 0.0, time.monotonic()

    def _stand_at(self, step: int, place: Any) -> None:
        """Take the state at hand for that after `step`, and the next batch from `place`; nothing is launched."""
        self.step = step
        self.state = replace(self.state, step=jax.device_put(np.int32(step), replicated(self.trainer.mesh)))
        self.iterator.set_state(place)
        self._settled()

    def _settled(self) -> None:
        self.pending: _Launched | None = None
        self.applied = jax.device_put(np.bool_(True), replicated(self.trainer.mesh))

    def _seconds(self) -> float:
        """Seconds this run has been trained, sessions before an interruption included."""
        return self.seconds_before + time.monotonic() - self.began

    def train(self, asked: Stops) -> None:
        """Train to the last step, or until asked to stop; then the state is saved."""
        settings = self.settings
        with meter(self.step, settings.steps) as bar:
            while self.step < settings.steps:
                if asked.now():
                    self._settle(bar)
                    break
                launched = self._launch()
                if not self._settle(bar):
                    continue
                self.pending, step = launched, self.step
                evaluates, saves = (
                    step == settings.steps or step % every == 0 for every in (settings.eval_every, settings.save_every)
                )
                if (evaluates or saves) and not self._settle(bar) and self.step != step:
                    continue
                if evaluates:
                    self.evaluate()
                if saves:
                    self._save(self.validation_loss if evaluates else None)
        if asked.name and self.step > self.first:
            self._save(None)
            self.checkpoints.wait()

    def _save(self, validation_loss: float | None) -> None:
        if self.log:
            self.log.upload()
        losses = [(step, loss) for step, loss in self.bound.losses if step <= self.step]
        self.checkpoints.save(self.step, self.state, self.iterator, validation_loss, losses)

    def _launch(self) -> _Launched:
        """Launch the next step on the next batch."""
        if (place := place_after(self.step, self.anomalies.anomalies)) is not None:
            self.iterator.set_state(place)
        before, limit = self.iterator.get_state(), self.bound.at(self.step + 1)
        batch = next(self.iterator)
        guard = Guard(np.float32(limit), self.applied)
        advance()
        self.state, metrics = self.train_step(self.state, self.trainer.put(batch), guard)
        self.applied = metrics.pop("applied")
        self.step += 1
        return _Launched(self.step, batch, before, self.iterator.get_state(), limit, metrics)

    def _settle(self, bar: Meter) -> bool:
        """Wait for the step launched before, and log it; False if it was bad, and the run now stands elsewhere."""
        if self.pending is None:
            return True
        launched, self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(launched.metrics).items()}
        step, loss = launched.step, values["loss"]
        self.bound.add(step, loss)
        if not (np.isfinite(loss) and np.isfinite(values["grad_norm"])):
            self._respond("nan", launched, values)
            return False
        if np.float32(loss) > np.float32(launched.limit):
            self._respond("spike", launched, values)
            return False
        values = self.trainer.experiment.objective.derived(values)
        self.tokens += values["tokens"]
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            rate = self.tokens / (time.monotonic() - self.since)
            self.tokens, self.since = 0.0, time.monotonic()
            if self.log:
                self.log.write(step, "train", values | {"tokens_per_second": rate, "seconds": self._seconds()})
            validation = "" if self.validation_loss is None else f"  validation {self.validation_loss:.3f}"
            bar.update(step, f"loss {values['nll']:.3f}{validation}  {rate:,.0f} tokens/s")
        return True

    def _respond(self, kind: Literal["nan", "spike"], bad: _Launched, values: dict[str, float]) -> None:
        """Keep what shows why a step was bad, and do what the settings say; every process comes to the same.

        Raises:
            UserError: the run stops here, with the state before that step saved.
        """
        policy = self.settings.on_nan if kind == "nan" else self.settings.on_spike
        if policy == "ignore" or (policy == "rollback" and self.anomalies.rollbacks() >= self.settings.max_rollbacks):
            policy = "stop"
        # Neither that step nor the one launched behind it changed more than the count.
        self._stand_at(bad.step - 1, bad.before)
        batch, norms = global_batch(bad.batch), None
        if kept := self.anomalies.keeps_evidence():
            norms = diagnose(self.trainer, self.state, bad.batch).to_json()
        if policy == "stop" and self.step:
            self._save(None)
        self.checkpoints.wait()
        anomaly = Anomaly(
            step=bad.step,
            kind=kind,
            policy=policy,
            base=max(steps_of(self.run), default=0),
            loss=values["loss"],
            grad_norm=values["grad_norm"],
            limit=bad.limit,
            examples=[int(i) for i in batch["example"] if i >= 0],
            key=np.asarray(self.state.key).tolist(),
            after=bad.after,
        )
        if policy == "skip":
            self._stand_at(bad.step, bad.after)
        if policy == "rollback":
            del self.state  # there may be no room for two
            self._start_from(self.checkpoints.restore_or_init(self.iterator))
            anomaly = replace(anomaly, base=self.step)
        self.anomalies.add(anomaly, batch if kept else None, norms)
        if policy == "stop":
            raise UserError(self._stopped(anomaly))
        done = "skipped" if policy == "skip" else f"back to step {self.step}; the data goes on behind that batch"
        say(f"{anomaly}; {done}")

    def _stopped(self, bad: Anomaly) -> str:
        """Return what to tell of a bad step that ended the run."""
        shown = ", ".join(map(str, bad.examples[:8])) + (", ..." if len(bad.examples) > 8 else "")
        most = self.settings.max_rollbacks
        tried = f" after {most} rollback(s)" if self.anomalies.rollbacks() >= most > 0 else ""
        return (
            f"{bad}, on {len(bad.examples)} examples ({shown}){tried}; {self.checkpoints.last_complete()}. "
            f"`tjax replay {self.run} {bad.step}` shows where it arises; --train.on-{bad.kind} skip goes on without "
            "it; a lower optim.schedule.peak or an optim.clip_norm may prevent it."
        )

    def evaluate(self) -> None:
        """Score the validation split by teacher forcing; its "nll" decides which checkpoint is best."""
        batches = self.data.validation_batches(jax.process_index(), jax.process_count())
        values = evaluate_loss(self.trainer, self.eval_step, self.state.params, batches)
        self.validation_loss = values["nll"]
        if self.log:
            self.log.write(self.step, "validation", values | {"seconds": self._seconds()})
        self.tokens, self.since = 0.0, time.monotonic()


def evaluate_loss(trainer: Trainer, eval_step: Any, params: Any, batches: Any) -> dict[str, float]:
    """Return the objective's sums over all batches, divided by their weight."""
    parts = []
    for batch in batches:
        advance()
        parts.append(eval_step(params, trainer.put(batch)))
    sums, weights = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *jax.device_get(parts))
    values = {name: float(value) for name, value in means(sums, weights).items()}
    return trainer.experiment.objective.derived(values) | {"tokens": float(weights["tokens"])}
