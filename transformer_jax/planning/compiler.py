"""The step as the compiler of the devices makes it, although they are not here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax

from transformer_jax import compilation_cache
from transformer_jax.planning.collectives import Collective, collectives
from transformer_jax.planning.hlo import parse
from transformer_jax.planning.traffic import memory_traffic
from transformer_jax.train import BatchShapes, Trainer

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, for one device."""

    peak: int
    """Bytes of memory where most is taken, arguments included."""
    arguments: int
    """Bytes of state and batch."""
    traffic: int
    """Bytes between memory and arithmetic units."""
    collectives: list[Collective]


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler's answer that a step does not fit."""

    needed: int
    """Bytes of the temporaries, or of everything, as far as the compiler got."""
    available: int


def compile_step(trainer: Trainer, shapes: BatchShapes, slices: int = 1) -> Compiled | OutOfMemory:
    """Compile the training step for the devices of the trainer's mesh, which lie in so many slices.

    Raises:
        RuntimeError: the compiler failed for another reason than memory.
    """
    lowered = trainer.lower_train_step(shapes)
    try:
        # What is compiled for devices that are not here, a cache could not load again.
        with compilation_cache.configured(jax_enable_compilation_cache=False):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if full := _out_of_memory(str(error)):
            return full
        raise
    memory: Any = compiled.memory_analysis()
    program = parse(compiled.as_text() or "")
    arguments = memory.argument_size_in_bytes
    return Compiled(
        peak=max(memory.peak_memory_in_bytes, arguments),
        arguments=arguments,
        traffic=memory_traffic(program),
        collectives=collectives(program, trainer.mesh.size, slices),
    )


def _out_of_memory(message: str) -> OutOfMemory | None:
    """Read "required for HLO temporaries (52.59G) exceeds available HBM (15.75G)" and "Used 20G of 15.75G hbm"."""
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if match := re.search(pattern, message):
            needed, available = float(match[1]) * UNITS[match[2]], float(match[3]) * UNITS[match[4]]
            return OutOfMemory(round(needed), round(available))
    return None
