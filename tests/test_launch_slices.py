"""Laws of the table of Cloud TPU slices: what a name means, and what a wrong one is answered."""

from __future__ import annotations

import math

import pytest

from transformer_jax.errors import UserError
from transformer_jax.launch.slices import GENERATIONS, find_slice, known_slices

# As the vendor's pages list them: name, accelerator type, chips, hosts, topology, JAX devices.
LISTED = [
    ("v2-8", "v2-8", 4, 1, "2x2", 8),
    ("v2-512", "v2-512", 256, 64, "16x16", 512),
    ("v3-32", "v3-32", 16, 4, "4x4", 32),
    ("v3-2048", "v3-2048", 1024, 256, "32x32", 2048),
    ("v4-8", "v4-8", 4, 1, "2x2x1", 4),
    ("v4-32", "v4-32", 16, 4, "2x2x4", 16),
    ("v4-128", "v4-128", 64, 16, "4x4x4", 64),
    ("v4-4096", "v4-4096", 2048, 512, "8x16x16", 2048),
    ("v5e-1", "v5litepod-1", 1, 1, "1x1", 1),
    ("v5e-8", "v5litepod-8", 8, 1, "2x4", 8),
    ("v5e-16", "v5litepod-16", 16, 4, "4x4", 16),
    ("v5e-256", "v5litepod-256", 256, 64, "16x16", 256),
    ("v5p-8", "v5p-8", 4, 1, "2x2x1", 4),
    ("v5p-32", "v5p-32", 16, 4, "2x2x4", 16),
    ("v5p-256", "v5p-256", 128, 32, "4x4x8", 128),
    ("v5p-1024", "v5p-1024", 512, 128, "8x8x8", 512),
    ("v5p-12288", "v5p-12288", 6144, 1536, "16x16x24", 6144),
    ("v6e-8", "v6e-8", 8, 1, "2x4", 8),
    ("v6e-256", "v6e-256", 256, 64, "16x16", 256),
    ("tpu7x-8", "tpu7x-8", 4, 1, "2x2x1", 8),
    ("tpu7x-128", "tpu7x-128", 64, 16, "4x4x4", 128),
]


@pytest.mark.parametrize("row", LISTED, ids=lambda row: row[0])
def test_slices_are_as_the_vendor_lists_them(row):
    name, *facts = row
    found = find_slice(name)
    assert [found.accelerator_type, found.chips, found.hosts, found.topology_name, found.devices] == facts
    assert find_slice(found.accelerator_type) == found


def test_every_slice_adds_up():
    known = known_slices()
    assert {found.generation.name for found in known.values()} == set(GENERATIONS)
    for name, found in known.items():
        assert find_slice(name) == found
        assert math.prod(found.topology) == found.chips <= found.generation.largest
        assert found.hosts * found.chips_per_host == found.chips
        assert found.chips_per_host in (1, 4, 8)
        assert found.number == found.chips * found.generation.counted


def test_the_default_shape_is_the_one_closest_to_a_cube():
    for found in known_slices().values():
        if found.chips < 64 or len(found.topology) == 2:
            continue
        a, b, c = found.topology
        assert a <= b <= c
        assert not any(size % 4 for size in found.topology)
        n = found.chips // 64
        others = [
            (x, y, n // x // y) for x in range(1, n + 1) if n % x == 0 for y in range(x, n // x + 1) if n // x % y == 0
        ]
        spans = [4 * (z - x) for x, y, z in others if y <= z]
        assert c - a == min(spans)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5p-4", ["v5p-8 (4 chips)", "TensorCores, two to a chip"]),
        ("v5p-48", ["v5p-32 (16 chips) or v5p-64 (32 chips)"]),
        ("v5e-12", ["v5e-8 (8 chips) or v5e-16 (16 chips)", "counts chips"]),
        ("v6e-512", ["v6e-256"]),
        ("v6-16", ["Did you mean 'v6e-16'?"]),
        ("v5-litepod-8", ["there is no TPU slice"]),
        ("h100-8", ["there is no TPU slice 'h100-8'"]),
        ("v4", ["there is no TPU slice 'v4'"]),
    ],
)
def test_a_slice_that_does_not_exist_names_the_closest(name, parts):
    with pytest.raises(UserError) as error:
        find_slice(name)
    for part in parts:
        assert part in str(error.value)
