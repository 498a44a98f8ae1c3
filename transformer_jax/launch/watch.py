"""From a job to its end: launch, look after it, ask again after a preemption, stop at the spend cap.

The machines train without being watched. What only a watcher does is to ask for another slice after a preemption;
the spend cap is also kept by the machines themselves, as a time limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformer_jax.errors import UserError
from transformer_jax.launch.command import Command, execute, execute_all
from transformer_jax.launch.job import Job, State
from transformer_jax.launch.local import Local, run_here
from transformer_jax.launch.store import Record, now
from transformer_jax.logs import say

PATIENCE = 20
"""Questions in a row that may stay without an answer."""

SLACK = 360
"""Seconds behind the spend cap in which the machines, which keep it themselves, save and end before we stop them."""


def dry_run(job: Job, steps: list[Command]) -> str:
    """Return a shell script that does what `launch` would do, with a comment before every step."""
    head = [f"# {line}" for line in job.backend.notes(job)]
    parts = ["\n".join(head), *(step.script() for step in steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def ready(record: Record) -> Job:
    """Return the job of a record as it is launched now: with a name for this life, and the seconds it may last.

    Raises:
        UserError: earlier launches have spent all that the job may cost.
    """
    most = record.job.budget.most
    if most and record.cost >= most:
        raise UserError(f"{record.job.name} has cost {record.cost:,.2f} already, and may cost {most:,.2f}: --max-cost.")
    attempt = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now()))
    seconds = record.job.budget.seconds_left(record.job.backend.chips, record.cost)
    return replace(record.job, attempt=attempt, seconds=seconds)


def start(record: Record, every: float = 30.0, *, again: bool = False) -> Record:
    """Take every step of the launch, or of asking again after a preemption.

    Raises:
        UserError: a step failed; the record says so. Only the last step asks for machines.
    """
    job = ready(record)
    job.check()
    record = replace(record, job=job, phase="queued", detail="", launched=record.launched or now())
    record.save()
    log = Path(job.folder) / "launch.log"
    steps = job.backend.again(job) if again else job.backend.commands(job)
    try:
        printed = execute_all(steps, log, every)
    except UserError as error:
        replace(record, phase="failed", detail=str(error)).save()
        raise
    except KeyboardInterrupt:  # whether the last step took effect, only the backend knows
        replace(record, phase="unknown", detail="interrupted while it was launched").save()
        raise
    record = replace(record, handle=job.backend.handle_of(printed))
    record.save()
    return record


def run_local(record: Record) -> int:
    """Run a local job to its end in this process; returns its exit code."""
    backend = record.job.backend
    assert isinstance(backend, Local)
    record = replace(record, handle=str(os.getpid()), launched=now()).seen(State("running"), now())
    record.save()
    code = run_here(record.job, backend)
    record.seen(backend.state(record.job, record.handle), now()).save()
    return code


def look(record: Record) -> Record:
    """Ask the backend how a job does, and keep what it says."""
    if record.over:
        return record
    record = record.seen(record.job.backend.state(record.job, record.handle), now())
    record.save()
    return record


def follow(record: Record, retries: int, every: float = 30.0, sleep: Callable[[float], None] = time.sleep) -> Record:
    """Look after a job until it ends; returns its last record.

    It is launched again after a preemption, at most `retries` times, and stopped when its spend cap is reached.
    """
    said, silent = "", 0
    while True:
        try:
            record, silent = look(record), 0
        except UserError as error:  # a laptop loses its network; the job does not notice
            silent += 1
            if silent == PATIENCE:
                raise
            if silent == 1:
                say(f"{record.job.name}: no answer ({error}); asking again")
            sleep(every)
            continue
        line = f"{record.job.name}: {record.phase}{f' ({record.detail})' if record.detail else ''}"
        if line != said:
            say(line)
            said = line
        budget = record.job.budget
        most, slack = budget.most, budget.cost(record.job.backend.chips, SLACK)
        if record.phase == "running" and most and record.cost >= most + slack:
            say(f"{record.job.name}: the spend cap of {most:,.2f} is reached; stopping")
            return end(record, State("stopped", "the spend cap is reached"))
        if record.over:
            return end(record, State(record.phase, record.detail))
        if record.phase == "preempted":
            if record.preemptions >= retries:
                return end(record, State("failed", f"taken away, and launched again {retries} times already"))
            if most and record.cost >= most:
                return end(record, State("stopped", "the spend cap is reached"))
            say(f"{record.job.name}: asking for another slice; training will go on from its last checkpoint")
            record = start(replace(record, preemptions=record.preemptions + 1), every, again=True)
            continue
        sleep(every)


def end(record: Record, state: State) -> Record:
    """Give back what a job holds, and keep how it ended."""
    job = record.job
    steps: list[Command] = []
    if record.phase in ("running", "queued"):
        steps = job.backend.stop(job, record.handle)
    elif not job.keep or record.phase == "preempted":
        steps = job.backend.finish(job)
    record = record.seen(state, now())
    record.save()
    errors = []
    for step in steps:  # whatever goes wrong with one, the machines must be given back
        say(step.purpose)
        try:
            execute(step, Path(job.folder) / "launch.log")
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return record
