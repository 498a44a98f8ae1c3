"""The least time that a step can take, and what bounds it: arithmetic, memory, or a network.

Collectives by the ring algorithm; a TPU sends both ways along every dimension of its torus that a group spans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from transformer_jax.hardware import Chip
from transformer_jax.planning.collectives import Collective, Groups
from transformer_jax.planning.target import Target

Way = tuple[bool, frozenset[tuple[int, int]]]
"""Whether something is sent beside the work, and from which device to which."""


@dataclass(frozen=True)
class Link:
    """What a group of devices talks over."""

    network: str
    """ICI and DCN for TPUs, NVLink and network for GPUs."""
    bandwidth: float | None
    """Bytes/s that a device takes in while all of the group talk; None: not published."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one device; what is None cannot be told."""

    compute: float | None
    memory: float
    networks: dict[str, float | None]
    exposed: float | None
    """Of the seconds of the networks, those in which nothing is computed."""

    @property
    def step(self) -> float | None:
        """Seconds of a step if everything that can run beside each other does, at full speed."""
        if self.compute is None or self.exposed is None:
            return None
        hidden = sum(seconds or 0.0 for seconds in self.networks.values()) - self.exposed
        return max(self.compute, self.memory, hidden) + self.exposed

    @property
    def bound(self) -> str:
        """What takes the longest."""
        parts = {"compute": self.compute, "memory": self.memory, **self.networks}
        known = {name: seconds for name, seconds in parts.items() if seconds is not None}
        return max(known, key=lambda name: known[name])


def roofline(
    target: Target, mesh: Mesh, *, flops: float, traffic: float, found: Iterable[Collective], dtype: str
) -> Roofline:
    """Combine the work of one device with what its chip can do.

    Args:
        target: where.
        mesh: how its devices are arranged.
        flops: matrix products of one device in a step, recomputation included.
        traffic: bytes between its memory and its arithmetic units.
        found: its collectives.
        dtype: precision of the products.
    """
    peak = target.chip.peak.get(dtype)
    networks: dict[str, float | None] = {}
    exposed: float | None = 0.0
    sent: dict[Way, float] = {}
    for collective in found:
        link = link_of(target, mesh, collective.groups)
        seconds = _seconds(collective, link)
        if seconds and collective.kind == "collective-permute":
            seconds = _beside(seconds, collective, sent)
        before = networks.get(link.network, 0.0)
        networks[link.network] = None if seconds is None or before is None else before + seconds
        if not collective.overlapped:
            exposed = None if seconds is None or exposed is None else exposed + seconds
    compute = None if peak is None else flops / peak
    return Roofline(compute, traffic / target.chip.memory_bandwidth, networks, exposed)


def _beside(seconds: float, collective: Collective, sent: dict[Way, float]) -> float:
    """Return by how much a permutation lengthens what was sent: links carry both directions at once.

    A TPU multiplies with a divided matrix while its pieces go round a ring, half of them either way.
    """
    pairs = collective.groups.tolist()
    there = collective.overlapped, frozenset((a, b) for a, b in pairs)
    back = collective.overlapped, frozenset((b, a) for a, b in pairs)
    before, opposite = sent.get(there, 0.0), sent.get(back, 0.0)
    sent[there] = before + seconds
    return max(sent[there], opposite) - max(before, opposite) if there != back else seconds


def _seconds(collective: Collective, link: Link) -> float | None:
    """Return the time of all calls of a collective."""
    if link.bandwidth is None:
        return None
    n = collective.groups.shape[1]
    share = {
        "all-reduce": 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
        "all-to-all": (n - 1) / n / 4,  # on a ring, pieces travel a quarter of the way on average
        "ragged-all-to-all": (n - 1) / n / 4,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(collective.kind, (n - 1) / n)
    return collective.times * collective.bytes * share / link.bandwidth


def link_of(target: Target, mesh: Mesh, groups: Groups) -> Link:
    """Find out what the devices of a group talk over, by their places."""
    devices = [mesh.devices.flat[i] for i in groups[0]]
    chip = target.chip
    if target.slice is None:
        hosts = {i // target.per_host for i in groups[0]}
        if len(hosts) == 1:
            return Link("NVLink", chip.link)
        cards = len(devices) // len(hosts)
        return Link("network", None if chip.network is None else min(chip.network * cards, chip.link))
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return Link("DCN", chip.network)
    places = np.asarray([device.coords for device in devices])
    spans = places.max(axis=0) - places.min(axis=0) + 1
    axes = [i for i, span in enumerate(spans) if span > 1]
    if not axes:  # two devices of one chip
        return Link("chip", chip.memory_bandwidth)
    rings = _rings(chip, target.slice.topology)
    both = sum(2 if spans[i] == target.slice.topology[i] and rings[i] else 1 for i in axes)
    return Link("ICI", chip.link * both)


def _rings(chip: Chip, topology: tuple[int, ...]) -> list[bool]:
    """Tell which dimensions of a slice close to a ring: in two dimensions whole ones, in three all of whole cubes."""
    if chip.axes == 3:
        return [all(n % chip.wraps == 0 for n in topology)] * 3
    return [n % chip.wraps == 0 for n in topology]


def as_groups(mesh: Mesh, *axes: str) -> Groups:
    """List the groups of devices along one axis of a mesh, or several, the first of which is the slowest to change."""
    ids: np.ndarray[Any, Any] = np.arange(mesh.size).reshape(list(mesh.shape.values()))
    places = [list(mesh.shape).index(axis) for axis in axes]
    last = range(-len(axes), 0)
    return np.moveaxis(ids, places, last).reshape(-1, math.prod(mesh.shape[axis] for axis in axes))
