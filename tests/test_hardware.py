"""Laws of the table of chips."""

from __future__ import annotations

import pytest

from transformer_jax.hardware import CHIPS, chip_of, peak_flops, utilisation
from transformer_jax.launch.slices import GENERATIONS


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("tpu V5 Lite", 197),
    ],
)
def test_every_spelling_of_a_device_kind_finds_its_peak(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize(("kind", "published"), [("TPU v3", 123), ("TPU v2", 45), ("TPU7x", 2307)])
def test_two_devices_share_a_chip(kind, published):
    chip = chip_of(kind)
    assert 2 * chip.peak["bfloat16"] == published * 1e12
    assert chip.devices_per_host == 8


@pytest.mark.parametrize("kind", ["cpu", "TPU v9", "NVIDIA H100", "", "NVIDIA GeForce RTX 4090"])
def test_an_unknown_chip_has_no_peak(kind):
    assert chip_of(kind) is None
    assert peak_flops(kind) is None
    assert utilisation(1e12, kind, devices=8) is None


def test_a_precision_that_is_not_published_has_no_peak():
    assert peak_flops("TPU v3", "int8") is None
    assert peak_flops("TPU v5e", "int8") == 393e12


def test_utilisation_is_a_share_of_all_devices():
    assert utilisation(0.4 * 16 * 275e12, "TPU v4", devices=16) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="125%"):
        utilisation(1.25 * 16 * 275e12, "TPU v4", devices=16)


def test_names_are_unique_and_figures_in_their_units():
    names = [name for chip in CHIPS for name in {n.lower() for n in (chip.name, *chip.kinds)}]
    assert len(names) == len(set(names))
    for chip in CHIPS:
        assert 1e13 < chip.peak["bfloat16"] < 1e16
        assert 2**32 < chip.memory < 2**38
        assert 1e11 < chip.memory_bandwidth < 1e13
        assert 1e10 < chip.link < 1e12
        assert chip.source


def test_every_generation_of_slices_has_a_chip_with_as_many_devices():
    for generation in GENERATIONS.values():
        chip = chip_of(generation.name)
        assert chip.devices_per_host == 4 * generation.devices
        assert chip.axes == len(generation.topologies[0])
