"""`plan`: everything about a training step on devices that are not here, as one value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.flops import Flops, flops, tokens_of
from transformer_jax.nn.module import parameter_count
from transformer_jax.planning.collectives import Collective
from transformer_jax.planning.compiler import Compiled, OutOfMemory, compile_step
from transformer_jax.planning.estimate import Estimate, estimate
from transformer_jax.planning.roofline import Roofline, as_groups, link_of, roofline
from transformer_jax.planning.target import Target
from transformer_jax.planning.trace import WHOLE, Layout, Value, trace
from transformer_jax.provenance import provenance
from transformer_jax.sharding import BATCH_AXES, batch_shards
from transformer_jax.train import Trainer, train_step

Source = Literal["compiler", "estimate"]

DAY = 86_400.0

GATHERED = frozenset(BATCH_AXES)
"""Axes along which a parameter is put together before it is used."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device where most is taken."""

    parameters: int
    optimizer: int
    batch: int
    activations: int
    """Kept by the forward pass for the backward pass."""
    logits: int
    gradients: int
    temporaries: int
    """Everything else: working space, gathered weights, padding."""
    available: int

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(asdict(self).values()) - self.available

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.total <= self.available


@dataclass(frozen=True)
class Move:
    """Collectives of one kind along the same axes."""

    kind: str
    axes: str
    network: str
    bytes: int
    calls: int
    overlapped: bool | None
    """None: an estimate cannot tell."""


@dataclass(frozen=True)
class Plan:
    """What a run takes; seconds and money are the least that the hardware allows."""

    experiment: Experiment
    target: Target
    mesh: dict[str, int]
    source: Source
    parameters: int
    flops: Flops
    computed_flops: int
    """Matrix products that all devices compute in a step: attention in full, recomputation included."""
    memory: Memory
    traffic: int
    moves: list[Move]
    roofline: Roofline
    host_memory: int
    """Bytes of RAM that one host needs to hold its part of a checkpoint while it is written."""
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Positions of the largest batch by the seconds of a step."""
        return None if not self.roofline.step else self.flops.tokens / self.roofline.step

    @property
    def utilisation(self) -> float | None:
        """Model FLOP/s (matmuls, causal attention halved) as a share of the chips' peak."""
        peak = self.target.chip.peak.get(self.experiment.compute.dtype)
        if peak is None or not self.roofline.step:
            return None
        return self.flops.matmuls / self.roofline.step / (peak * self.target.devices)

    @property
    def days(self) -> float | None:
        """Days to the last step of the recipe, at full batch."""
        return None if not self.roofline.step else self.experiment.train.steps * self.roofline.step / DAY

    def cost(self, price: float) -> float | None:
        """Return the price of the run, at `price` per chip and hour."""
        chips = self.target.slice.chips if self.target.slice else self.target.devices
        return None if self.days is None else self.days * 24 * chips * price

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "experiment": self.experiment.name,
            "source": self.source,
            "on": {"name": self.target.name, "chip": self.target.chip.name}
            | {"devices": self.target.devices, "hosts": self.target.hosts},
            "mesh": self.mesh,
            "compute": vars(self.experiment.compute),
            "accumulate": self.experiment.train.accumulate,
            "parameters": self.parameters,
            "tokens_per_step": self.flops.tokens,
            "flops_per_step": {**self.flops.named(), "computed": self.computed_flops},
            "memory_per_device": {**asdict(self.memory), "total": self.memory.total, "fits": self.memory.fits},
            "memory_traffic_per_device": self.traffic,
            "collectives_per_device": [asdict(move) for move in self.moves],
            "seconds": {**asdict(self.roofline), "step": self.roofline.step, "bound": self.roofline.bound},
            "model_flops_utilisation": self.utilisation,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": None if self.tokens_per_second is None else self.tokens_per_second * DAY,
            "steps": self.experiment.train.steps,
            "days": self.days,
            "host_memory": {"checkpoint": self.host_memory, "available": self.host_available},
            "note": self.note,
            "provenance": provenance(),
        }

    @property
    def host_available(self) -> int | None:
        """Bytes of RAM of a host, where published."""
        one = self.target.chip.host_memory
        return None if one is None else round(one * self.target.per_host)


