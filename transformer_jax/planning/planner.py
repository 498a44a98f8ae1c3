"""`plan`: from an experiment and a target to a plan, by the target's compiler or by estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from transformer_jax.config import ComputeConfig, Experiment
from transformer_jax.flops import flops
from transformer_jax.nn.module import parameter_count
from transformer_jax.planning.collectives import Collective
from transformer_jax.planning.compiler import Compiled, OutOfMemory, compile_step
from transformer_jax.planning.estimate import Estimate
from transformer_jax.planning.plan import Memory, Move, Plan, Source
from transformer_jax.planning.roofline import link_of, roofline
from transformer_jax.planning.target import Target
from transformer_jax.planning.traced import estimated, expected
from transformer_jax.sharding import batch_shards
from transformer_jax.train import Trainer

POOL = 0.75
"""Share of a GPU's memory that JAX allocates at the start."""

RESERVED = 2**28
"""Bytes of a TPU's memory that the compiler leaves to the runtime (seen: 15.75 of 16 GiB)."""


def plan(experiment: Experiment, target: Target, *, compile: bool = True) -> Plan | OutOfMemory:
    """Plan an experiment on a target, with its compiler where it is installed, else (or if not wanted) by estimate.

    An estimate always gives a plan, whose memory may not fit; the compiler may answer that it does not.

    Raises:
        UserError: the experiment is wrong, or its mesh does not suit the devices.
    """
    experiment = replace(experiment, compute=_as_there(experiment, target))
    devices = target.compile_devices() if compile else None
    trainer = Trainer.of(experiment, devices or target.stand_ins())
    shapes = experiment.data.batch_shapes()
    guess = estimated(trainer)
    state = _state_bytes(trainer)
    if devices is None:
        return _assemble(trainer, target, guess, state, "estimate", None)
    compiled = compile_step(trainer, shapes, target.slices)
    if isinstance(compiled, OutOfMemory):
        return compiled
    return _assemble(trainer, target, guess, state, "compiler", compiled)


def _as_there(experiment: Experiment, target: Target) -> ComputeConfig:
    """Return the compute settings as they come out on the target: a TPU scans layers unless told otherwise.

    Of a GPU it is decided where layers are built, as on the CPU that plans.
    """
    compute = experiment.compute
    return replace(compute, layers="scan") if compute.layers == "auto" and target.slice else compute


def _state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes that one device holds of parameters, of the rest of the state, and of the batch."""

    def held(tree: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in pairs)

    state, shardings = trainer.abstract_state(), trainer.shardings()
    shapes = trainer.experiment.data.batch_shapes()
    rows = sum(
        math.prod(shape) * jax.numpy.dtype(dtype).itemsize for n, (shape, dtype) in shapes.items() if n != "example"
    )
    parameters = held(state.params, shardings.params)
    return {
        "parameters": parameters,
        "optimizer": held(state, shardings) - parameters,
        "batch": rows // batch_shards(trainer.mesh),
    }


def _assemble(
    trainer: Trainer,
    target: Target,
    guess: Estimate,
    state: Mapping[str, int],
    source: Source,
    compiled: Compiled | None,
) -> Plan:
    experiment, mesh = trainer.experiment, trainer.mesh
    available = round(target.chip.memory) - (RESERVED if target.chip.platform == "tpu" else 0)
    parts = _parts(guess, trainer)
    note = ""
    if compiled is not None:
        working = compiled.peak - sum(state.values())
        note = (
            f"Memory: the last four parts are {_gib(working)} GiB by the compiler, divided as in the estimate, which "
            f"comes to {guess.bytes / max(working, 1):.2f} of that."
        )
        parts = _scaled(parts, max(working, 0))
    found = expected(trainer, guess, target.slices) if compiled is None else compiled.collectives
    memory = Memory(**state, **parts, available=available)
    return Plan(
        experiment=experiment,
        target=target,
        mesh=dict(mesh.shape),
        source=source,
        parameters=parameter_count(trainer.skeleton.abstract),
        flops=flops(experiment),
        computed_flops=guess.flops * mesh.size,
        memory=memory,
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
        remarks=_remarks(trainer, target, memory.total, found),
        note=note,
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _parts(guess: Estimate, trainer: Trainer) -> dict[str, int]:
    """Sort what is alive at the peak by what it is for."""
    parts = dict.fromkeys(("activations", "logits", "gradients", "temporaries"), 0)
    parameters = [leaf.shape for leaf in jax.tree.leaves(trainer.skeleton.abstract)]
    sizes, layers = {math.prod(shape) for shape in parameters}, {shape[1:] for shape in parameters if len(shape) > 2}
    for value, size in guess.peak:
        weights = value.saved and value.shape[1:] in layers  # rounded for the products
        if not value.saved and math.prod(value.shape) in sizes:
            kind = "gradients"
        elif len(value.shape) > 2 and value.shape[-1] == trainer.experiment.model.vocab_size:
            kind = "logits"
        else:
            kind = "temporaries" if value.backward or weights else "activations"
        parts[kind] += size
    return parts


def _scaled(parts: Mapping[str, int], total: int) -> dict[str, int]:
    factor = total / max(sum(parts.values()), 1)
    scaled = {name: math.floor(size * factor) for name, size in parts.items()}
    scaled["temporaries"] += total - sum(scaled.values())
    return scaled


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


def _remarks(trainer: Trainer, target: Target, total: int, found: Sequence[Collective]) -> list[str]:
    """Point at what a person would not expect."""
    remarks = []
    if target.chip.platform == "gpu" and total > POOL * target.chip.memory:
        remarks.append(
            f"JAX takes {POOL:.0%} of a GPU's memory unless told otherwise: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
        )
    mesh, width = trainer.mesh, jax.numpy.dtype(trainer.experiment.compute.dtype).itemsize
    whole = parameter_count(trainer.skeleton.abstract) * width // mesh.shape["tensor"]
    reduced = sum(c.bytes * c.times for c in found if c.kind == "all-reduce" and c.axes(mesh) == "fsdp")
    if reduced > 1.5 * whole * trainer.experiment.train.accumulate:
        remarks.append(
            f"{_gib(reduced)} GiB of all-reduce along fsdp for {_gib(whole)} GiB of parameters: the compiler gathers "
            "parameters by all-reduce, twice the traffic of all-gather. Seen where a device's share of the width is "
            "not a multiple of 128: choose another --mesh.fsdp."
        )
    return remarks


def _checkpoint(trainer: Trainer, target: Target, state: Mapping[str, int]) -> int:
    """Bytes of the state that the busiest host copies to RAM: one copy of each part that its devices hold."""
    held = state["parameters"] + state["optimizer"]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state()))
    return min(held * target.per_host, whole)
