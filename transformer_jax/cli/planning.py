"""plan: what a run takes on devices that are not here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import jax

from transformer_jax.cli.verb import Tree, Verb, experiment_of, out
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import print_json, say
from transformer_jax.planning.compiler import OutOfMemory
from transformer_jax.planning.plan import Plan
from transformer_jax.planning.planner import plan
from transformer_jax.planning.remedies import Trial, meshes, remedies
from transformer_jax.planning.report import GIB, show, show_ranking
from transformer_jax.planning.rows import dividing, overrides_of, parts_of, roomy
from transformer_jax.planning.target import Target, find_target

CLOSE = 1.15
"""An estimate of memory may be so much too large."""

SHOWN = 12
"""Meshes of a ranking."""


@dataclass(frozen=True)
class PlanOptions:
    """Plan a run on devices that are not here: memory, FLOPs, collectives, time and money, from their own compiler.

    Needs libtpu for TPUs (`pip install transformer_jax[plan]`), about a minute and no accelerator; without it, it
    estimates. What does not fit ends with exit code 2, and with the settings that would make it fit.
    """

    experiment: Tree
    on: str = ""
    """A TPU slice (v5e-16, v4-32, v5p-128), or GPUs (h100-8, a100-80gb-16)."""
    slices: int = 1
    """Slices, joined over the data-centre network."""
    price: float = 0.0
    """Of a chip and hour, for the cost."""
    search: bool = False
    """Rank all meshes of the slice by estimate, and compile the best until one that was compiled stays the best."""
    tries: int = 4
    """Meshes that a search compiles at most, about a minute each."""
    estimate: bool = False
    """Do not compile."""
    json: bool = False
    """Print one JSON object."""


def _plan(name: str, options: PlanOptions) -> int:
    if not options.on:
        raise UserError("name the devices: --on v5e-16, --on v5p-128, --on h100-8.")
    jax.config.update("jax_platforms", "cpu")  # planning on a TPU or GPU machine leaves its devices alone
    if options.price < 0 or options.tries < 0:
        raise UserError("--price and --tries must not be negative.")
    target = find_target(options.on, options.slices)
    if options.search:
        return _search(name, options, target)
    options.experiment.check()
    if options.experiment.data.rows_multiple % parts_of(options.experiment, target):
        raise _undivided(name, options, target)
    if not options.estimate and target.compile_devices() is not None:
        say(f"compiling for {target.label}: a minute or two, or some seconds if it does not fit")
    found = plan(options.experiment, target, compile=not options.estimate)
    if isinstance(found, OutOfMemory) or not found.fits:
        raise _refusal(options, target, found)
    if options.json:
        print_json(found.to_json() | {"cost": found.cost(options.price) if options.price else None})
    else:
        show(found, out(), options.price)
    return 0


def _search(name: str, options: PlanOptions, target: Target) -> int:
    trials = meshes(options.experiment, target, compile=not options.estimate, tries=options.tries, say=say)
    if options.json:
        print_json({"meshes": [_trial(trial) for trial in trials]})
    else:
        show_ranking(trials[:SHOWN], out())
    best = next((trial for trial in trials if trial.compiled and trial.fits), trials[0])
    command = _command(name, options, target, best.estimate.experiment)
    if not best.fits:
        least = f"at least {best.plan.memory.total / GIB:.1f} GiB a device of {best.plan.memory.available / GIB:.2f}"
        raise UserError(f"no mesh of {target.label} fits: {least}. What else would: {command}")
    if not options.json:
        leads = "best" if best is trials[0] else f"best of what was compiled (--tries {options.tries})"
        out().print(f"\n{leads}: {command}", markup=False)
    return 0


def _command(name: str, options: PlanOptions, target: Target, found: Experiment) -> str:
    """Return what has to be typed for the plan of `found`; layers are scanned without being told."""
    compute = replace(found.compute, layers=options.experiment.compute.layers)
    overrides = overrides_of(experiment_of(name), replace(found, compute=compute))
    return f"tjax plan {name} {target.typed} {overrides}".rstrip()


def _undivided(name: str, options: PlanOptions, target: Target) -> UserError:
    """Say that batches cannot be divided, and everything that has to be set so that they can, and fit."""
    experiment, parts = options.experiment, parts_of(options.experiment, target)
    wanted = dividing(roomy(experiment, target), target)
    found, how = plan(wanted, target, compile=False), "This does"  # if more is wrong, that comes first
    if isinstance(found, Plan) and not found.fits:
        say(f"{name}: batches that {parts} parts divide do not fit {target.label}. Trying what would")
        trials = remedies(wanted, target, compile=False, say=say)
        fitting = [trial.estimate.experiment for trial in trials if trial.fits]
        how += ", and fits by estimate" if fitting else ", but does not fit"
        wanted = fitting[0] if fitting else wanted
    return UserError(
        f"{experiment.name} has batches of a multiple of data.rows_multiple={experiment.data.rows_multiple} rows, "
        f"which {parts} parts (batch shards of {target.label} x train.accumulate) do not divide. "
        f"{how}: {_command(name, options, target, wanted)}"
    )


def _refusal(options: PlanOptions, target: Target, found: Plan | OutOfMemory) -> UserError:
    """Say what does not fit, and what was tried."""
    if isinstance(found, OutOfMemory):
        needed, available, source = found.needed, found.available, "compiler"
    else:
        needed, available, source = found.memory.total, found.memory.available, "estimate"
    size = f"{needed / GIB:.1f} GiB a device of {available / GIB:.2f} ({source})"
    name = f"{options.experiment.name} does not fit {target.label}: {size}."
    if source == "estimate" and needed < CLOSE * available:
        name += " So close, an estimate may be wrong."
    say(f"{name} Trying what would fit")
    trials = remedies(options.experiment, target, compile=not options.estimate, say=say)
    fitting = sorted((t for t in trials if t.fits), key=lambda t: t.compiled is None)
    if fitting:
        return UserError(f"{name} These do: {'; '.join(map(_outcome, fitting[:SHORT]))}.")
    if not trials:
        return UserError(f"{name} No other setting was possible; take a larger slice.")
    closest = min(trials, key=lambda t: t.estimate.memory.total)
    return UserError(f"{name} Nothing tried fits; closest: {_outcome(closest)}. Take a larger slice.")


SHORT = 4
"""Remedies named in one line."""


def _outcome(trial: Trial) -> str:
    return f"{trial.overrides} ({trial.plan.memory.total / GIB:.1f} GiB, {trial.plan.source})"


def _trial(trial: Trial) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(trial.plan.to_json()))
    return {"overrides": trial.overrides, "fits": trial.fits} | result


VERBS = {
    "plan": Verb(
        "RECIPE",
        "memory, time, collectives and cost on a slice, without it",
        PlanOptions,
        lambda target: PlanOptions(experiment_of(target)),
        _plan,
    ),
}
