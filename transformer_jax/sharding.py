"""The mesh, and the two tables that map shape letters to its axes.

A parameter declares its letters once ("DNH"); an activation is constrained where it is made
(`constrain(x_BTF, "BTF")`). The legend of the letters stands at the top of `nn/attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig
from transformer_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""From the slowest network to the fastest: tensor exchanges most often."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that divide the rows of a batch."""

CONTEXT = "context"
"""Mesh axis that divides the positions of a row."""

PARAMETER_AXES: dict[str, str | None] = {
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": "fsdp",
    "H": None,
    "T": None,
    "Z": None,
    "L": None,
}

ACTIVATION_AXES: dict[str, str | tuple[str, ...] | None] = {
    "B": BATCH_AXES,
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": None,
    "H": None,
    "Z": None,
    "T": CONTEXT,
    "S": CONTEXT,
    "1": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices (all, unless given) as data x fsdp x context x tensor.

    Raises:
        UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: axes must be positive, at most one -1; got {dict(zip(AXES, sizes, strict=True))}.")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not match {len(devices)} device(s); --mesh.data -1 takes what is left.")
    # A TPU's network has dimensions of its own; an axis may take a part of one.
    arranged = mesh_utils.create_device_mesh(
        sizes, np.asarray(devices).flatten().tolist(), allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes; everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(abstract: Any, letters: Any, mesh: Mesh) -> Any:
    """Map a tree of abstract parameters and its tree of letters to a tree of shardings.

    Raises:
        UserError: an axis does not divide a dimension. Nothing is silently replicated.
    """

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, names: str) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = [PARAMETER_AXES[letter] for letter in names]
        for letter, axis, size in zip(names, spec, leaf.shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh {axis}={mesh.shape[axis]} does not divide {letter}={size} of parameter {where} {names}; "
                    f"choose a --mesh.{axis} that does."
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, abstract, letters)


def mesh_at_hand() -> AbstractMesh:
    """Return the mesh set with `jax.set_mesh` if it is one of ours, else one without axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else AbstractMesh((), ())


def spec(letters: str) -> PartitionSpec:
    """Return how an activation is divided; "1" stands for a dimension of size 1."""
    return PartitionSpec(*(ACTIVATION_AXES[letter] for letter in letters))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Lay an activation out by its letters on the mesh set with `jax.set_mesh`; without a mesh, do nothing.

    Positions that `context` does not divide stay together (one at a time in decoding, the gaps of BERT).
    """
    mesh = mesh_at_hand()
    if mesh.empty:
        return x
    together = [
        axis == CONTEXT and n % mesh.shape[CONTEXT] != 0 for axis, n in zip(spec(letters), x.shape, strict=True)
    ]
    axes = (None if t else axis for t, axis in zip(together, spec(letters), strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
