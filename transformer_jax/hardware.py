"""What accelerators can do, by the name JAX gives them: peaks, memory, networks, hosts. From the vendors' pages only.

A chip that is not in the table has no peak, and a figure that needs one is "n/a", never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Chip:
    """One JAX device: a TPU chip (v2, v3 and tpu7x show two of them a chip), or a GPU."""

    name: str
    """What people call it: "v5e", "h100"."""
    kinds: tuple[str, ...]
    """What `jax.Device.device_kind` says; several spellings are about."""
    platform: str
    """ "tpu" or "gpu"."""
    peak: dict[str, float]
    """Dense FLOP/s (int8: operations/s) by the precision of a matrix product's inputs.

    A float32 product runs at JAX's default precision: bfloat16 passes on TPU, TF32 on GPU.
    """
    memory: float
    """Bytes of HBM."""
    memory_bandwidth: float
    """Bytes/s of HBM."""
    link: float
    """Bytes/s in one direction: a TPU's link to one neighbour, or all NVLinks of a GPU together."""
    devices_per_host: int
    host_memory: float | None
    """Bytes of RAM that the virtual machine (TPU) or server (GPU) has for each device; None: not published."""
    network: float | None = None
    """Bytes/s in one direction that a device's share of its host's network cards gives; None: not published."""
    axes: int = 0
    """Dimensions of the TPU network; 0 for GPUs, which all reach each other."""
    wraps: int = 1
    """A TPU network's dimension closes to a ring when its length is a multiple of this."""
    source: str = ""


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    tflops: float,
    int8: float | None,
    gib: float,
    gbps: float,
    link: float,
    axes: int,
    wraps: int,
    *,
    host_gb: float | None = None,
    gbit: float | None = None,
    cores: int = 1,
    source: str = "",
) -> Chip:
    """Take the figures of one chip as published; its `cores` JAX devices share them."""
    peak = {"bfloat16": tflops * TERA / cores, "float32": tflops * TERA / cores}
    return Chip(
        name=name,
        kinds=kinds,
        platform="tpu",
        peak=peak if int8 is None else peak | {"int8": int8 * TERA / cores},
        memory=gib * GIB / cores,
        memory_bandwidth=gbps * GIGA / cores,
        link=link * GIGA / cores,
        devices_per_host=4 * cores,
        host_memory=None if host_gb is None else host_gb * GIGA / cores,
        network=None if gbit is None else gbit * GIGA / 8 / cores,
        axes=axes,
        wraps=wraps,
        source=source or f"{_GOOGLE}{name}",
    )


def _gpu(
    name: str,
    kind: str,
    tflops: float,
    tf32: float,
    int8: float,
    gib: float,
    gbps: float,
    link: float,
    source: str,
    *,
    network: float | None = None,
    host_gb: float | None = None,
) -> Chip:
    return Chip(
        name=name,
        kinds=(kind,),
        platform="gpu",
        peak={"bfloat16": tflops * TERA, "float32": tf32 * TERA, "int8": int8 * TERA},
        memory=gib * GIB,
        memory_bandwidth=gbps * GIGA,
        link=link * GIGA,
        devices_per_host=8,
        host_memory=None if host_gb is None else host_gb * GIGA,
        network=None if network is None else network * GIGA,
        source=f"{_NVIDIA}{source}",
    )


_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_PAPER = "Jouppi 2020, A Domain-Specific Supercomputer for Training Deep Neural Networks, table 1"

CHIPS = (
    # TFLOP/s bfloat16, TOP/s int8, GiB, GB/s, GB/s of a link in one direction, dimensions, ring from this length on.
    # The pages give the bandwidth of all links in both directions: a link in one direction has that over 2 x links.
    # gbit: of the data-centre network, per chip; the pages of v5e and v6e give that of a pod of 256 (6.4, 25.6 Tbit/s).
    # RAM is that of the machine types ct4p, ct5lp, ct5p, ct6e and tpu7x for each chip.
    _tpu("v2", ("TPU v2",), 45, None, 16, 700, 62, 2, 16, cores=2, source=_PAPER),
    _tpu("v3", ("TPU v3",), 123, None, 32, 900, 82, 2, 32, cores=2, source=f"{_GOOGLE}v3; links: {_PAPER}"),
    _tpu("v4", ("TPU v4",), 275, 275, 32, 1200, 50, 3, 4, host_gb=102),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 393, 16, 819, 50, 2, 16, host_gb=48, gbit=25),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 918, 95, 2765, 100, 3, 4, host_gb=112, gbit=50),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 1836, 32, 1638, 100, 2, 16, host_gb=180, gbit=100),
    _tpu("tpu7x", ("TPU7x", "TPU v7x"), 2307, None, 192, 7380, 100, 3, 4, host_gb=240, gbit=100, cores=2),
    # TFLOP/s bfloat16 and TF32, TOP/s int8, all dense; GiB, GB/s, GB/s of NVLink (PCIe without it) in one direction.
    # Network and RAM are those of a DGX server for each GPU; other servers differ.
    _gpu("l4", "NVIDIA L4", 121, 60, 242, 24, 300, 32, "l4/"),
    _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 312, 156, 624, 40, 1555, 300, "a100/", network=25, host_gb=128),
    _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 312, 156, 624, 80, 2039, 300, "a100/", network=25, host_gb=256),
    _gpu("h100", "NVIDIA H100 80GB HBM3", 989, 494, 1979, 80, 3350, 450, "h100/", network=50, host_gb=256),
    _gpu("h100-pcie", "NVIDIA H100 PCIe", 756, 378, 1513, 80, 2000, 64, "h100/"),
    _gpu("h200", "NVIDIA H200", 989, 494, 1979, 141, 4800, 450, "h200/", network=50, host_gb=256),
    _gpu("b200", "NVIDIA B200", 2250, 1125, 4500, 180, 8000, 900, "hgx/", network=50, host_gb=512),
)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls `device_kind` ("TPU v5 lite", "v5e", "NVIDIA H100 80GB HBM3"), or None."""
    wanted = device_kind.strip().lower()
    for chip in CHIPS:
        if wanted in {chip.name, *(kind.lower() for kind in chip.kinds)}:
            return chip
    return None


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Return the dense FLOP/s of one device in a precision, or None where no vendor's figure is at hand."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak.get(dtype)


def utilisation(flops_per_second: float, device_kind: str, devices: int, dtype: str = "bfloat16") -> float | None:
    """Return the share of the peak of `devices` devices, or None for a chip without a published peak.

    Raises:
        ValueError: the share is above 1: the FLOPs, the clock or the number of devices is wrong.
    """
    peak = peak_flops(device_kind, dtype)
    if peak is None:
        return None
    share = flops_per_second / (peak * devices)
    if share > 1:
        raise ValueError(f"{flops_per_second:.3g} FLOP/s is {share:.0%} of the peak of {devices} x {device_kind}")
    return share
