"""The host loop.

The order of operations:

    open data -> check everything -> restore or initialise -> for each step n:
        1. take the next batch (Grain's threads have prepared it)
        2. launch step n; do not wait for it
        3. read the metrics of step n - 1: stop on NaN, log
        4. every eval_every steps, and at the end: evaluate on the validation split
        5. every save_every steps, at the end, and on SIGTERM or Ctrl-C: wait for step n, check it, save
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.checkpoint import Checkpoints, Restored, check_same_run, load_meta, steps_of
from transformer_jax.config import Experiment, flatten
from transformer_jax.data.labelled_data import LabelledData
from transformer_jax.data.loader import OpenData
from transformer_jax.errors import Interrupted, UserError
from transformer_jax.logs import Meter, MetricsLog, meter, read_metrics, say
from transformer_jax.objectives import means
from transformer_jax.train import Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    started_at: int
    """Step it was restored at; 0 if it was new."""
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early."""
    validation_loss: float | None
    seconds: float


def run_training(experiment: Experiment, run: Path) -> tuple[Outcome, OpenData]:
    """Train an experiment in a run folder, from its newest checkpoint if it holds one.

    Raises:
        UserError: bad settings or data, a folder that holds another experiment, NaN, or a full disk.
    """
    began = time.monotonic()
    trainer = Trainer.of(experiment)
    tokenizer_json = None
    if steps_of(run):
        stored, tokenizer_json = load_meta(run)
        check_same_run(stored, experiment, run)
    elif experiment.init.run:
        tokenizer_json = load_meta(Path(experiment.init.run))[1] or None  # an imported model may come without one
    data = experiment.data.open(experiment.model.vocab_size, tokenizer_json)
    labels = _labels(experiment, data)
    iterator = data.train_iterator(experiment.train.seed, jax.process_index(), jax.process_count())
    say(trainer.describe())
    say(data.describe())
    plan = experiment.optim.schedule
    if plan.kind in ("cosine", "linear", "wsd") and plan.steps != experiment.train.steps:
        say(
            f"note: the learning rate decays over optim.schedule.steps={plan.steps}, but the run has "
            f"train.steps={experiment.train.steps}; give both to change both"
        )
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run, trainer, data.tokenizer.to_json(), labels, say)
    restored = checkpoints.restore_or_init(iterator)
    if restored.step:
        say(f"restored step {restored.step} of {experiment.train.steps} from {run}")
    if jax.process_index() == 0:
        (run / "experiment.json").write_text(experiment.to_json() + "\n", encoding="utf-8")
        (run / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
    session = _Session(trainer, data, iterator, checkpoints, run, restored)
    try:
        with _signals() as received:
            session.train(received)
    finally:
        if session.log:
            session.log.close()
        checkpoints.close()
    outcome = Outcome(
        run,
        restored.step,
        session.step,
        received[0] if received else None,
        session.validation_loss,
        time.monotonic() - began,
    )
    return outcome, data


def _labels(experiment: Experiment, data: OpenData) -> list[str]:
    """Return the names of what the data tells apart, for which the model must have outputs."""
    if not isinstance(data, LabelledData):
        return []
    outputs, wanted = dict(flatten(experiment)).get("model.labels"), len(data.labels) or 1
    if outputs != wanted:
        told = f"{wanted} labels ({', '.join(data.labels[:8])})" if data.labels else "numbers"
        raise UserError(f"the data has {told}, but model.labels={outputs}: set model.labels={wanted}.")
    return data.labels


def train_to_the_end(experiment: Experiment, run: Path) -> None:
    """Train one of several: raises `Interrupted` where a signal ended it, so that the others are not begun."""
    outcome, _ = run_training(experiment, run)
    if outcome.stopped_by:
        raise Interrupted(outcome.stopped_by)


class _Session:
    """The moving parts of one call of `run_training`."""

    def __init__(
        self, trainer: Trainer, data: OpenData, iterator: Any, checkpoints: Checkpoints, run: Path, restored: Restored
    ) -> None:
        self.trainer, self.data, self.iterator, self.checkpoints = trainer, data, iterator, checkpoints
        self.settings = trainer.experiment.train
        self.state, self.step = restored.state, restored.step
        self.first = restored.step
        self.log = MetricsLog(run, restored.step) if jax.process_index() == 0 else None
        self.train_step, self.eval_step = trainer.train_step(), trainer.eval_step()
        self.validation_loss: float | None = None
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.tokens = 0.0
        self.began = self.since = time.monotonic()
        self.seconds_before = max((record["seconds"] for record in read_metrics(run)), default=0.0)

    def _seconds(self) -> float:
        """Seconds this run has been trained, sessions before an interruption included."""
        return self.seconds_before + time.monotonic() - self.began

    def train(self, received: list[str]) -> None:
        settings = self.settings
        with meter(self.step, settings.steps) as bar:
            while self.step < settings.steps and not received:
                batch = next(self.iterator)
                self.state, metrics = self.train_step(self.state, self.trainer.put(batch))
                self.step += 1
                self._read_pending(bar)
                self.pending = (self.step, metrics, batch["example"])
                last = self.step == settings.steps
                if last or self.step % settings.eval_every == 0:
                    self._read_pending(bar)
                    self.evaluate()
                if last or received or self.step % settings.save_every == 0:
                    self._read_pending(bar)
                    fresh = last or self.step % settings.eval_every == 0
                    loss = self.validation_loss if fresh else None
                    self.checkpoints.save(self.step, self.state, self.iterator, loss)
            self._read_pending(bar)
        if received and self.step > self.first:
            self.checkpoints.save(self.step, self.state, self.iterator, None)
            self.checkpoints.wait()

    def _read_pending(self, bar: Meter) -> None:
        """Wait for the metrics of the step launched before, stop if they are not finite, and log them."""
        if self.pending is None:
            return
        step, metrics, examples = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values = self.trainer.experiment.objective.derived(values)
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            ids = [int(i) for i in examples if i >= 0]
            raise UserError(
                f"loss is {values['loss']} and gradient norm {values['grad_norm']} at step {step}, on the examples "
                f"{ids}; {self.checkpoints.last_complete()}. Lower optim.schedule.peak or set optim.clip_norm."
            )
        self.tokens += values["tokens"]
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            rate = self.tokens / (time.monotonic() - self.since)
            self.tokens, self.since = 0.0, time.monotonic()
            if self.log:
                self.log.write(step, "train", values | {"tokens_per_second": rate, "seconds": self._seconds()})
            validation = "" if self.validation_loss is None else f"  validation {self.validation_loss:.3f}"
            bar.update(step, f"loss {values['nll']:.3f}{validation}  {rate:,.0f} tokens/s")

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
    parts = [eval_step(params, trainer.put(batch)) for batch in batches]
    sums, weights = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *jax.device_get(parts))
    values = {name: float(value) for name, value in means(sums, weights).items()}
    return trainer.experiment.objective.derived(values) | {"tokens": float(weights["tokens"])}


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGTERM and the first Ctrl-C, so that the loop can save and stop; a second Ctrl-C interrupts."""
    received: list[str] = []

    def note(number: int, _frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        say(f"{received[0]}: saving, then stopping (press Ctrl-C again to stop at once)")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
