"""Training, from settings to a finished run: open data, check everything, restore or initialise, train."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax

from transformer_jax import compilation_cache
from transformer_jax.checkpoint import Checkpoints, check_same_run, load_meta, steps_of
from transformer_jax.config import Experiment, flatten
from transformer_jax.data.labelled_data import LabelledData
from transformer_jax.data.loader import OpenData
from transformer_jax.distributed import together
from transformer_jax.errors import Interrupted, UserError
from transformer_jax.logs import say
from transformer_jax.preemption import stops
from transformer_jax.session import Session
from transformer_jax.storage import run_path
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
        tokenizer_json = load_meta(run_path(experiment.init.run))[1] or None  # an imported model may come without one
    data = experiment.data.open(experiment.model.vocab_size, tokenizer_json)
    labels = _labels(experiment, data)
    iterator = data.train_iterator(experiment.train.seed, jax.process_index(), jax.process_count())
    say(trainer.describe())
    say(data.describe())
    if kept := compilation_cache.where():
        say(f"compiled programs are kept in {kept}")
    run.mkdir(parents=True, exist_ok=True)
    tokenizer_json = data.tokenizer.to_json() if data.tokenizer else ""
    checkpoints = Checkpoints(run, trainer, tokenizer_json, labels, say)
    with together(checkpoints.last_complete):
        restored = checkpoints.restore_or_init(iterator)
    if restored.step:
        say(f"restored step {restored.step} of {experiment.train.steps} from {run}")
    if jax.process_index() == 0:
        (run / "experiment.json").write_text(experiment.to_json() + "\n", encoding="utf-8")
        if tokenizer_json:
            (run / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    session = Session(trainer, data, iterator, checkpoints, run, restored)
    try:
        with stops() as asked, together(checkpoints.last_complete):
            session.train(asked)
    finally:
        if session.log:
            session.log.close()
        checkpoints.close()
    outcome = Outcome(
        run,
        restored.step,
        session.step,
        asked.name,
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
