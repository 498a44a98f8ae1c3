"""Finding recipes: the public functions in `experiments/` that return an `Experiment`, or one of the user's own.

A plan is the same for several experiments: a function that returns a list of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import experiments
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError, closest

Recipe = Callable[[], Experiment]
Plan = Callable[[], list[Experiment]]


def recipes() -> dict[str, Recipe]:
    """Return every recipe that ships with the project, by name."""
    return _shipped(Experiment)


def plans() -> dict[str, Plan]:
    """Return every plan that ships with the project, by name."""
    return _shipped(list[Experiment])


def find_recipe(name: str) -> Experiment:
    """Build the experiment that `name` stands for: a recipe of ours, or `path/to/file.py:function`.

    Raises:
        UserError: there is no such recipe (the closest is named), file or function.
    """
    return _find(name, {Experiment: "Experiment"})


def find_experiments(name: str) -> list[Experiment]:
    """Build what `name` stands for: the experiments of a plan, or the one of a recipe. Errors as `find_recipe`."""
    found = _find(name, {list[Experiment]: "list[Experiment]", Experiment: "Experiment"})
    return found if isinstance(found, list) else [found]


def _find(name: str, kinds: dict[Any, str]) -> Any:
    """Call the function `name` that returns one of `kinds`."""
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        module = _load(Path(path))
        own = {key: value for kind in kinds for key, value in _returning(kind, module)}
        if function not in own:
            wanted = " or ".join(f"'{function}() -> {kind}'" for kind in kinds.values())
            raise UserError(f"{path} has no function {wanted}.{closest(function, own)}")
        return own[function]()
    known = {key: value for kind in kinds for key, value in _shipped(kind).items()}
    if name not in known:
        raise UserError(f"there is no recipe '{name}'.{closest(name, known)} `tjax list` shows them all.")
    return known[name]()


def _shipped(kind: Any) -> dict[str, Any]:
    modules = [
        importlib.import_module(f"experiments.{info.name}") for info in pkgutil.iter_modules(experiments.__path__)
    ]
    return {name: value for module in modules for name, value in _returning(kind, module)}


def _returning(kind: Any, module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the public functions a module defines that take nothing and are annotated to return `kind`."""
    for name, value in vars(module).items():
        here = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if here and inspect.signature(value, eval_str=True) == inspect.Signature(return_annotation=kind):
            yield name, value


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no recipe file {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
