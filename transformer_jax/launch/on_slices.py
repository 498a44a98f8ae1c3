"""What every way to Cloud TPU has: slices of one type, a project and a place in it, a bucket."""

from __future__ import annotations

from dataclasses import dataclass

from transformer_jax.launch.job import Backend
from transformer_jax.launch.slices import Slice


@dataclass(frozen=True)
class OnSlices(Backend):
    """One or more slices of Cloud TPU, one process a host."""

    slice: Slice
    project: str
    zone: str
    """Zone; of a GKE cluster, zone or region."""
    bucket: str
    """gs://BUCKET or gs://BUCKET/FOLDER; the run lies in a folder of the job's name."""
    slices: int = 1
    spot: bool = False

    @property
    def times(self) -> str:
        """What stands before the name of the slice: "2 x ", or nothing."""
        return f"{self.slices} x " if self.slices > 1 else ""

    def describe(self) -> str:
        """Say what is asked for, in one line."""
        several = f"{self.slices} slices over DCN, each " if self.slices > 1 else ""
        return several + self.slice.describe()

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.slice.chips

    @property
    def devices(self) -> int | None:
        """JAX devices of all slices."""
        return self.slices * self.slice.devices

    @property
    def workers(self) -> int:
        """One a host."""
        return self.slices * self.slice.hosts
