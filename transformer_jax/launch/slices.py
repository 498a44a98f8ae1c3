"""Cloud TPU slices by name: chips, hosts, topology, and what each vendor's tool calls them.

The number in a name counts TensorCores for v2, v3, v4, v5p and tpu7x, two to a chip, and chips for v5e and v6e:
v5p-32 and v5e-16 are 16 chips each. Chips come four to a host, but up to 8 of v5e and v6e stand in one.
Source: the pages of the generations under https://cloud.google.com/tpu/docs.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from transformer_jax.errors import UserError, closest


@dataclass(frozen=True)
class Generation:
    """What the slices of one TPU generation have in common."""

    name: str
    """As in `v5e-16`."""
    prefix: str
    """As in the accelerator type `v5litepod-16`."""
    counted: int
    """What one chip adds to the number in the name: 2 where it counts TensorCores, 1 where it counts chips."""
    devices: int
    """JAX devices of a chip."""
    topologies: tuple[tuple[int, ...], ...]
    """Shapes of small slices in chips."""
    largest: int
    """Chips of the largest slice."""
    one_host: int
    """Chips that a single host can have."""
    runtime: str
    """TPU software version; empty where the Cloud TPU API does not serve the generation."""
    gke: str = ""
    """Label of its GKE nodes; empty where GKE has none."""
    machine: str = ""
    """Machine type of its GKE nodes, without the number of chips."""

    @property
    def cubes(self) -> bool:
        """Whether slices larger than the listed ones are made of cubes of 4 x 4 x 4 chips."""
        return len(self.topologies[0]) == 3

    def shape(self, chips: int) -> tuple[int, ...] | None:
        """Return the topology that a number of chips gets by default, or None if there is no such slice."""
        for shape in self.topologies:
            if math.prod(shape) == chips:
                return shape
        if not self.cubes or chips % 64 or chips > self.largest:
            return None
        n = chips // 64
        shapes = [(a, b, n // a // b) for a in _divisors(n) for b in _divisors(n // a) if a <= b <= n // a // b]
        a, b, c = min(shapes, key=lambda shape: shape[2] - shape[0])  # the default is the shape closest to a cube
        return (4 * a, 4 * b, 4 * c)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SMALL_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))

GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v2", "v2", 2, 2, ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)), 256, 4, "tpu-ubuntu2204-base"),
        Generation(
            "v3",
            "v3",
            2,
            2,
            ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
            1024,
            4,
            "tpu-ubuntu2204-base",
        ),
        Generation("v4", "v4", 2, 1, _SMALL_3D, 4096, 4, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"),
        Generation(
            "v5e", "v5litepod", 1, 1, _SMALL_2D, 256, 8, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"
        ),
        Generation("v5p", "v5p", 2, 1, _SMALL_3D, 6144, 4, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
        Generation("v6e", "v6e", 1, 1, _SMALL_2D, 256, 8, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
        Generation("tpu7x", "tpu7x", 2, 2, ((1, 1, 1), *_SMALL_3D), 9216, 4, "", "tpu7x", "tpu7x-standard"),
    )
}

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}


@dataclass(frozen=True)
class Slice:
    """One slice, by all its names."""

    generation: Generation
    chips: int
    topology: tuple[int, ...]

    @property
    def number(self) -> int:
        """The number in its name."""
        return self.chips * self.generation.counted

    @property
    def name(self) -> str:
        """What people call it: v5e-16."""
        return f"{self.generation.name}-{self.number}"

    @property
    def accelerator_type(self) -> str:
        """What the Cloud TPU API and xpk call it: v5litepod-16."""
        return f"{self.generation.prefix}-{self.number}"

    @property
    def topology_name(self) -> str:
        """What GKE calls its shape: 4x4."""
        return "x".join(map(str, self.topology))

    @property
    def hosts(self) -> int:
        """Virtual machines, each with one worker process."""
        return 1 if self.chips <= self.generation.one_host else self.chips // 4

    @property
    def chips_per_host(self) -> int:
        """Chips that each worker process sees."""
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        """Length of `jax.devices()` on it."""
        return self.chips * self.generation.devices

    def describe(self) -> str:
        """Return the line that prevents a misunderstanding of the name."""
        counted = "TensorCores" if self.generation.counted == 2 else "chips"
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        return f"{self.name}: {self.chips} chips ({self.topology_name}) on {hosts}; the number counts {counted}"


@functools.cache
def known_slices() -> dict[str, Slice]:
    """Return every slice by name, smallest first in each generation."""
    found = {}
    for generation in GENERATIONS.values():
        sizes = {math.prod(shape) for shape in generation.topologies}
        sizes |= set(range(64, generation.largest + 1, 64)) if generation.cubes else set()
        for chips in sorted(sizes):
            if shape := generation.shape(chips):
                new = Slice(generation, chips, shape)
                found[new.name] = new
    return found


def sizes_of(generation: str) -> list[str]:
    """Return the names of some slices of a generation, smallest first; none if there is no such generation."""
    name = ALIASES.get(generation.lower(), generation.lower())
    found = [one.name for one in known_slices().values() if one.generation.name == name]
    return found if len(found) <= 10 else [*found[:8], "...", found[-1]]


def check_slices(one: Slice, slices: int) -> None:
    """Raise `UserError` if there cannot be so many slices of this type in one job."""
    if slices < 1:
        raise UserError(f"--slices must be at least 1, got {slices}.")
    if slices > 1 and one.generation.name in ("v2", "v3"):  # the vendor's page on multislice
        raise UserError(f"slices are joined from v4 on; {one.name} stands alone: --slices 1.")


def find_slice(name: str) -> Slice:
    """Return the slice that `name` stands for: v5e-16, v5litepod-16, v4-32.

    Raises:
        UserError: there is none; the closest is named, and what the numbers of that generation count.
    """
    if several := re.fullmatch(r"([1-9]\d*) *[x*] *(.+)", name.strip()):
        raise UserError(f"--on {name}: several slices are given as --on {several[2]} --slices {several[1]}.")
    prefix, _, number = name.strip().lower().partition("-")
    generation = GENERATIONS.get(ALIASES.get(prefix, prefix))
    known = known_slices()
    if generation is None or not re.fullmatch(r"\d+", number):
        raise UserError(f"there is no TPU slice '{name}'.{closest(name.lower(), known)}")
    if found := known.get(f"{generation.name}-{int(number)}"):
        return found
    own = [s for s in known.values() if s.generation is generation]
    below = [s for s in own if s.number < int(number)][-1:]
    above = [s for s in own if s.number > int(number)][:1]
    near = " or ".join(f"{s.name} ({s.chips} chips)" for s in below + above)
    counts = "TensorCores, two to a chip" if generation.counted == 2 else "chips"
    raise UserError(f"there is no TPU slice '{name}': {generation.name} comes as {near}; the number counts {counts}.")
