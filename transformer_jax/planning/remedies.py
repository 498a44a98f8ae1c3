"""What else could be tried: settings that take less memory, and the other meshes of a slice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformer_jax.config import Experiment, MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.blockwise import BLOCK
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.planning.compiler import OutOfMemory
from transformer_jax.planning.plan import Plan
from transformer_jax.planning.planner import plan
from transformer_jax.planning.rows import dividing, overrides_of
from transformer_jax.planning.target import Target

Say = Callable[[str], None]

ENOUGH = 4
"""Changes that seem to fit, after which no more are looked for."""


@dataclass(frozen=True)
class Trial:
    """One change of an experiment, and what came of it."""

    overrides: str
    """As typed: "--compute.remat full --mesh.fsdp 8"."""
    estimate: Plan
    compiled: Plan | OutOfMemory | None = None
    """None: not compiled."""

    @property
    def plan(self) -> Plan:
        """The best that is known."""
        return self.compiled if isinstance(self.compiled, Plan) else self.estimate

    @property
    def fits(self) -> bool:
        """What the compiler says, else what the estimate says."""
        return not isinstance(self.compiled, OutOfMemory) and self.plan.fits


def remedies(experiment: Experiment, target: Target, *, compile: bool, say: Say) -> list[Trial]:
    """Try what would make an experiment fit, until enough is found: estimate changes, compile until one does fit.

    Args:
        experiment: what does not fit.
        target: where.
        compile: whether to compile at all.
        say: hears of the progress.
    """
    trials: list[Trial] = []
    for trial in _estimated(smaller(experiment, target), experiment, target):
        trials.append(trial)
        if sum(t.fits for t in trials) == ENOUGH:
            break
    if compile and target.compile_devices() is not None:
        for i, trial in enumerate(trials):
            if trial.fits:
                trials[i] = _compiled(trial, target, say)
                if trials[i].fits:
                    break
    return trials


def meshes(experiment: Experiment, target: Target, *, compile: bool, tries: int, say: Say) -> list[Trial]:
    """Rank the meshes of a target: those that fit by the seconds of a step, the others by memory.

    The first by estimate is compiled, and again, until it stays the first, or `tries` times.

    Raises:
        UserError: no mesh suits the experiment.
    """
    changed = list(_meshes(experiment, target))
    say(f"{len(changed)} meshes of {target.devices} devices")
    trials = sorted(_estimated(iter(changed), experiment, target), key=_rank)
    if not trials:
        raise UserError(
            f"no mesh of {target.devices} devices suits {experiment.name}: its sizes and data.rows_multiple are not "
            "divisible by them."
        )
    for _ in range(tries if compile and target.compile_devices() is not None else 0):
        if trials[0].compiled is not None or not trials[0].fits:
            break
        trials[0] = _compiled(trials[0], target, say)
        trials.sort(key=_rank)
    return trials


def _rank(trial: Trial) -> tuple[bool, float, int]:
    return not trial.fits, trial.plan.roofline.step or math.inf if trial.fits else 0.0, trial.plan.memory.total


def _compiled(trial: Trial, target: Target, say: Say) -> Trial:
    say(f"compiling with {trial.overrides or 'the mesh of the recipe'}")
    return replace(trial, compiled=plan(trial.estimate.experiment, target))


def _estimated(changed: Iterator[Experiment], before: Experiment, target: Target) -> Iterator[Trial]:
    seen = set()
    for experiment in changed:
        overrides = overrides_of(before, experiment)
        if overrides in seen:
            continue
        seen.add(overrides)
        try:
            found = plan(experiment, target, compile=False)
        except UserError:
            continue  # its sizes do not allow it
        assert isinstance(found, Plan)
        yield Trial(overrides, found)


def smaller(experiment: Experiment, target: Target) -> Iterator[Experiment]:
    """Yield changes that take less memory, those that cost least first, then several together."""
    single = [*_remat(experiment), *_chunk(experiment), *_sharded(experiment, target)]
    yield from (dividing(e, target) for e in single)
    for sharded in (experiment, *_sharded(experiment, target)):
        for recomputed in _remat(sharded):
            yield dividing(recomputed, target)
            for chunked in _chunk(recomputed):
                yield dividing(chunked, target)
                yield from (dividing(e, target) for e in _accumulated(chunked))
        yield from (dividing(e, target) for e in _accumulated(sharded))
    yield from (dividing(e, target) for e in _fewer_rows(experiment))


def _remat(experiment: Experiment) -> Iterator[Experiment]:
    order = ["none", "dots", "full"]
    for policy in order[order.index(experiment.compute.remat) + 1 :]:
        yield replace(experiment, compute=dataclasses.replace(experiment.compute, remat=policy))  # type: ignore[arg-type]


def _chunk(experiment: Experiment) -> Iterator[Experiment]:
    objective: Any = experiment.objective
    if any(f.name == "chunk" for f in dataclasses.fields(objective)) and not objective.chunk:
        yield replace(experiment, objective=replace(objective, chunk=128))


def _accumulated(experiment: Experiment) -> Iterator[Experiment]:
    for factor in (2, 4, 8, 16):
        steps = experiment.train.accumulate * factor
        yield replace(experiment, train=replace(experiment.train, accumulate=steps))


def _sharded(experiment: Experiment, target: Target) -> Iterator[Experiment]:
    """Divide parameters and optimizer over 8, 64, ... devices, up to all of a slice."""
    devices = target.devices // (experiment.mesh.context * experiment.mesh.expert)
    most = devices // target.slices  # slices are copies of the model
    shares = [n for n in (8, 16, 32, 64, 128) if n < most and most % n == 0]
    for fsdp in (*shares, most):
        if fsdp > experiment.mesh.fsdp:
            yield replace(experiment, mesh=replace(experiment.mesh, data=devices // fsdp, fsdp=fsdp, tensor=1))


def _fewer_rows(experiment: Experiment) -> Iterator[Experiment]:
    data: Any = experiment.data
    for name in ("batch_rows", "batch_tokens"):
        if any(f.name == name for f in dataclasses.fields(data)):
            for part in (2, 4, 8):
                less = getattr(data, name) // part
                changed = {name: less}
                if name == "batch_rows":
                    changed["rows_multiple"] = math.gcd(data.rows_multiple, less)
                if "ramp" in vars(data):
                    changed["ramp"] = tuple(stage for stage in data.ramp if stage[0] < less)
                yield replace(experiment, data=replace(data, **changed))


def _meshes(experiment: Experiment, target: Target) -> Iterator[Experiment]:
    model, data = experiment.model, experiment.data
    experts = model.experts.count if isinstance(model, GPTConfig) else 0
    length = max(shape[1] for shape, _ in data.batch_shapes().values() if len(shape) > 1)
    for context in _divisors(target.devices // target.slices):
        if context > max(length // BLOCK, experiment.mesh.context):
            break  # positions are divided while each device has a whole block of them
        within = target.devices // context
        for expert in _divisors(math.gcd(experts or 1, within)):
            for tensor in _divisors(within // expert):
                for fsdp in _divisors(within // expert // tensor):
                    copies = within // expert // tensor // fsdp
                    if copies % target.slices == 0:
                        mesh = MeshConfig(data=copies, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
                        yield dividing(replace(experiment, mesh=mesh), target)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
