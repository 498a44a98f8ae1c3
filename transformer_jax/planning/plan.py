"""A plan: everything about a training step on devices that are not here, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformer_jax.config import Experiment
from transformer_jax.flops import Flops
from transformer_jax.planning.roofline import Roofline
from transformer_jax.planning.target import Target
from transformer_jax.provenance import provenance

Source = Literal["compiler", "estimate"]

DAY = 86_400.0


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
    remarks: list[str]
    """What is unusual about the program."""
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory; the compiler of TPUs would have refused."""
        refused = self.source == "compiler" and self.target.chip.platform == "tpu"
        return refused or self.memory.fits

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
    def full_steps(self) -> float:
        """Steps of the recipe, those with smaller batches at its beginning counted by their rows."""
        data = vars(self.experiment.data)
        early = ((1 - rows / data["batch_rows"]) * steps for rows, steps in data.get("ramp", ()))
        return self.experiment.train.steps - sum(early)

    @property
    def days(self) -> float | None:
        """Days to the last step of the recipe."""
        return None if not self.roofline.step else self.full_steps * self.roofline.step / DAY

    def cost(self, price: float) -> float | None:
        """Return the price of the run, at `price` per chip and hour."""
        return None if self.days is None else self.days * 24 * self.target.chips * price

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "experiment": self.experiment.name,
            "source": self.source,
            "on": {"name": self.target.name, "slices": self.target.slices, "chip": self.target.chip.name}
            | {"devices": self.target.devices, "hosts": self.target.hosts},
            "mesh": self.mesh,
            "compute": vars(self.experiment.compute),
            "accumulate": self.experiment.train.accumulate,
            "parameters": self.parameters,
            "active_parameters": self.flops.active,
            "tokens_per_step": self.flops.tokens,
            "flops_per_step": {**self.flops.named(), "computed": self.computed_flops},
            "memory_per_device": {**asdict(self.memory), "total": self.memory.total, "fits": self.fits},
            "memory_traffic_per_device": self.traffic,
            "collectives_per_device": [asdict(move) for move in self.moves],
            "seconds": {**asdict(self.roofline), "step": self.roofline.step, "bound": self.roofline.bound},
            "model_flops_utilisation": self.utilisation,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": None if self.tokens_per_second is None else self.tokens_per_second * DAY,
            "steps": self.experiment.train.steps,
            "days": self.days,
            "host_memory": {"checkpoint": self.host_memory, "available": self.host_available},
            "remarks": self.remarks,
            "note": self.note,
            "provenance": provenance(),
        }

    @property
    def host_available(self) -> int | None:
        """Bytes of RAM of a host, where published."""
        one = self.target.chip.host_memory
        return None if one is None else round(one * self.target.per_host)
