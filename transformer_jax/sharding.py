"""The mesh, and the two tables that map shape letters to its axes.

A parameter declares its letters once ("DNH"); an activation is constrained where it is made
(`constrain(x_BTF, "BTF")`). The legend of the letters stands at the top of `nn/attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig
from transformer_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""From the slowest network to the fastest: tensor exchanges most often."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that divide the rows of a batch."""

DATA = "data"
"""Mesh axis along which several slices lie."""

EXPERT = "expert"
"""Mesh axis that divides experts; tokens travel along it to theirs and back."""

CONTEXT = "context"
"""Mesh axis that divides the positions of a row."""

PARAMETER_AXES: dict[str, str | None] = {
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": "fsdp",
    "E": EXPERT,
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
    "E": None,
    "H": None,
    "Z": None,
    "T": CONTEXT,
    "S": CONTEXT,
    "1": None,
}


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """Return the devices along each axis, where -1 has taken what is left.

    Raises:
        UserError: the product of the axes is not the number of devices, or the slices do not divide data.
    """
    sizes = {axis: int(getattr(config, axis)) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh: axes must be positive, at most one -1; got {sizes}.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and devices % known == 0:
        sizes[free[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        mend = f"the others, {known} together, do not divide them" if free else "--mesh.data -1 takes what is left"
        raise UserError(f"mesh {shape} does not match {devices} device(s); {mend}.")
    if sizes[DATA] % slices:
        raise UserError(
            f"mesh data={sizes[DATA]} does not divide among {slices} slices, whose network is too slow for the other "
            f"axes; set --mesh.data to a multiple of {slices}."
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices (all, unless given) along the axes of the mesh.

    Several TPU slices lie along data, the axis that exchanges least: the network that joins them is slow.

    Raises:
        UserError: the axes do not suit the devices.
    """
    flat = list(jax.devices()) if devices is None else np.asarray(devices).flatten().tolist()
    slices = len({getattr(device, "slice_index", 0) for device in flat if device.platform == "tpu"}) or 1
    sizes = mesh_sizes(config, len(flat), slices)
    # A TPU's network has dimensions of its own; an axis may take a part of one.
    if slices > 1:
        joined = [slices if axis == DATA else 1 for axis in AXES]
        within = [size // n for size, n in zip(sizes.values(), joined, strict=True)]
        arranged = mesh_utils.create_hybrid_device_mesh(within, joined, flat, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh([*sizes.values()], flat, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axes_shown(sizes: Mapping[str, int]) -> list[str]:
    """Write the axes of a mesh for people: data, fsdp and tensor, and those of the others that divide something."""
    return [f"{axis}={size}" for axis, size in sizes.items() if size > 1 or axis in ("data", "fsdp", "tensor")]


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
        UserError: an axis does not divide a dimension, or there is nothing for it to divide. Nothing is silently
            replicated.
    """
    if mesh.shape[EXPERT] > 1 and not any("E" in names for names in jax.tree.leaves(letters)):
        raise UserError(
            f"mesh.expert={mesh.shape[EXPERT]} divides experts, and this model has none; set --mesh.expert 1, or "
            "--model.experts.count of a decoder."
        )

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
