"""What a sweep takes, before it begins: FLOPs by two counts, and seconds from steps measured here or planned there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from transformer_jax.bench.train import step_seconds
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.planning.compiler import OutOfMemory
from transformer_jax.planning.planner import plan
from transformer_jax.planning.target import Target, find_target
from transformer_jax.sweep.counts import Counts, counts, step_flops
from transformer_jax.sweep.trunk import Family, families

TIMED = 3
"""Steps timed after the first."""


@dataclass(frozen=True)
class Cost:
    """Of one run. Steps that a trunk has made already are not in it."""

    counts: Counts
    trained: int
    """Steps that this run trains itself."""
    steps: int
    seconds: float | None
    """None: the hardware's figures do not tell."""

    @property
    def share(self) -> float:
        """Part of the run that is trained for it."""
        return self.trained / self.steps


@dataclass(frozen=True)
class Speed:
    """Seconds of a step as a line in its FLOPs, and of what a run needs beside its steps."""

    fixed: float
    per_flop: float
    start: float
    """Compiling, opening the data, saving."""
    where: str

    def of(self, experiment: Experiment) -> float:
        """Return the seconds of a step."""
        return self.fixed + self.per_flop * step_flops(experiment)


def measured(experiments: Sequence[Experiment]) -> Speed:
    """Time a few steps of the smallest and of the largest step of a sweep on this machine."""
    by_flops = sorted(experiments, key=step_flops)
    ends = [by_flops[0], by_flops[-1]]
    size = [step_flops(e) for e in ends]
    if size[0] == size[1]:
        ends, size = ends[:1], size[:1]
    first, rest = zip(*(_timed(e) for e in ends), strict=True)
    where = where_measured()
    if len(ends) == 1:
        return Speed(0.0, rest[0] / size[0], max(first), where)
    slope = max((rest[1] - rest[0]) / (size[1] - size[0]), 0.0)
    return Speed(max(rest[0] - slope * size[0], 0.0), slope, max(first), where)


def where_measured() -> str:
    """Name this machine's devices, as `Speed.where`."""
    return f"measured on {jax.device_count()} x {jax.devices()[0].device_kind}"


def _timed(experiment: Experiment) -> tuple[float, float]:
    """Return the seconds of the first step, compiling included, and the least of those after it."""
    first, rest = step_seconds(experiment, TIMED)
    return first, min(rest)


def planned_speed(target: Target) -> Callable[[Experiment], float | None]:
    """Return how long a step takes at least on devices that are not here, by estimate (`tjax plan`)."""

    def seconds(experiment: Experiment) -> float | None:
        found = plan(experiment, target, compile=False)
        assert not isinstance(found, OutOfMemory)
        if not found.fits:
            raise UserError(f"{experiment.name} does not fit {target.name}: `tjax plan` says what would.")
        return found.roofline.step

    return seconds


def costs(found: Sequence[Family], step_seconds: Callable[[Experiment], float | None], start: float) -> dict[str, Cost]:
    """Return what every run of a sweep takes, by name.

    Args:
        found: the runs, grouped by what they share.
        step_seconds: of an experiment.
        start: seconds that a run needs beside its steps.
    """
    result: dict[str, Cost] = {}
    for family in found:
        one = step_seconds(family.trunk)
        for branch in family.branches:
            steps = branch.experiment.train.steps
            trained = steps - branch.shared
            seconds = None if one is None else one * trained + start
            result[branch.experiment.name] = Cost(counts(branch.experiment), trained, steps, seconds)
    return result


def summary(total: Sequence[Cost]) -> dict[str, float | None]:
    """Add costs up: what is trained, by both counts, and what it would be without sharing."""
    seconds = [cost.seconds for cost in total]
    known = None if None in seconds else sum(second for second in seconds if second is not None)
    return {
        "runs": len(total),
        "flops_exact": sum(cost.counts.exact * cost.share for cost in total),
        "flops_6nd": sum(cost.counts.six_nd * cost.share for cost in total),
        "flops_6nd_without_sharing": float(sum(cost.counts.six_nd for cost in total)),
        "seconds": known,
    }


def foresee(name: str, experiments: Sequence[Experiment], on: str = "") -> list[dict[str, Any]]:
    """Say what a sweep takes, here or on devices that are not here; nothing is trained.

    Returns:
        By run: its name, N, D, C by 6ND and exact, the share of it that is trained for it, and seconds.

    Raises:
        UserError: there are no such devices, or a run does not fit them.
    """
    found = families(experiments)
    if on:
        target = find_target(on)
        total, where = costs(found, planned_speed(target), 0.0), f"at least, on {target.name} (estimate of `tjax plan`)"
    else:
        speed = measured(experiments)
        total, where = costs(found, speed.of, speed.start), speed.where
    announce(name, summary(list(total.values())), where)
    return [
        {
            "run": name,
            "n": cost.counts.N,
            "d": cost.counts.D,
            "c": cost.counts.six_nd,
            "c_exact": cost.counts.exact,
            "trained": cost.share,
            "seconds": cost.seconds,
        }
        for name, cost in total.items()
    ]


def duration(seconds: float | None) -> str:
    """Write seconds for people."""
    if seconds is None:
        return "n/a"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def announce(name: str, total: dict[str, float | None], where: str) -> None:
    """Say what a sweep takes."""
    saved = (total["flops_6nd_without_sharing"] or 0) / max(total["flops_6nd"] or 1, 1)
    shared = f" (without shared trunks {saved:.1f} times as many)" if saved > 1.005 else ""
    say(
        f"{name}: {total['runs']:.0f} runs, {total['flops_exact']:.3g} FLOPs exact, {total['flops_6nd']:.3g} by 6ND"
        f"{shared}; about {duration(total['seconds'])}, {where}"
    )
