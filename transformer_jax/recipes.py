"""Finding recipes: the public functions in `experiments/` that return an `Experiment`, or one of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import experiments
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError, closest

Recipe = Callable[[], Experiment]


def recipes() -> dict[str, Recipe]:
    """Return every recipe that ships with the project, by name."""
    found: dict[str, Recipe] = {}
    for info in pkgutil.iter_modules(experiments.__path__):
        found |= dict(_recipes_of(importlib.import_module(f"experiments.{info.name}")))
    return found


def find_recipe(name: str) -> Experiment:
    """Build the experiment that `name` stands for: a recipe of ours, or `path/to/file.py:function`.

    Raises:
        UserError: there is no such recipe (the closest is named), file or function.
    """
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        own = dict(_recipes_of(_load(Path(path))))
        if function not in own:
            raise UserError(f"{path} has no function '{function}() -> Experiment'.{closest(function, own)}")
        return own[function]()
    known = recipes()
    if name not in known:
        raise UserError(f"there is no recipe '{name}'.{closest(name, known)} `tjax list` shows them all.")
    return known[name]()


def _recipes_of(module: ModuleType) -> Iterator[tuple[str, Recipe]]:
    for name, value in vars(module).items():
        here = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if here and inspect.signature(value, eval_str=True) == inspect.Signature(return_annotation=Experiment):
            yield name, value


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no recipe file {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
