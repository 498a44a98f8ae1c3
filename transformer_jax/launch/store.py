"""What was launched from this folder: one small JSON file a job, in runs/jobs/NAME/job.json."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.v import format_exception

from transformer_jax.errors import UserError, closest
from transformer_jax.launch.gke import Gke
from transformer_jax.launch.job import Backend, Job, Phase, State
from transformer_jax.launch.local import Local
from transformer_jax.launch.slices import Slice, find_slice
from transformer_jax.launch.slurm import Slurm
from transformer_jax.launch.tpu_vm import TpuVm
from transformer_jax.storage import whole

JOBS = Path("runs") / "jobs"
BACKENDS: dict[str, type[Backend]] = {"tpu-vm": TpuVm, "gke": Gke, "slurm": Slurm, "local": Local}
OVER: tuple[Phase, ...] = ("done", "failed", "stopped")


@dataclass(frozen=True)
class Record:
    """A job and what is known of it."""

    job: Job
    phase: Phase = "queued"
    detail: str = ""
    handle: str = ""
    """What names it to its backend, where its own name does not: the number of a SLURM job, of a process."""
    launched: float = 0.0
    """Seconds since 1970."""
    preemptions: int = 0
    periods: tuple[tuple[float, float], ...] = field(default=())
    """When its machines were seen at work: from, to."""

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.phase in OVER

    @property
    def seconds(self) -> float:
        """How long its machines were at work."""
        return sum(to - start for start, to in self.periods)

    @property
    def cost(self) -> float:
        """What that cost, at the price that was named."""
        return self.job.budget.cost(self.job.backend.chips, self.seconds)

    def seen(self, state: State, now: float) -> Record:
        """Return the record after the backend was asked."""
        periods = list(self.periods)
        if state.phase == "running":
            # A gap between two looks was paid too: the machines did not go away in it.
            if self.phase == "running" and periods:
                periods[-1] = (periods[-1][0], now)
            else:
                periods.append((now, now))
        elif self.phase == "running" and periods:
            periods[-1] = (periods[-1][0], now)
        return replace(self, phase=state.phase, detail=state.detail, periods=tuple(periods))

    def save(self) -> None:
        """Write it, whole or not at all."""
        path = Path(self.job.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as scratch:
            scratch.write_text(json.dumps(_converter().unstructure(self), indent=2) + "\n", encoding="utf-8")


def load(name: str, folder: Path = JOBS) -> Record:
    """Read the record of a job.

    Raises:
        UserError: no job of this name was launched from here (the closest is named), or its file is damaged.
    """
    path = folder / name / "job.json"
    if not path.is_file():
        known = [record.job.name for record in load_all(folder)]
        raise UserError(f"no job '{name}' was launched from this folder.{closest(name, known)} `tjax jobs` lists them.")
    try:
        return _converter().structure(json.loads(path.read_text(encoding="utf-8")), Record)
    except (json.JSONDecodeError, cattrs.BaseValidationError) as error:
        raise UserError(f"{path} is damaged: {error if isinstance(error, ValueError) else _first(error)}.") from error


def load_all(folder: Path = JOBS) -> list[Record]:
    """Read the records of all jobs, oldest first."""
    return sorted((load(path.parent.name, folder) for path in folder.glob("*/job.json")), key=lambda r: r.launched)


def now() -> float:
    """Return the time, in seconds since 1970."""
    return time.time()


def _first(error: cattrs.BaseValidationError) -> str:
    return format_exception(error, None)


@functools.cache
def _converter() -> cattrs.Converter:
    """JSON of records; a backend carries its kind under "type", and a slice is written by its name."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(Slice, lambda one: one.name)
    converter.register_structure_hook(Slice, lambda name, _: find_slice(name))
    names = {kind: name for name, kind in BACKENDS.items()}
    writers = {kind: make_dict_unstructure_fn(kind, converter) for kind in names}
    readers = {kind: make_dict_structure_fn(kind, converter) for kind in names}

    def write(backend: Backend) -> dict[str, Any]:
        return {"type": names[type(backend)], **writers[type(backend)](backend)}

    def read(value: dict[str, Any], _: type) -> Backend:
        fields = dict(value)
        kind = BACKENDS[fields.pop("type")]
        return readers[kind](fields, kind)

    converter.register_unstructure_hook_func(lambda kind: isinstance(kind, type) and issubclass(kind, Backend), write)
    converter.register_structure_hook_func(lambda kind: kind is Backend, read)
    return converter
