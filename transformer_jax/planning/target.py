"""Where a run is planned for: a TPU slice or a number of GPUs, by name, and its devices although none is here."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from transformer_jax.errors import UserError, closest
from transformer_jax.hardware import CHIPS, Chip, chip_of
from transformer_jax.kernels import cudnn
from transformer_jax.launch.slices import Slice, check_slices, find_slice


@dataclass(frozen=True)
class Target:
    """Equal devices, some to a host."""

    name: str
    chip: Chip
    devices: int
    """JAX devices in all."""
    hosts: int
    slice: Slice | None = None
    """For TPUs."""
    slices: int = 1
    """As many of them, joined over the data-centre network."""

    @property
    def per_host(self) -> int:
        """Devices of one host."""
        return self.devices // self.hosts

    @property
    def chips(self) -> int:
        """What is paid for."""
        return self.slices * self.slice.chips if self.slice else self.devices

    @property
    def label(self) -> str:
        """Short: "v5e-16", or "2 x v5e-16"."""
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

    @property
    def typed(self) -> str:
        """As the options of the command line."""
        return f"--on {self.name}" + (f" --slices {self.slices}" if self.slices > 1 else "")

    def describe(self) -> str:
        """Say what the name stands for, in one line."""
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        several = f"{self.slices} slices over DCN, each " if self.slices > 1 else ""
        return several + self.slice.describe() if self.slice else f"{self.name}: {self.devices} GPUs on {hosts}"

    def stand_ins(self) -> list[Any]:
        """Return objects that a mesh takes for the devices: they have kind and place, and can do nothing."""
        if self.slice is None:
            return [
                StandIn(i, "gpu", self.chip.kinds[0], (i % self.per_host, 0, 0), 0, i // self.per_host)
                for i in range(self.devices)
            ]
        x, y, z = (*self.slice.topology, 1)[:3]
        places = [(a, b, c) for c, b, a in itertools.product(range(z), range(y), range(x))]
        each = itertools.product(range(self.slices), places, range(self.slice.generation.devices))
        return [
            StandIn(i, "tpu", self.chip.kinds[0], place, core, i // self.per_host, number)
            for i, (number, place, core) in enumerate(each)
        ]

    def compile_devices(self) -> list[Any] | None:
        """Return devices that XLA can compile for, or None if the compiler of this platform is not installed."""
        if self.slice is None:
            return self._gpus()
        if not _installed("libtpu"):
            return None
        told = {
            "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask a metadata server that is not there,
            "TPU_ACCELERATOR_TYPE": self.slice.accelerator_type,  # and complain that it does not know these two
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at once
        }
        for name, value in told.items():
            os.environ.setdefault(name, value)
        generation = self.slice.generation
        shape = self.slice.topology
        more: dict[str, Any] = {}
        if self.slice.chips == 1:
            more["chips_per_host_bounds"] = (1, 1, 1)
        if generation.name == "v4":
            more["chip_config_name"] = "megacore"  # one device a chip, as on Cloud TPU
        if self.slices > 1:
            more["num_slices"] = self.slices
        name = f"{generation.name}:{'x'.join(map(str, shape))}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)

    def _gpus(self) -> list[Any] | None:
        plugin = any(map(_installed, ("jax-cuda13-plugin", "jax-cuda12-plugin")))
        if self.chip.name not in GPUS or not plugin or not cudnn.installed():
            return None
        shape = {"topology": f"1x{self.hosts}x{self.per_host}", "target_config": _gpu_config(self.chip)}
        return list(topologies.get_topology_desc(platform="cuda", topology_name=self.chip.name, **shape).devices)


@dataclass(frozen=True)
class StandIn:
    """What JAX's mesh asks of a device."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int
    process_index: int
    slice_index: int = 0
    client: None = None


GPUS = {
    # Cores, compute capability, bytes of shared memory (a core, a block), bytes of L2, GHz.
    "a100-40gb": (108, (8, 0), 167_936, 166_912, 40 * 2**20, 1.41),
    "a100-80gb": (108, (8, 0), 167_936, 166_912, 40 * 2**20, 1.41),
    "h100": (132, (9, 0), 233_472, 232_448, 50 * 2**20, 1.98),
    "h200": (132, (9, 0), 233_472, 232_448, 50 * 2**20, 1.98),
}
"""What XLA has to know to compile for a GPU that is not here."""


def _gpu_config(chip: Chip) -> str:
    """Describe a GPU as XLA's `GpuTargetConfig`, in the text form of protocol buffers."""
    cores, (major, minor), shared, block, cache, clock = GPUS[chip.name]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": block,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128 if major > 8 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": round(chip.memory_bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": round(chip.memory),
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{chip.kinds[0]}"'
    )


def find_target(name: str, slices: int = 1) -> Target:
    """Return what `name` stands for: a TPU slice (v5e-16, v5p-128, v4-32) or GPUs (h100-8, a100-80gb-16).

    Args:
        name: of one slice, or of all GPUs.
        slices: how many of them.

    Raises:
        UserError: there is none; the closest is named.
    """
    kind, _, number = name.strip().lower().rpartition("-")
    gpus = {chip.name: chip for chip in CHIPS if chip.platform == "gpu"}
    if kind in gpus and re.fullmatch("[1-9][0-9]*", number):
        chip, devices = gpus[kind], int(number)
        hosts = -(-devices // chip.devices_per_host)
        if devices % hosts:
            raise UserError(f"--on {name}: {devices} GPUs do not fill {hosts} hosts of {chip.devices_per_host}.")
        if slices != 1:
            raise UserError(f"--slices says nothing about GPUs, only their number does: --on {kind}-{devices}.")
        return Target(name, chip, devices, hosts)
    try:
        found = find_slice(name)
    except UserError as error:
        if near := closest(name.lower(), [f"{gpu}-8" for gpu in gpus]):
            raise UserError(f"there is neither a TPU slice nor a GPU '{name}'.{near}") from error
        raise
    known = chip_of(found.generation.name)
    if known is None:
        raise UserError(f"nothing is known of the chips of {found.name}; see transformer_jax/hardware.py.")
    check_slices(found, slices)
    return Target(found.name, known, slices * found.devices, slices * found.hosts, found, slices)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
