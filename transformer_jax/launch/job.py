"""A job: one command on many hosts, and the backend that runs it there."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformer_jax.errors import UserError
from transformer_jax.launch.command import Command
from transformer_jax.launch.source import Source

Phase = Literal["queued", "running", "preempted", "stopped", "failed", "done", "unknown"]


@dataclass(frozen=True)
class State:
    """What the backend says of a job."""

    phase: Phase
    detail: str = ""
    code: int = 0
    """Exit code of the first process that failed."""


@dataclass(frozen=True)
class Budget:
    """What a job may cost."""

    price: float = 0.0
    """Price of one chip for an hour; 0 if nobody said."""
    most: float = 0.0
    """Spend at which the job is stopped; 0 for no cap."""

    def check(self) -> None:
        """Raise `UserError` for a cap without a price, or a negative number."""
        if self.price < 0 or self.most < 0:
            raise UserError("--price and --max-cost cannot be negative.")
        if self.most and not self.price:
            raise UserError("--max-cost needs the price of a chip for an hour: --price (it depends on your contract).")

    def cost(self, chips: int, seconds: float) -> float:
        """Price of `chips` for so long."""
        return self.price * chips * seconds / 3600

    def seconds_left(self, chips: int, spent: float) -> int:
        """Seconds that `chips` may still run after `spent` was spent; 0 if there is no cap."""
        return max(1, int((self.most - spent) / (self.price * chips) * 3600)) if self.most else 0


@dataclass(frozen=True)
class Job:
    """Everything that determines what is launched."""

    name: str
    command: tuple[str, ...]
    """What every process runs, after its environment is there."""
    backend: Backend
    folder: str
    """Where the files of this launch lie, on this machine."""
    source: Source | None = None
    """The working tree that is carried along; None where the processes run in it."""
    attempt: str = "1"
    """Names one life of the job; another begins after each preemption."""
    seconds: int = 0
    """How long this life may last under the spend cap; 0 for no limit."""
    setup: str = ""
    """Shell command that installs the tree, instead of the usual one."""
    env: Mapping[str, str] = field(default_factory=dict)
    env_file: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variable -> name of the stored secret that it gets."""
    budget: Budget = Budget()
    keep: bool = False
    """Leave the machines when the job has ended."""

    def check(self) -> None:
        """Raise `UserError` for what cannot be launched, before anything is."""
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--job {self.name}: a name has up to 40 lower-case letters, digits and hyphens, a letter first."
            )
        self.budget.check()
        self.backend.check(self)


class Backend(abc.ABC):
    """Where a job runs. Everything but `state` is a pure function of the job."""

    @property
    @abc.abstractmethod
    def chips(self) -> int:
        """Accelerators that are paid for."""

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """Processes, which `logs` numbers from 0."""

    @property
    def hosts(self) -> int:
        """Machines."""
        return self.workers

    @property
    @abc.abstractmethod
    def devices(self) -> int | None:
        """Length of `jax.devices()` there, if it is known beforehand."""

    @property
    @abc.abstractmethod
    def where(self) -> str:
        """One line for `tjax jobs`: what and where."""

    @abc.abstractmethod
    def check(self, job: Job) -> None:
        """Raise `UserError` for settings that cannot be."""

    @abc.abstractmethod
    def commands(self, job: Job) -> list[Command]:
        """Steps from nothing to a running job."""

    def handle_of(self, printed: str) -> str:
        """Find what names the job to the backend in what the last step printed; "" where its own name does."""
        return ""

    def again(self, job: Job) -> list[Command]:
        """Steps after a preemption; the files of the first launch are there."""
        raise UserError(f"{job.name}: {self.where} restarts its jobs itself.")

    @abc.abstractmethod
    def state(self, job: Job, handle: str) -> State:
        """Ask how the job does; `handle` is what the last step of the launch printed."""

    @abc.abstractmethod
    def logs(self, job: Job, handle: str, worker: str, lines: int, follow: bool, *, over: bool = False) -> Command:
        """Print what a worker, or "all", wrote; `over` says that the job has ended."""

    @abc.abstractmethod
    def ssh(self, job: Job, handle: str, worker: str) -> Command:
        """Open a shell on a worker."""

    @abc.abstractmethod
    def stop(self, job: Job, handle: str) -> list[Command]:
        """Let the processes save, then give everything back."""

    def finish(self, job: Job) -> list[Command]:
        """Give back what a job that ended may still hold."""
        return []

    def probe(self, job: Job, handle: str) -> Command | None:
        """Let every host print one line of JSON about itself (`probe.py`), or None where that cannot be."""
        return None

    def notes(self, job: Job) -> list[str]:
        """Lines to read beside the commands."""
        return []


def commands(job: Job) -> list[Command]:
    """Return every step that launches the job: what is written, what is run, and why.

    Raises:
        UserError: the job cannot be launched so.
    """
    job.check()
    return job.backend.commands(job)
