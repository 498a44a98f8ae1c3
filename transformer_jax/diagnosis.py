"""What a batch does to a model: norms by layer, and where the first NaN arises."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify

from transformer_jax.nn.stack import stack_layers
from transformer_jax.objectives import means
from transformer_jax.train import Batch, Trainer, TrainState, gradients


@dataclass(frozen=True)
class Norms:
    """One parameter of one layer, or several together."""

    gradient: float
    parameter: float
    bad_gradients: int
    """Elements of the gradient that are not finite."""
    bad_parameters: int

    def __add__(self, other: Norms) -> Norms:
        """Take two together."""
        return Norms(
            float(np.hypot(self.gradient, other.gradient)),
            float(np.hypot(self.parameter, other.parameter)),
            self.bad_gradients + other.bad_gradients,
            self.bad_parameters + other.bad_parameters,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values, with text for what is not finite."""
        return {name: value if np.isfinite(value) else str(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Diagnosis:
    """What came out of one batch, without changing anything."""

    loss: float
    grad_norm: float
    parameters: dict[str, Norms]
    """By parameter and layer: "decoder.layers.0.attention.q.weight"."""

    def layers(self) -> dict[str, Norms]:
        """Return the norms by layer ("decoder.layers.0") or module ("embedding"), in the order of the model's tree."""
        joined: dict[str, Norms] = {}
        for name, norms in self.parameters.items():
            parts = name.split(".")
            end = parts.index("layers") + 2 if "layers" in parts else -1
            layer = ".".join(parts[:end]) or name
            joined[layer] = joined[layer] + norms if layer in joined else norms
        return joined

    def to_json(self) -> dict[str, Any]:
        """Return what `norms.json` holds."""
        found = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {name: value if np.isfinite(value) else str(value) for name, value in found.items()} | {
            "parameters": {name: norms.to_json() for name, norms in self.parameters.items()}
        }


def diagnose(trainer: Trainer, state: TrainState, batch: Batch) -> Diagnosis:
    """Take the gradients of a batch (this process's rows) at a state, and measure them layer by layer."""

    def measured(state: TrainState, batch: Batch) -> Any:
        grads, sums, weights = gradients(trainer, state, batch)
        found = {"loss": means(sums, weights)["loss"], "grad_norm": optax.tree.norm(grads)}
        return found, jax.tree_util.tree_map_with_path(_measure, stack_layers(grads), stack_layers(state.params))

    with jax.set_mesh(trainer.mesh):
        found, measures = jax.device_get(jax.jit(measured)(state, trainer.put(batch)))
    parameters = dict(_rows(measures))
    return Diagnosis(float(found["loss"]), float(found["grad_norm"]), parameters)


CALLERS = 3
"""Callers of an operation that are named: many share a product."""


def first_nan(trainer: Trainer, state: TrainState, batch: Batch) -> str:
    """Say which operation makes the first NaN, forward or backward, on which line and called from where; "" if none."""

    def loss_and_gradients(state: TrainState, batch: Batch) -> Any:
        grads, sums, weights = gradients(trainer, state, batch)
        return means(sums, weights)["loss"], grads

    with jax.set_mesh(trainer.mesh):
        checked = jax.jit(checkify.checkify(loss_and_gradients, errors=checkify.nan_checks))
        error, _ = checked(state, trainer.put(batch))
    try:
        error.throw()
    except checkify.JaxRuntimeError as found:
        cause = found.__cause__
        frames = traceback.extract_tb(cause.__traceback__) if cause else []
        where = [f"{_short(f.filename)}:{f.lineno}: {f.line}" for f in frames if "site-packages" not in f.filename]
        made, callers = " ".join(str(found).split()).rstrip("."), where[-CALLERS - 1 : -1]
        return "\n  called at ".join([" at ".join([made, *where[-1:]]), *reversed(callers)])
    return ""


def _short(file: str) -> str:
    """Leave out the folders in which the package lies."""
    parts = Path(file).parts
    return "/".join(parts[parts.index("transformer_jax") :]) if "transformer_jax" in parts else parts[-1]


def _measure(path: tuple[Any, ...], gradient: jax.Array, parameter: jax.Array) -> dict[str, jax.Array]:
    axes = tuple(range(_stacked(path), parameter.ndim))
    both = {"gradient": gradient.astype(jnp.float32), "parameter": parameter.astype(jnp.float32)}
    norms = {name: jnp.sqrt((x**2).sum(axes)) for name, x in both.items()}
    return norms | {f"bad_{name}s": (~jnp.isfinite(x)).sum(axes) for name, x in both.items()}


def _stacked(path: tuple[Any, ...]) -> bool:
    return any(getattr(entry, "key", None) == "layers" for entry in path)


def _rows(measures: Any) -> Iterator[tuple[str, Norms]]:
    def measured(node: Any) -> bool:
        return isinstance(node, dict) and "gradient" in node

    for path, measure in jax.tree_util.tree_leaves_with_path(measures, is_leaf=measured):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _stacked(path):
            yield name, _norms(measure)
            continue
        for layer in range(len(measure["gradient"])):
            of_layer = {key: values[layer] for key, values in measure.items()}
            yield name.replace("layers", f"layers.{layer}", 1), _norms(of_layer)


def _norms(measure: dict[str, Any]) -> Norms:
    return Norms(
        float(measure["gradient"]),
        float(measure["parameter"]),
        int(measure["bad_gradients"]),
        int(measure["bad_parameters"]),
    )
