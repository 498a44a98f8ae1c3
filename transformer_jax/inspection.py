"""What a checkpoint holds: shapes, types, layouts and settings, without devices and without reading an array."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from transformer_jax.checkpoint import BROKEN, steps_of
from transformer_jax.errors import UserError
from transformer_jax.storage import absolute

ITEMS = ("params", "optimizer")


@dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint."""

    name: str
    """"params.decoder.layers.attention.q.weight"; layers are stacked."""
    shape: tuple[int, ...]
    dtype: str
    sharding: tuple[str, ...]
    """Mesh axes that each dimension was cut along ("fsdp", "data+fsdp", "" for none); () if not known."""

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Inspected:
    """What a checkpoint holds."""

    path: Path
    step: int
    steps: list[int]
    """All complete checkpoints beside it."""
    mesh: dict[str, int]
    """The devices that wrote it, by axis; empty if it does not say."""
    arrays: list[StoredArray]
    experiment: dict[str, Any] | None
    """As `experiment.json`; None if it was lost or is of another version."""
    name: str
    data: Any
    """Place in the data of the next batch."""

    def bytes(self, item: str) -> int:
        """Add up the arrays of "params" or "optimizer"."""
        return sum(array.bytes for array in self.arrays if array.name.startswith(f"{item}."))

    def devices(self, axes: str) -> int:
        """Return the number of parts that "data+fsdp" makes; 1 for none."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes.split("+"))

    def to_json(self) -> dict[str, Any]:
        """Return one JSON-able object."""
        return {
            "path": str(self.path),
            "step": self.step,
            "steps": self.steps,
            "mesh": self.mesh,
            "bytes": {item: self.bytes(item) for item in ITEMS},
            "parameters": sum(math.prod(a.shape) for a in self.arrays if a.name.startswith("params.")),
            "data": self.data,
            "arrays": [vars(array) | {"bytes": array.bytes} for array in self.arrays],
            "experiment": self.experiment,
        }


def inspect_checkpoint(path: Path) -> Inspected:
    """Look at a checkpoint: that of a step folder, or the newest of a run folder.

    Raises:
        UserError: there is no checkpoint of ours, or what describes its arrays is lost.
    """
    step_folder, steps = _step_folder(path)
    arrays: list[StoredArray] = []
    mesh: dict[str, int] = {}
    for item in ITEMS:
        if (step_folder / item).exists():
            found, of_item = _arrays(step_folder / item, item)
            arrays += found
            mesh = mesh or of_item
    meta = _meta(step_folder)
    text = meta.get("experiment")
    experiment = json.loads(text) if text else None
    name = (experiment or {}).get("name", "?")
    return Inspected(step_folder, int(step_folder.name), steps, mesh, arrays, experiment, name, meta.get("data"))


def _step_folder(path: Path) -> tuple[Path, list[int]]:
    if path.name.isdecimal() and (path / "params").exists():
        beside = path.parent
        return path, steps_of(beside.parent) if beside.name == "checkpoints" else [int(path.name)]
    run = path.parent if path.name == "checkpoints" else path
    if not path.exists():
        raise UserError(f"{path}: there is no such folder.")
    steps = steps_of(run)
    if not steps:
        what = "folder" if path.is_dir() else "file"
        raise UserError(
            f"{path} is a {what} without a checkpoint of ours; name a run folder (it has checkpoints/STEP/) or a step "
            "folder."
        )
    return run / "checkpoints" / str(steps[-1]), steps


def _arrays(folder: Path, item: str) -> tuple[list[StoredArray], dict[str, int]]:
    try:
        tree = ocp.StandardCheckpointHandler().metadata(epath.Path(absolute(folder))).tree
    except BROKEN as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be read ({reason}): what describes its arrays is lost.") from error
    arrays, mesh = [], {}
    for path, found in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{item}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        sharding = found.sharding
        spec = getattr(sharding, "partition_spec", None)
        if spec is not None:
            mesh = dict(zip(sharding.axis_names, map(int, sharding.shape), strict=True))
        axes = (
            () if spec is None else tuple(_axes(entry) for entry in (*spec, *[None] * (len(found.shape) - len(spec))))
        )
        arrays.append(StoredArray(name, tuple(found.shape), str(np.dtype(found.dtype)), axes))
    return arrays, mesh


def _axes(entry: Any) -> str:
    return "" if entry is None else entry if isinstance(entry, str) else "+".join(entry)


def _meta(step_folder: Path) -> dict[str, Any]:
    try:
        return json.loads((step_folder / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
