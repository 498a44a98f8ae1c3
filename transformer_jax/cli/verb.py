"""What a verb is, and how its options are read: typed, from a dataclass, with one line for every mistake."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console

from transformer_jax.config import Experiment, flatten, read_experiment
from transformer_jax.errors import UserError, closest
from transformer_jax.recipes import find_recipe
from transformer_jax.storage import run_path

T = TypeVar("T")
Tree = Annotated[Experiment, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Verb:
    """One subcommand: `tjax NAME TARGET [options]`."""

    target: str
    """What stands first on its command line, in capitals: RECIPE, RUN, PLAN, a file; "" if nothing does."""
    summary: str
    """One line for `tjax --help`."""
    options: type[Any]
    """A frozen dataclass; its docstring explains the verb."""
    default: Callable[[str], Any]
    """The options of a target, before the command line changes them; raises `UserError` for a target that is none."""
    run: Callable[[str, Any], int]
    """(target, options) -> exit code."""

    def call(self, name: str, argv: list[str]) -> int:
        """Read target and options from the command line, and run."""
        target, rest, prog = "", argv, f"tjax {name}"
        if self.target:
            target, rest = self._target(name, argv)
            prog += f" {target}"
        return self.run(target, parse(self.options, self.default(target), rest, prog))

    def _target(self, name: str, argv: list[str]) -> tuple[str, list[str]]:
        """Take the target from the front; `tjax VERB --help` explains the verb without one."""
        if argv and argv[0] in ("-h", "--help"):
            sys.stdout.write(f"usage: tjax {name} {self.target} [options]\n\n{inspect.getdoc(self.options)}\n\n")
            sys.stdout.write(f"`tjax {name} {self.target.split()[0]} --help` lists every option.\n")
            sys.exit(0)
        if not argv or argv[0].startswith("-"):
            raise UserError(f"tjax {name} needs a {self.target} first: tjax {name} {self.target} [options].")
        return argv[0], argv[1:]


def parse(kind: type[T], default: T, argv: list[str], prog: str) -> T:
    """Read typed options from the command line by the dataclass `kind`, every field of an experiment included.

    Raises:
        UserError: an unknown option (the closest is named) or a value of the wrong type.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, unknown = tyro.cli(
                kind,
                default=default,
                args=argv,
                prog=prog,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; the first paragraph in it is the message.
        text = re.sub(r"[│╭╮╰╯]", "", errors.getvalue()).split("──")
        message = next((part.strip() for part in text[1:] if len(part.split()) > 2), errors.getvalue())
        raise UserError(f"{message} (`{prog} --help` lists the options)") from None
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument '{unknown[0]}'. (`{prog} --help`)")
    if unknown:
        options_known = [f"--{name.replace('_', '-')}" for name in _option_names(default)]
        parts = [option for option in options_known if option.startswith(f"{unknown[0].partition('=')[0]}.")]
        meant = f" It has parts: {', '.join(parts)}." if parts else closest(unknown[0], options_known)
        raise UserError(f"unknown option {unknown[0]}.{meant} (`{prog} --help`)")
    return options


def _option_names(default: Any) -> Iterator[str]:
    for name, _ in flatten(default):
        if not name.endswith(".type"):  # which class a part has is no option
            yield re.sub(r"^(experiment|decode)\.", "", name)  # these fields are named ""


def experiment_of(target: str) -> Experiment:
    """Return the experiment of a recipe, or of a run folder."""
    file = run_path(target) / "experiment.json"
    if file.is_file():
        return read_experiment(file)
    return find_recipe(target)


def experiment_of_run(run: str) -> Experiment:
    """Return the experiment of a run folder."""
    file = run_path(run) / "experiment.json"
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (it has no experiment.json); `tjax train` prints where it writes.")
    return read_experiment(file)


def lines_of(file: str) -> Iterator[str]:
    """Yield the lines of a file, or of standard input."""
    if file and not Path(file).is_file():
        raise UserError(f"{file}: there is no such file.")
    with Path(file).open("rb") if file else contextlib.nullcontext(sys.stdin.buffer) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{file or 'standard input'}:{number}: not UTF-8 ({error.reason}).") from error


def out() -> Console:
    """Return a console for results; what goes to a file or another program is not cut to a width."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
