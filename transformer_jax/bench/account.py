"""From seconds to utilisation: conventions side by side, recomputation, the roofline. Impossible shares are errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from transformer_jax import flops as counting
from transformer_jax.bench.batches import Shapes, length_of, rows_of, shapes_of, sized
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.errors import UserError
from transformer_jax.hardware import TERA
from transformer_jax.nn.module import Skeleton
from transformer_jax.planning.traced import estimated
from transformer_jax.train import Trainer

LEAST = 0.99
"""A program whose matrix products are less than this share of the model's leaves work out."""

SHORT = 8
"""Tokens of a row on which that is looked at: few, so that masked scores make up for nothing that is left out."""

RANKED = "matmuls, causal attention halved"
"""The convention that this library ranks by."""


@dataclass(frozen=True)
class Work:
    """FLOPs of one step."""

    model: dict[str, int | None]
    """By the name of the convention."""
    hardware: int | None
    """Matrix products that the program computes on all devices: recomputation and masked scores included.

    None where kernels that do not say what they compute take part.
    """


def work_of(trainer: Trainer, shapes: Shapes) -> Work:
    """Count the work of a step by the conventions, and in the program itself.

    Raises:
        UserError: the program computes less than the model has to.
    """
    check_complete(trainer)
    model = counting.count(trainer.experiment.model, shapes).named()
    traced = estimated(trainer).flops * trainer.mesh.size
    backend = trainer.skeleton.compute.attention
    # Kernels: cuDNN's says nothing of its work, and a loop that is left early is counted as one turn.
    told = backend == "xla" or (backend != "cudnn" and traced >= (model[RANKED] or 0))
    return Work(model, traced if told else None)


def check_complete(trainer: Trainer) -> None:
    """Raise `UserError` if the step leaves out matrix products of the model, traced on short rows, attention plain."""
    rows = rows_of(shapes_of(trainer.experiment))
    experiment = sized(trainer.experiment, rows, min(SHORT, length_of(shapes_of(trainer.experiment))))
    skeleton = Skeleton.of(experiment.model, replace(trainer.skeleton.compute, attention="xla"))
    traced = estimated(replace(trainer, experiment=experiment, skeleton=skeleton)).flops * trainer.mesh.size
    wanted = counting.count(experiment.model, shapes_of(experiment)).matmuls
    if traced < LEAST * wanted:
        raise UserError(
            f"the step computes {traced / wanted:.0%} of the model's matrix products ({traced:.3g} of {wanted:.3g} "
            f"FLOPs on rows of {SHORT} tokens): it leaves work out, no figure is given."
        )


def settled(work: Work, seconds: float, ceilings: Ceilings, devices: int) -> Ceilings:
    """Measure a measured peak once more where a step seems to be faster: other programs may have slowed it down."""
    most = max(work.model[RANKED] or 0, work.hardware or 0) / seconds
    return ceilings.again() if ceilings.measured and most > ceilings.peak * devices else ceilings


def shares(work: Work, seconds: float, ceilings: Ceilings, devices: int) -> dict[str, Any]:
    """Return utilisation by convention, that of the hardware, and the share of the measured rate of a product.

    Raises:
        UserError: the work of the model, or of the program, is more than the devices can do in that time.
    """
    peak = ceilings.peak * devices

    def share(flops: int | None) -> float | None:
        return None if flops is None else flops / seconds / peak

    mfu, hfu = {name: share(flops) for name, flops in work.model.items()}, share(work.hardware)
    for name, found in (("MFU", mfu[RANKED]), ("HFU", hfu)):
        if found is not None and found > 1:
            raise UserError(
                f"{name} is {found:.0%} of {peak / TERA:.3g} TFLOP/s ({ceilings.peak_source}): the step, the clock or "
                "the peak is wrong, no figure is given."
            )
    ranked = work.model[RANKED] or 0
    return {
        "ranked_by": RANKED,
        "mfu": mfu,
        "hfu": hfu,
        "share_of_matmul_rate": ranked / seconds / (ceilings.matmul * devices),
        "model_flops_per_second": ranked / seconds,
    }


def roofline(work: Work, traffic: int, seconds: float, ceilings: Ceilings, devices: int) -> dict[str, Any]:
    """Say whether arithmetic or memory bounds the step of one device, by what was measured on it in this run.

    Traffic is what the compiled program moves if nothing stays in caches; where that alone would take longer than the
    step took, some does, and arithmetic is the only bound that is known.
    """
    flops = (work.hardware or work.model[RANKED] or 0) / devices
    compute, memory = flops / ceilings.matmul, traffic / ceilings.copy
    cached = memory > seconds
    return {
        "bound": "memory" if memory > compute and not cached else "compute",
        "in_cache": cached,
        "compute_share": compute / seconds,
        "memory_share": memory / seconds,
        "flops_per_byte": flops / max(traffic, 1),
        "ridge": ceilings.matmul / ceilings.copy,
        "bytes": traffic,
    }


def device_memory() -> int | None:
    """Most bytes that this process has held on its first device, or None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