def plan(experiment: Experiment, target: Target, *, compile: bool = True) -> Plan | OutOfMemory:
    """Plan an experiment on a target, with its compiler where it is installed, else (or if not wanted) by estimate.

    An estimate always gives a plan, whose memory may not fit; the compiler may answer that it does not.

    Raises:
        UserError: the experiment is wrong, or its mesh does not suit the devices.
    """
    experiment = replace(experiment, compute=on_accelerator(experiment))
    devices = target.compile_devices() if compile else None
    trainer = trainer_of(experiment, devices or target.stand_ins())
    shapes = experiment.data.batch_shapes()
    guess = estimated(trainer)
    state = _state_bytes(trainer)
    if devices is None:
        return _assemble(trainer, target, guess, state, "estimate", None)
    compiled = compile_step(trainer, shapes)
    if isinstance(compiled, OutOfMemory):
        return compiled
    return _assemble(trainer, target, guess, state, "compiler", compiled)


def on_accelerator(experiment: Experiment) -> Any:
    """Return the compute settings as an accelerator would decide them: layers are scanned unless told otherwise."""
    compute = experiment.compute
    return replace(compute, layers="scan") if compute.layers == "auto" else compute


def trainer_of(experiment: Experiment, devices: list[Any]) -> Trainer:
    """Arrange the devices; a mesh that the physical network cannot hold is an error of the user's."""
    try:
        return Trainer.of(experiment, devices)
    except NotImplementedError as error:
        mesh = vars(experiment.mesh)
        raise UserError(
            f"the network of {len(devices)} devices cannot be divided into {mesh}: each axis must be made of whole "
            "dimensions of it; choose other sizes."
        ) from error


