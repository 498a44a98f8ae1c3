"""list, show, train: from a recipe to a trained run."""

from __future__ import annotations

import dataclasses
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.table import Table

from transformer_jax import distributed, verbs
from transformer_jax.cli.verb import Tree, Verb, experiment_of, experiment_of_run, out
from transformer_jax.curves import against
from transformer_jax.errors import UserError
from transformer_jax.inspection import inspect_checkpoint
from transformer_jax.logs import print_json, say
from transformer_jax.replay import replay
from transformer_jax.sharding import axes_shown
from transformer_jax.storage import run_path


@dataclass(frozen=True)
class ListOptions:
    """Show the recipes that ship with the project."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ShowOptions:
    """Count the parameters of an experiment by component, without allocating memory.

    With --against: does a run reproduce the curves of the seeds in that file? Exit code 1 if it does not.
    """

    experiment: Tree
    against: str = ""
    """A stored trials.json of `tjax compare`: compare the curves of this run with it."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TrainOptions:
    """Train an experiment. Typed again, it continues where it was interrupted, or does nothing if it was done."""

    experiment: Tree
    out: str = ""
    """Run folder; by default runs/NAME."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class InspectOptions:
    """List what a checkpoint holds: shapes, types, how a mesh had cut them, step and experiment.

    PATH is a run folder, of which the newest checkpoint is taken, or one of its checkpoints/STEP. Nothing is loaded,
    and no device is needed, whoever wrote it.
    """

    all: bool = False
    """List the arrays of the optimizer too."""
    json: bool = False
    """Print one JSON object: all arrays, and every setting."""


@dataclass(frozen=True)
class ReplayOptions:
    """Run the kept batch of a bad step again: loss, norms by layer, and the operation that makes the first NaN.

    The run is not changed. Another precision or mesh may be given: does the spike go away in float32?
    """

    experiment: Tree
    step: Annotated[int, tyro.conf.Positional] = 0
    """Step of the NaN or spike; the last one unless given."""
    json: bool = False
    """Print one JSON object."""


def _list(_: str, options: ListOptions) -> int:
    found = verbs.list_recipes()
    if options.json:
        print_json(found)
        return 0
    width = max(len(name) for names in found.values() for name in names)
    for kind, names in found.items():
        out().print(f"{kind}:")
        for name, what in names.items():
            out().print(f"  {name:{width}}  {what}", markup=False)
    return 0


def _show(target: str, options: ShowOptions) -> int:
    if options.against:
        return _show_against(run_path(target), options)
    shown = verbs.show(options.experiment)
    if options.json:
        print_json(shown)
        return 0
    parameters, published = shown["parameters"], shown["published"]
    table = Table("component", title=shown["experiment"], title_justify="left", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for name, count in parameters.items():
        table.add_row(name, f"{count:,}", style="bold" if name == "total" else "")
    if shown["active"] != parameters["total"]:
        table.add_row("of a token", f"{shown['active']:,}", style="bold")
    console = out()
    console.print(table)
    if published:
        share = parameters["total"] / published["parameters"] - 1
        console.print(f"published {published['parameters']:,} ({published['source']}); ours differs by {share:+.1%}")
        console.print(published["note"], markup=False)
    console.print()
    for key, value in shown["settings"].items():
        console.print(f"  {key} = {value}", markup=False)
    return 0


def _show_against(run: Path, options: ShowOptions) -> int:
    if not (run / "experiment.json").is_file():
        raise UserError(f"--against compares a run folder, and {run} is none; `tjax train` prints where it writes.")
    compared = against(run, Path(options.against))
    picture = run / "against.png"
    compared.draw(picture)
    if options.json:
        facts = {"run": str(run), "reproduces": compared.reproduces, "picture": str(picture)}
        print_json(dataclasses.asdict(compared) | facts)
    else:
        out().print(compared.verdict(), markup=False)
        for line in compared.differences:
            out().print(f"  another setting: {line}", markup=False)
    say(f"written: {picture}")
    return 0 if compared.reproduces else 1


def _train_default(target: str) -> TrainOptions:
    is_run = (run_path(target) / "experiment.json").is_file()
    return TrainOptions(experiment_of(target), out=target if is_run else "")


def _train(_: str, options: TrainOptions) -> int:
    distributed.initialize()
    plan, steps = options.experiment.optim.schedule, options.experiment.train.steps
    if plan.kind in ("cosine", "linear", "wsd") and plan.steps != steps:
        say(
            f"note: the learning rate decays over optim.schedule.steps={plan.steps}, but the run has "
            f"train.steps={steps}; give both to change both"
        )
    outcome = verbs.train(options.experiment, options.out or None)
    if options.json:
        print_json(dataclasses.asdict(outcome) | {"run": str(outcome.run)})
    elif outcome.stopped_by:
        say(f"stopped by {outcome.stopped_by} at step {outcome.step}; the same command continues")
    elif outcome.step == outcome.started_at:
        say(f"nothing to train: {outcome.run} is at step {outcome.step} of {options.experiment.train.steps}")
    else:
        say(f"trained to step {outcome.step} in {outcome.seconds / 60:.1f} min")
    say(f"run folder: {outcome.run}  (checkpoints/, metrics.jsonl, tensorboard/, loss.png, provenance.json)")
    return 128 + signal.Signals[outcome.stopped_by] if outcome.stopped_by else 0


def _replay(target: str, options: ReplayOptions) -> int:
    found = replay(run_path(target), options.step or None, options.experiment)
    if options.json:
        print_json(found.to_json())
        return 0
    console, then, now = out(), found.anomaly, found.diagnosis
    console.print(f"{then}; policy {then.policy}", markup=False)
    console.print(f"again, from checkpoint {found.checkpoint}: loss {now.loss:.4g}, gradient norm {now.grad_norm:.4g}")
    table = Table("layer", box=None, pad_edge=False)
    for column in ("gradient norm", "parameter norm", "not finite"):
        table.add_column(column, justify="right")
    for name, norms in now.layers().items():
        bad = norms.bad_gradients + norms.bad_parameters
        table.add_row(name, f"{norms.gradient:.4g}", f"{norms.parameter:.4g}", f"{bad:,}" if bad else "")
    console.print(table)
    if found.first_nan:
        console.print(f"first NaN: {found.first_nan}", markup=False)
    return 0


def _inspect(target: str, options: InspectOptions) -> int:
    jax.config.update("jax_platforms", "cpu")  # whoever trains beside keeps the accelerator
    found = inspect_checkpoint(run_path(target))
    if options.json:
        print_json(found.to_json())
        return 0
    console = out()
    console.print(f"{found.name}, step {found.step}: {found.path}", markup=False)
    if len(found.steps) > 1:
        console.print(f"beside it: {', '.join(str(step) for step in found.steps if step != found.step)}")
    if found.mesh:
        console.print(f"written by {math.prod(found.mesh.values())} device(s): {', '.join(axes_shown(found.mesh))}")
    console.print(
        f"params {found.bytes('params') / 2**20:,.1f} MiB, optimizer {found.bytes('optimizer') / 2**20:,.1f} MiB"
    )
    rows = [("array", "shape", "type", "cut along", "size")]
    for array in found.arrays:
        if options.all or array.name.startswith("params."):
            cut = [axis if found.devices(axis) > 1 else "-" for axis in array.sharding]
            shape = " x ".join(map(str, array.shape))
            cut_along = ", ".join(cut) if set(cut) - {"-"} else ""
            rows.append((array.name, shape, array.dtype, cut_along, f"{array.bytes / 2**10:,.0f} KiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *texts, size in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=False))
        console.print(f"{line}  {size.rjust(widths[-1])}", markup=False)
    return 0


VERBS = {
    "list": Verb("", "recipes that ship with the project", ListOptions, lambda _: ListOptions(), _list),
    "show": Verb(
        "RECIPE",
        "parameters by component, and every setting; takes no memory",
        ShowOptions,
        lambda target: ShowOptions(experiment_of(target)),
        _show,
    ),
    "train": Verb("RECIPE", "train, or continue where it was interrupted", TrainOptions, _train_default, _train),
    "inspect": Verb(
        "PATH", "what a checkpoint holds, without loading it", InspectOptions, lambda _: InspectOptions(), _inspect
    ),
    "replay": Verb(
        "RUN",
        "run the batch of a NaN or a spike again, and see where it arises",
        ReplayOptions,
        lambda target: ReplayOptions(experiment_of_run(target)),
        _replay,
    ),
}
