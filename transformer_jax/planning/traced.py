"""From an experiment on a mesh to the estimate of its step: layouts of parameters, the trace, the collectives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from transformer_jax.hardware import chip_of
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.planning.collectives import Collective
from transformer_jax.planning.estimate import Estimate, Exchange, estimate
from transformer_jax.planning.layouts import WHOLE, Layout
from transformer_jax.planning.roofline import as_groups
from transformer_jax.planning.trace import trace
from transformer_jax.sharding import BATCH_AXES, CONTEXT, DATA, EXPERT, batch_shards
from transformer_jax.train import Trainer, abstract_batch, train_step

GATHERED = frozenset(BATCH_AXES)
"""Axes along which a parameter is put together before it is used."""

LANES = 128
"""Elements of the last dimension of a TPU's tile."""

HIDDEN = ("all-gather", "collective-permute")
"""Collectives that run while a device computes: what a layer or a block needs is on its way during the one before."""

BFLOAT16, FLOAT32 = 2, 4
"""Bytes of an element; a TPU multiplies float32 matrices in bfloat16 unless told otherwise."""


def estimated(trainer: Trainer) -> Estimate:
    """Trace the training step on the rows of one device, and add it up.

    With positions divided too, a device has the work of so many fewer rows, or of a share of one.
    """
    shards = batch_shards(trainer.mesh) * trainer.mesh.shape[CONTEXT]
    batch = abstract_batch(trainer.experiment.data.batch_shapes(), shards)
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
    found = estimate(program, trainer.mesh.shape, GATHERED, tpu=tpu)
    found.exchanges += _around(trainer)
    rows = max(shape[0] for shape, _ in trainer.experiment.data.batch_shapes().values())
    return found if rows % shards == 0 else _shared(found, rows / shards / -(-rows // shards), set(known))


def _around(trainer: Trainer) -> list[Exchange]:
    """List what devices pass on along context (ring attention, its order): the step says it, traced on the mesh.

    Only what runs on each device by itself (`jax.shard_map`) is read there, and its shapes are those of a device.
    """
    if trainer.mesh.shape[CONTEXT] == 1:
        return []
    batch = abstract_batch(trainer.experiment.data.batch_shapes())
    with jax.set_mesh(trainer.mesh):
        closed = jax.make_jaxpr(partial(train_step, trainer))(trainer.abstract_state(), batch)
    program = trace(closed, [WHOLE] * len(closed.jaxpr.invars), {}, GATHERED, product=FLOAT32)
    return estimate(program, trainer.mesh.shape, GATHERED).exchanges


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
        kind = "all-reduce" if e.kind == "all-gather" and _gathers_by_reduction(trainer) else e.kind
        groups = as_groups(mesh, e.axis)
        if kind == "collective-permute":  # one way, from neighbour to neighbour
            groups = np.stack([groups, np.roll(groups, -1, axis=1)], axis=-1).reshape(-1, 2)
        found.append(Collective(kind, e.bytes, e.times, groups, kind in HIDDEN, ""))
    for leaf, sharding, itemsize, of_experts in _summands(trainer, guess, width):
        elements = math.prod(sharding.shard_shape(leaf.shape))
        size = elements * itemsize
        divided = {axis for _, axis in _layout(sharding, leaf)}
        for axis in GATHERED & divided - {EXPERT}:  # to experts, the tokens of all devices have been
            found.append(Collective("reduce-scatter", size * mesh.shape[axis], times, as_groups(mesh, axis), False, ""))
        copies = [axis for axis in (*BATCH_AXES, CONTEXT) if mesh.shape[axis] > 1 and axis not in divided]
        if copies:
            size = elements * FLOAT32 if of_experts else size  # their weights are rounded on each device
            whole = Collective("all-reduce", size, times, as_groups(mesh, *copies), False, "")
            found += whole.parts(slices if DATA in copies else 1)
    return found + _travels(trainer, width)


def _summands(trainer: Trainer, guess: Estimate, width: int) -> Iterator[tuple[Any, Any, int, bool]]:
    """Yield parameters, their layout, bytes of an element of the gradient that devices sum, and whether experts' own.

    Those of products have the precision of the products, those of rows that were looked up are summed in float32. A
    tied table has both. TPU's compiler makes one sum of them if devices hold the whole table, look it up once and do
    not multiply it chunk by chunk.
    """
    state = trainer.abstract_state()
    numbers = jax.tree.unflatten(jax.tree.structure(state), range(len(jax.tree.leaves(state)))).params
    trees = (trainer.skeleton.abstract, trainer.shardings().params, trainer.skeleton.letters, numbers)
    for leaf, sharding, letters, number in zip(*map(jax.tree.leaves, trees), strict=True):
        lookups = guess.looked_up[number]
        if lookups:
            yield leaf, sharding, FLOAT32, False
        apart = lookups > 1 or number in guess.chunked or _layout(sharding, leaf)
        if not lookups or (number in guess.multiplied and apart):
            yield leaf, sharding, width, "E" in letters


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
