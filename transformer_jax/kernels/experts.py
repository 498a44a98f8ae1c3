"""The feed-forward layers of experts, each on the tokens that chose it: in places of a fixed number, or in runs.

Letters as in `nn/attention.py`, and: E experts, Z choices of a token, C places of an expert in a group of positions.
A choice that is no expert (E) is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer_jax.sharding import CONTEXT, EXPERT, PARAMETER_AXES, mesh_at_hand, spec

Activation = Callable[[jax.Array], jax.Array]


class Matrices(NamedTuple):
    """Of all experts, biases included."""

    up_EDF: jax.Array
    down_EFD: jax.Array
    gate_EDF: jax.Array | None
    up_EF: jax.Array | None
    down_ED: jax.Array | None
    gate_EF: jax.Array | None

    @classmethod
    def letters(cls) -> list[str]:
        """Return the layouts of the fields, which their names end in."""
        return [name.rpartition("_")[2] for name in cls._fields]


class Routed(NamedTuple):
    """Which experts read a token, and with what weight their outputs are added up."""

    choice_BTZ: jax.Array
    weight_BTZ: jax.Array


def apply_experts(
    x_BTD: jax.Array, routed: Routed, matrices: Matrices, activation: Activation, *, group: int, places: int
) -> tuple[jax.Array, jax.Array]:
    """Add up what the experts that a token chose make of it.

    On a mesh every device sorts the tokens that it holds; along the axis `expert` they travel to the devices that have
    their experts, and back. Shares of the matrices along fsdp are put together, those along tensor added up.

    Args:
        x_BTD: the stream.
        routed: choices and their weights.
        matrices: of the experts; computes in the dtype of x.
        activation: between the matrices.
        group: positions of a row, one after the other, that share the places.
        places: of each expert in a group, for those who come first; 0: as many as are needed.

    Returns:
        The outputs [B, T, D], and which choices found a place [B, T, Z].
    """
    compute = partial(_in_places, group=group, places=places) if places else _in_runs
    mesh = mesh_at_hand()
    if mesh.size <= 1:
        return compute(x_BTD, *routed, _in_dtype(matrices, x_BTD.dtype), activation, None)

    def local(x_BTD: jax.Array, routed: Routed, matrices: Matrices) -> tuple[jax.Array, jax.Array]:
        whole = _put_together(_in_dtype(matrices, x_BTD.dtype))
        return compute(x_BTD, *routed, whole, activation, mesh.shape[EXPERT])

    laid = Matrices._make(
        None if m is None else _spec(letters) for m, letters in zip(matrices, Matrices.letters(), strict=True)
    )
    # One position, in decoding, stays together.
    rows = spec("BTD" if x_BTD.shape[1] % mesh.shape[CONTEXT] == 0 else "B1D")
    specs: dict[str, Any] = {"in_specs": (rows, rows, laid), "out_specs": (rows, rows)}
    both: tuple[jax.Array, jax.Array] = jax.shard_map(local, **specs, check_vma=False)(x_BTD, routed, matrices)
    return both


def _spec(letters: str) -> PartitionSpec:
    return PartitionSpec(*(PARAMETER_AXES[letter] for letter in letters))


def _in_dtype(matrices: Matrices, dtype: jnp.dtype) -> Matrices:
    return jax.tree.map(lambda m: m.astype(dtype), matrices)


def _put_together(matrices: Matrices) -> Matrices:
    """Put the shares of the width together, and keep the biases of the last matrix for one of those that add up."""
    axis = PARAMETER_AXES["D"]
    whole = Matrices._make(
        jax.lax.all_gather(m, axis, axis=letters.index("D"), tiled=True) if m is not None and "D" in letters else m
        for m, letters in zip(matrices, Matrices.letters(), strict=True)
    )
    if whole.down_ED is None:
        return whole
    return whole._replace(down_ED=whole.down_ED * (jax.lax.axis_index(PARAMETER_AXES["F"]) == 0))


def _in_places(
    x_BTD: jax.Array,
    choice_BTZ: jax.Array,
    weight_BTZ: jax.Array,
    matrices: Matrices,
    activation: Activation,
    devices: int | None,
    *,
    group: int,
    places: int,
) -> tuple[jax.Array, jax.Array]:
    """Give every expert `places` tokens of a group; those who find none pass (Lepikhin 2020, section 2.2).

    Tokens are picked by number, so that no array of tokens x experts x places is formed.
    """
    (rows, length, width), experts = x_BTD.shape, len(matrices.up_EDF) * (devices or 1)
    spare = -length % group
    x_GTD, choice_GTZ, weight_GTZ = (
        jnp.pad(a, ((0, 0), (0, spare), (0, 0)), constant_values=nothing).reshape(-1, group, a.shape[-1])
        for a, nothing in ((x_BTD, 0), (choice_BTZ, experts), (weight_BTZ, 0))
    )
    groups = len(x_GTD)
    # Who comes first is served first, so that no token depends on a later one.
    chosen_GTE = jax.nn.one_hot(choice_GTZ, experts, dtype=jnp.int32).sum(2)
    before_GTE = jnp.cumsum(chosen_GTE, axis=1) - chosen_GTE
    rank_GTZ = jnp.take_along_axis(before_GTE, jnp.minimum(choice_GTZ, experts - 1), axis=2)
    kept_GTZ = (choice_GTZ < experts) & (rank_GTZ < places)
    place_GX = jnp.where(kept_GTZ, choice_GTZ * places + rank_GTZ, experts * places).reshape(groups, -1)
    number_X = jnp.repeat(jnp.arange(group), choice_GTZ.shape[2])
    empty_GX = jnp.full((groups, experts * places), group)
    token_GX = empty_GX.at[jnp.arange(groups)[:, None], place_GX].set(number_X, mode="drop")

    h_GECD = _picked(x_GTD, token_GX).reshape(groups, experts, places, width)
    if devices is not None:
        h_GECD = jax.lax.all_to_all(h_GECD, EXPERT, split_axis=1, concat_axis=0, tiled=True)
    h_GECD = _feed_forward(
        h_GECD,
        matrices,
        activation,
        lambda x_GECD, w_EXY: jnp.einsum("GECX,EXY->GECY", x_GECD, w_EXY),
        lambda bias_EX: bias_EX[:, None],
    )
    if devices is not None:
        h_GECD = jax.lax.all_to_all(h_GECD, EXPERT, split_axis=0, concat_axis=1, tiled=True)
    found_GXD = _picked(h_GECD.reshape(groups, experts * places, width), place_GX)
    found_GTZD = found_GXD.reshape(*choice_GTZ.shape, width)
    out_GTD = jnp.einsum("GTZD,GTZ->GTD", found_GTZD, weight_GTZ.astype(x_BTD.dtype))
    if devices is not None:
        out_GTD = jax.lax.psum(out_GTD, PARAMETER_AXES["F"])
    out_BTD, kept_BTZ = (a.reshape(rows, length + spare, a.shape[-1])[:, :length] for a in (out_GTD, kept_GTZ))
    return out_BTD, kept_BTZ


def _picked(x_GTD: jax.Array, number_GX: jax.Array) -> jax.Array:
    """Pick by number: [G, T, D] and [G, X] -> [G, X, D]; T is nothing, zeros."""
    picked: jax.Array = jnp.take_along_axis(x_GTD, number_GX[..., None], axis=1, mode="fill", fill_value=0)
    return picked


def _in_runs(
    x_BTD: jax.Array,
    choice_BTZ: jax.Array,
    weight_BTZ: jax.Array,
    matrices: Matrices,
    activation: Activation,
    devices: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Sort the choices by expert and multiply each run by its matrices; nothing is dropped (Gale 2022).

    Along the axis `expert`, every device reads all tokens and serves the choices of its own experts.
    """
    choices, experts = choice_BTZ.shape[2], len(matrices.up_EDF)
    x_ND, choice_NZ, weight_NZ = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, choice_BTZ, weight_BTZ))
    first: jax.Array | int = 0
    if devices is not None:
        x_ND, choice_NZ, weight_NZ = (
            jax.lax.all_gather(a, EXPERT, axis=0, tiled=True) for a in (x_ND, choice_NZ, weight_NZ)
        )
        first = experts * jax.lax.axis_index(EXPERT)
    own_NZ = jnp.where((choice_NZ >= first) & (choice_NZ < first + experts), choice_NZ - first, experts)
    order_X = jnp.argsort(own_NZ.reshape(-1), stable=True)
    token_X, expert_X = order_X // choices, own_NZ.reshape(-1)[order_X]
    served_X1 = (expert_X < experts)[:, None]
    size_E = jnp.bincount(expert_X, length=experts + 1)[:experts].astype(jnp.int32)

    # What lies behind the last run is not defined, forward and backward.
    h_XD = _feed_forward(
        jnp.where(served_X1, x_ND[token_X], 0),
        matrices,
        activation,
        lambda x_XY, w_EYZ: jax.lax.ragged_dot(x_XY, w_EYZ, size_E),
        lambda bias_EY: bias_EY[jnp.minimum(expert_X, experts - 1)],
    )
    h_XD = jnp.where(served_X1, h_XD * weight_NZ.reshape(-1)[order_X, None].astype(h_XD.dtype), 0)
    out_ND = jnp.zeros_like(x_ND).at[token_X].add(h_XD)
    if devices is not None:
        out_ND = jax.lax.psum(out_ND, PARAMETER_AXES["F"])
        out_ND = jax.lax.psum_scatter(out_ND, EXPERT, scatter_dimension=0, tiled=True)
    return out_ND.reshape(x_BTD.shape), jnp.ones(choice_BTZ.shape, bool)


def _feed_forward(
    x: jax.Array,
    matrices: Matrices,
    activation: Activation,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    spread: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Compute as `nn.layers.FeedForward`; `product` multiplies by every expert's matrix, `spread` repeats its bias."""

    def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = product(x, weight)
        return y if bias is None else y + spread(bias)

    h = linear(x, matrices.up_EDF, matrices.up_EF)
    gate = None if matrices.gate_EDF is None else linear(x, matrices.gate_EDF, matrices.gate_EF)
    return linear(activation(h) if gate is None else activation(gate) * h, matrices.down_EFD, matrices.down_ED)
