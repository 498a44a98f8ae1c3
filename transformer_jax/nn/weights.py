"""How the matrices of a model that only writes are held: in the precision it computes in, or as 8-bit integers.

Of int8, each output channel of a linear map and each row of a table of tokens has a scale of its own, by its largest
magnitude: W = scale * round(W / scale). Products take the integers as they are, and their results the scale
(Dettmers 2022, section 2.1; only the weights are rounded). Norms, biases, routers and tables of positions stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from transformer_jax.nn.layers import Embedding, Linear
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.sharding import parameter_shardings

Weights = Literal["float", "int8"]
"""float: in the precision of the computation."""

LARGEST = 127
"""The range of int8 without -128, so that it is symmetric."""


def holding(skeleton: Skeleton, weights: Weights) -> Skeleton:
    """Return the model with its matrices held that way."""
    model = jax.eval_shape(lambda params: _held(skeleton, params, weights), skeleton.abstract)
    return Skeleton.describing(skeleton.config, skeleton.compute, model)


def hold(skeleton: Skeleton, params: Params, weights: Weights, mesh: Mesh) -> Params:
    """Convert the parameters of a model, as trained, to those of `holding(skeleton, weights)`, laid out on the mesh."""
    new = holding(skeleton, weights)
    if new.abstract == skeleton.abstract:
        return params
    layout = parameter_shardings(new.abstract, new.letters, mesh)

    def convert(params: Params) -> Params:
        return nnx.to_pure_dict(nnx.split(_held(skeleton, params, weights), nnx.Param)[1])

    return jax.jit(convert, out_shardings=layout)(params)


def _held(skeleton: Skeleton, params: Params, weights: Weights) -> Any:
    model = skeleton.bind(params)
    for layer, name, axes in list(_matrices(model)):
        matrix = getattr(layer, name)
        letters = matrix.get_metadata("letters")
        if weights == "float":
            setattr(layer, name, nnx.Param(matrix[...].astype(skeleton.compute.dtype), letters=letters))
            continue
        integers, scale = _rounded(matrix[...], axes)
        setattr(layer, name, nnx.Param(integers, letters=letters))
        kept = "".join(letter for axis, letter in enumerate(letters) if axis not in axes)
        layer.scale = nnx.data(nnx.Param(scale, letters=kept))
    return model


def _matrices(model: nnx.Module) -> Iterator[tuple[Linear | Embedding, str, tuple[int, ...]]]:
    """Yield what holds a matrix, its name there, and the axes over which products are summed."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            letters = node.weight.get_metadata("letters")
            if letters.endswith("E"):
                continue  # a router of experts, which decides in float32
            stacked = len(letters) - len(letters.lstrip("LE"))
            yield node, "weight", tuple(range(stacked, stacked + node.contracted))
        elif isinstance(node, Embedding) and node.table.get_metadata("letters") == "VD":
            yield node, "table", (1,)


def _rounded(matrix: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    largest = jnp.abs(matrix).max(axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return jnp.round(matrix / scale).astype(jnp.int8), scale.squeeze(axes)
