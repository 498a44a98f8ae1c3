"""Scaled dot-product attention: one description of the mask, and the backends that honour it.

Letters as in `nn/attention.py`: q_BTNH, k_BSKH, v_BSKH with N = K G (grouped queries, Ainslie 2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

from transformer_jax.errors import UserError, closest
from transformer_jax.kernels import blockwise, cudnn, plain, splash
from transformer_jax.kernels.demand import Demand
from transformer_jax.kernels.mask import Mask
from transformer_jax.sharding import CONTEXT, mesh_at_hand, spec

__all__ = ["BACKENDS", "Demand", "Mask", "attention", "chosen", "refusal"]

Backend = Literal["splash", "cudnn", "xla", "blockwise"]

BACKENDS: tuple[Backend, ...] = ("splash", "cudnn", "xla", "blockwise")
"""The fastest first, where they can serve."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    backend: str = "auto",
    joined: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
    """Attend: softmax(q k / sqrt(H)) v, softmax in float32 (Vaswani 2017, section 3.2.1).

    With a key, a share `dropout` of the weights is zeroed and the rest scaled up (as in BERT and GPT). A mask with
    positions of each row (decoding: few queries look at a cache) is always served by "xla", and so are keys and values
    of which each holds several heads side by side (`joined`: how many).

    Returns:
        The output [B, T, N, H], and the weights [B, N, T, S] where the backend forms them (XLA drops them if unused).

    Raises:
        UserError: the backend is unknown, or cannot serve.
    """
    context = mesh_at_hand().shape.get(CONTEXT, 1)
    t, s = q_BTNH.shape[1], k_BSKH.shape[1]
    if backend == "auto" and (t % context or s % context):
        backend = "xla"  # decoding reads one position at a time: there is nothing to divide
    elif backend == "auto":
        dropped = dropout if key is not None else 0.0
        demand = Demand(jax.default_backend(), q_BTNH.dtype.name, q_BTNH.shape[-1], dropped, max(t, s), context)
        backend = chosen(backend, demand)
    placed = mask.q_positions_BT is not None or mask.kv_positions_BS is not None
    if backend == "xla" or joined > 1 or (placed and backend != "blockwise"):
        return plain.attend(q_BTNH, k_BSKH, v_BSKH, mask, dropout, key, joined)
    match backend:
        case "splash":
            attend = partial(_without_dropout, splash.attend)
        case "cudnn":
            attend = partial(_without_dropout, cudnn.attend)
        case "blockwise":
            if t % context or s % context:
                raise UserError(f"mesh.context={context} does not divide rows of {t} x {s} positions.")
            mask = mask.placed(t, s)
            attend = partial(blockwise.attend, ring=blockwise.Ring(CONTEXT, context) if context > 1 else None)
        case _:
            raise _unknown(backend)
    return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKH, mask, dropout, key), None


def chosen(backend: str, demand: Demand) -> Backend:
    """Name the backend that serves a wish; "auto" takes the fastest that can.

    Splash pads rows and leaves blocks out; where a whole row is one block, plain attention is as good or better.

    Raises:
        UserError: there is no such backend, or it cannot serve.
    """
    if backend == "auto":
        short = demand.length <= splash.BLOCK
        return next(name for name in BACKENDS if not refusal(name, demand) and not (name == "splash" and short))
    for name in BACKENDS:
        if name == backend:
            if reason := refusal(name, demand):
                raise UserError(f"compute.attention={name} {reason}; set --compute.attention auto.")
            return name
    raise _unknown(backend)


def refusal(backend: Backend, demand: Demand) -> str:
    """Say why a backend cannot serve; "" if it can."""
    if demand.context > 1 and backend != "blockwise":
        return f"sees whole rows, and mesh.context={demand.context} divides them"
    match backend:
        case "splash":
            return splash.refuses(demand)
        case "cudnn":
            return cudnn.refuses(demand)
    return ""


def _unknown(backend: str) -> UserError:
    return UserError(f"there is no attention backend '{backend}'.{closest(backend, ['auto', *BACKENDS])}")


def _without_dropout(
    attend: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, _rate: float, _key: Any
) -> jax.Array:
    out: jax.Array = attend(q_BTNH, k_BSKH, v_BSKH, mask)
    return out


def _on_each_device(
    attend: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    dropout: float,
    key: jax.Array | None,
) -> jax.Array:
    """Let every device of the mesh attend with its rows, heads and positions: kernels cannot be divided by XLA."""
    mesh = mesh_at_hand()
    if mesh.size <= 1:
        out_BTNH: jax.Array = attend(q_BTNH, k_BSKH, v_BSKH, mask, dropout, key)
        return out_BTNH

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bits: jax.Array | None) -> Any:
        own = None
        if bits is not None:
            own = jax.random.fold_in(jax.random.wrap_key_data(bits), jax.lax.axis_index(mesh.axis_names))
        return attend(q, k, v, mask, dropout, own)

    inputs = (q_BTNH, k_BSKH, v_BSKH, mask, None if key is None else jax.random.key_data(key))
    # Fields of a mask end in their letters, and may hold one row for all.
    cut = jax.tree_util.tree_map_with_path(lambda path, x: spec("1B"[len(x) > 1] + path[0].name[-1]), mask)
    specs = (spec("BTNH"), spec("BSKH"), spec("BSKH"), cut, PartitionSpec())
    out_BTNH = jax.shard_map(local, in_specs=specs, out_specs=spec("BTNH"), check_vma=False)(*inputs)
    return out_BTNH
