"""list, show, train: from a recipe to a trained run."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from transformer_jax import distributed, verbs
from transformer_jax.cli.verb import Tree, Verb, experiment_of, out
from transformer_jax.logs import print_json, say


@dataclass(frozen=True)
class ListOptions:
    """Show the recipes that ship with the project."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ShowOptions:
    """Count the parameters of an experiment by component, without allocating memory."""

    experiment: Tree
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


def _show(_: str, options: ShowOptions) -> int:
    shown = verbs.show(options.experiment)
    if options.json:
        print_json(shown)
        return 0
    parameters, published = shown["parameters"], shown["published"]
    table = Table("component", title=shown["experiment"], title_justify="left", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for name, count in parameters.items():
        table.add_row(name, f"{count:,}", style="bold" if name == "total" else "")
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


def _train_default(target: str) -> TrainOptions:
    is_run = (Path(target) / "experiment.json").is_file()
    return TrainOptions(experiment_of(target), out=target if is_run else "")


def _train(_: str, options: TrainOptions) -> int:
    distributed.initialize()
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
}
