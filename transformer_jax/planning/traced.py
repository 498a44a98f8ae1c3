"""From an experiment on a mesh to the estimate of its step: layouts of parameters, the trace, the collectives."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from transformer_jax.hardware import chip_of
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.planning.collectives import Collective
from transformer_jax.planning.estimate import Estimate, estimate
from transformer_jax.planning.layouts import WHOLE, Layout
from transformer_jax.planning.roofline import as_groups
from transformer_jax.planning.trace import trace
from transformer_jax.sharding import BATCH_AXES, CONTEXT, DATA, EXPERT, batch_shards
from transformer_jax.train import Trainer, train_step

GATHERED = frozenset(BATCH_AXES)
"""Axes along which a parameter is put together before it is used."""

LANES = 128
"""Elements of the last dimension of a TPU's tile."""

BFLOAT16, FLOAT32 = 2, 4
"""Bytes of an element; a TPU multiplies float32 matrices in bfloat16 unless told otherwise."""


def estimated(trainer: Trainer) -> Estimate:
    """Trace the training step on the rows of one device, and add it up.

    With positions divided too, a device has the work of so many fewer rows, or of a share of one.
    """
    shards = batch_shards(trainer.mesh) * trainer.mesh.shape[CONTEXT]
    batch = {
        name: jax.ShapeDtypeStruct((-(-shape[0] // shards), *shape[1:]), dtype)
        for name, (shape, dtype) in trainer.experiment.data.batch_shapes().items()
        if name != "example"
    }
    closed = jax.make_jaxpr(partial(train_step, _traceable(trainer)))(trainer.abstract_state(), batch)
    layout = jax.tree.map(_layout, trainer.shardings(), trainer.abstract_state())
    arguments = [*jax.tree.leaves(layout, is_leaf=lambda x: isinstance(x, frozenset)), *[WHOLE] * len(batch)]
    known = {}
    shardings = jax.tree.leaves(trainer.shardings().params)
    for leaf, sharding in zip(jax.tree.leaves(trainer.skeleton.abstract), shardings, strict=True):
        # The gradient of a table [V, D] is kept in full where a device's share of D does not fill tiles.
        if leaf.ndim != 2 or sharding.shard_shape(leaf.shape)[-1] % LANES == 0:
            known[leaf.shape] = _layout(sharding, leaf)
    tpu = trainer.mesh.devices.flat[0].platform == "tpu"
    program = trace(closed, arguments, known, GATHERED, product=BFLOAT16 if tpu else FLOAT32)
    found = estimate(program, trainer.mesh.shape, GATHERED)
    rows = max(shape[0] for shape, _ in trainer.experiment.data.batch_shapes().values())
    return found if rows % shards == 0 else _shared(found, rows / shards / -(-rows // shards), set(known))


def _traceable(trainer: Trainer) -> Trainer:
    """Let attention in blocks stand in for cuDNN's, which cannot be traced where it is not installed.

    It keeps the same for the backward pass, and shows its products, as a kernel of cuDNN does not.
    """
    compute = trainer.skeleton.compute
    if compute.attention != "cudnn":
        return trainer
    return replace(trainer, skeleton=Skeleton.of(trainer.experiment.model, replace(compute, attention="blockwise")))


def _shared(found: Estimate, share: float, parameters: set[tuple[int, ...]]) -> Estimate:
    """Take a share of what depends on the rows."""
    peak = [(value, size if value.shape in parameters else round(share * size)) for value, size in found.peak]
    return replace(found, flops=round(share * found.flops), traffic=round(share * found.traffic), peak=peak)


def _layout(sharding: Any, leaf: Any) -> Layout:
    mesh, spec = sharding.mesh.shape, (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    found = set()
    for d, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh[axis] > 1:
                found.add((d, axis))
    return frozenset(found)


def _gathers_by_reduction(trainer: Trainer) -> bool:
    """Tell whether the compiler will gather parameters by all-reduce.

    Seen on v5p (its network has three dimensions) with 24 and 64 columns a device, not with 128, and not on v5e.
    """
    chip = chip_of(trainer.mesh.devices.flat[0].device_kind)
    if chip is None or chip.axes != 3:
        return False
    shardings = jax.tree.leaves(trainer.shardings().params)
    for leaf, sharding in zip(jax.tree.leaves(trainer.skeleton.abstract), shardings, strict=True):
        shard = sharding.shard_shape(leaf.shape)
        layout = ((d, axis) for d, axis in _layout(sharding, leaf) if axis in GATHERED and axis != EXPERT)
        if leaf.ndim > 1 and any(shard[d] % LANES for d, _ in layout):
            return True
    return False


def expected(trainer: Trainer, guess: Estimate, slices: int = 1) -> list[Collective]:
    """List the collectives that the layout asks for: those of the trace, and the reduction of the gradients."""
    mesh, times = trainer.mesh, trainer.experiment.train.accumulate
    width = jax.numpy.dtype(trainer.experiment.compute.dtype).itemsize
    found = []
    for e in guess.exchanges:
        gather = e.kind == "all-gather"
        kind = "all-reduce" if gather and _gathers_by_reduction(trainer) else e.kind
        found.append(Collective(kind, e.bytes, e.times, as_groups(mesh, e.axis), kind == "all-gather", ""))
    shardings = jax.tree.leaves(trainer.shardings().params)
    for leaf, sharding in zip(jax.tree.leaves(trainer.skeleton.abstract), shardings, strict=True):
        size = math.prod(sharding.shard_shape(leaf.shape)) * width
        for axis in (*BATCH_AXES, CONTEXT):
            n = mesh.shape[axis]
            if n == 1:
                continue
            if any(a == axis for _, a in _layout(sharding, leaf)):
                if axis == EXPERT:
                    continue  # the tokens of all devices have been there
                found.append(Collective("reduce-scatter", size * n, times, as_groups(mesh, axis), False, ""))
            else:
                whole = Collective("all-reduce", size, times, as_groups(mesh, axis), False, "")
                found += whole.parts(slices if axis == DATA else 1)
    return found + _travels(trainer, width)


def _travels(trainer: Trainer, width: int) -> list[Collective]:
    """List the journeys of tokens to experts and back, forward and backward."""
    mesh, model, times = trainer.mesh, trainer.experiment.model, trainer.experiment.train.accumulate
    if mesh.shape[EXPERT] == 1 or not isinstance(model, GPTConfig):
        return []
    rows, length = trainer.experiment.data.batch_shapes()["tokens"][0]
    positions = rows * length // (batch_shards(mesh) * mesh.shape[CONTEXT] * times)
    size = width * model.width * round(positions * model.experts.chosen * model.experts.capacity)
    journeys = 4 if trainer.experiment.compute.remat == "none" else 6  # those of the forward pass are made again
    return [Collective("all-to-all", size, journeys * model.layers * times, as_groups(mesh, EXPERT), False, "")]