def estimated(trainer: Trainer) -> Estimate:
    """Trace the training step on the rows of one device, and add it up."""
    shards = batch_shards(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((shape[0] // shards, *shape[1:]), dtype)
        for name, (shape, dtype) in trainer.experiment.data.batch_shapes().items()
        if name != "example"
    }
    closed = jax.make_jaxpr(partial(train_step, trainer))(trainer.abstract_state(), batch)
    layout = jax.tree.map(_layout, trainer.shardings(), trainer.abstract_state())
    arguments = [*jax.tree.leaves(layout, is_leaf=lambda x: isinstance(x, frozenset)), *[WHOLE] * len(batch)]
    leaves = zip(
        jax.tree.leaves(trainer.skeleton.abstract), jax.tree.leaves(trainer.skeleton.letters), strict=True
    )
    shardings = jax.tree.leaves(trainer.shardings().params)
    # The gradient of a table is put together in full, from what is read and what is scored.
    known = {
        leaf.shape: _layout(sharding, leaf)
        for (leaf, names), sharding in zip(leaves, shardings, strict=True)
        if "V" not in names
    }
    return estimate(trace(closed, arguments, known, GATHERED), trainer.mesh.shape, GATHERED)


def _layout(sharding: Any, leaf: Any) -> Layout:
    mesh, spec = sharding.mesh.shape, (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    found = set()
    for d, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh[axis] > 1:
                found.add((d, axis))
    return frozenset(found)


def _state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes that one device holds of parameters, of the rest of the state, and of the batch."""

    def held(tree: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in pairs)

    state, shardings = trainer.abstract_state(), trainer.shardings()
    shapes = trainer.experiment.data.batch_shapes()
    rows = sum(math.prod(shape) * jax.numpy.dtype(dtype).itemsize for n, (shape, dtype) in shapes.items() if n != "example")
    parameters = held(state.params, shardings.params)
    return {
        "parameters": parameters,
        "optimizer": held(state, shardings) - parameters,
        "batch": rows // batch_shards(trainer.mesh),
    }


def _assemble(
    trainer: Trainer, target: Target, guess: Estimate, state: Mapping[str, int], source: Source, compiled: Compiled | None
) -> Plan:
    experiment, mesh = trainer.experiment, trainer.mesh
    available = round(target.chip.memory) - (RESERVED if target.chip.platform == "tpu" else 0)
    parts = _parts(guess, trainer)
    note = ""
    if compiled is not None:
        working = compiled.peak - sum(state.values())
        note = (
            f"The compiler gives {_gib(working)} GiB of activations, logits, gradients and temporaries together; they "
            f"are divided as in the traced step, which comes to {guess.bytes / max(working, 1):.2f} of that."
        )
        parts = _scaled(parts, max(working, 0))
    found = _expected(trainer, guess) if compiled is None else compiled.collectives
    return Plan(
        experiment=experiment,
        target=target,
        mesh=dict(mesh.shape),
        source=source,
        parameters=parameter_count(trainer.skeleton.abstract),
        flops=flops(experiment),
        computed_flops=guess.flops * mesh.size,
        memory=Memory(**state, **parts, available=available),
        traffic=guess.traffic if compiled is None else compiled.traffic,
        moves=_moves(target, mesh, found, source),
        roofline=roofline(
            target,
            mesh,
            flops=guess.flops,
            traffic=guess.traffic if compiled is None else compiled.traffic,
            found=found,
            dtype=experiment.compute.dtype,
        ),
        host_memory=_checkpoint(trainer, target, state),
        note=note,
    )


RESERVED = 2**28
"""Bytes of a TPU's memory that the compiler leaves to the runtime (seen: 15.75 of 16 GiB)."""


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _parts(guess: Estimate, trainer: Trainer) -> dict[str, int]:
    """Sort what is alive at the peak by what it is for."""
    parts = dict.fromkeys(("activations", "logits", "gradients", "temporaries"), 0)
    parameters = {leaf.shape for leaf in jax.tree.leaves(trainer.skeleton.abstract)}
    for value, size in guess.peak:
        parts[_kind(value, parameters, trainer.experiment.model.vocab_size)] += size
    return parts


def _kind(value: Value, parameters: set[tuple[int, ...]], vocabulary: int) -> str:
    if value.saved:
        return "activations"
    if value.shape in parameters:
        return "gradients"
    if len(value.shape) > 2 and value.shape[-1] == vocabulary:
        return "logits"
    return "temporaries" if value.backward else "activations"


def _scaled(parts: Mapping[str, int], total: int) -> dict[str, int]:
    factor = total / max(sum(parts.values()), 1)
    scaled = {name: math.floor(size * factor) for name, size in parts.items()}
    scaled["temporaries"] += total - sum(scaled.values())
    return scaled


def _expected(trainer: Trainer, guess: Estimate) -> list[Collective]:
    """List the collectives that the layout asks for: those of the trace, and the reduction of the gradients."""
    mesh, times = trainer.mesh, trainer.experiment.train.accumulate
    width = jax.numpy.dtype(trainer.experiment.compute.dtype).itemsize
    found = [
        Collective(e.kind, e.bytes, e.times, as_groups(mesh, e.axis), e.kind == "all-gather", "")
        for e in guess.exchanges
    ]
    shardings = jax.tree.leaves(trainer.shardings().params)
    for leaf, sharding in zip(jax.tree.leaves(trainer.skeleton.abstract), shardings, strict=True):
        size = math.prod(sharding.shard_shape(leaf.shape)) * width
        for axis in BATCH_AXES:
            n = mesh.shape[axis]
            if n == 1:
                continue
            if any(a == axis for _, a in _layout(sharding, leaf)):
                found.append(Collective("reduce-scatter", size * n, times, as_groups(mesh, axis), True, ""))
            else:
                found.append(Collective("all-reduce", size, times, as_groups(mesh, axis), False, ""))
    return found


def _moves(target: Target, mesh: Mesh, found: Sequence[Collective], source: Source) -> list[Move]:
    sums: dict[tuple[str, str, str, bool | None], tuple[int, int]] = {}
    for c in found:
        overlapped = c.overlapped if source == "compiler" else None
        key = (c.kind, c.axes(mesh), link_of(target, mesh, c.groups).network, overlapped)
        size, calls = sums.get(key, (0, 0))
        sums[key] = size + c.bytes * c.times, calls + c.times
    moves = [
        Move(kind, axes, network, size, calls, overlapped)
        for (kind, axes, network, overlapped), (size, calls) in sums.items()
    ]
    return sorted(moves, key=lambda move: -move.bytes)


def _checkpoint(trainer: Trainer, target: Target, state: Mapping[str, int]) -> int:
    """Bytes of the state that the busiest host copies to RAM: one copy of each part that its devices hold."""
    held = state["parameters"] + state["optimizer"]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state()))
    return min(held * target.per_host, whole)
