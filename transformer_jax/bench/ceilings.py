"""What the device can do: measured in the same run, and the vendor's figure where the chip is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from transformer_jax.bench.timing import Timing
from transformer_jax.errors import UserError
from transformer_jax.hardware import TERA, chip_of

SIDE = {"cpu": 1024}
"""Side of the square matrices whose product is timed, by backend; 8192 elsewhere."""
COPIED = {"cpu": 2**27}
"""Bytes of the array that is copied, by backend (far beyond a CPU's caches); 1 GiB elsewhere."""
REPEATS = 20
TOLERANCE = 1.05
"""A measured rate above the vendor's by more than this factor means that the chip, the table or the clock is wrong."""
FAR = 4.0
"""A peak given by hand that is so many times what a matrix product reaches is doubted aloud."""


@dataclass(frozen=True)
class Ceilings:
    """Of one device and one precision."""

    device: str
    dtype: str
    matmul: float
    """FLOP/s of the fastest of several products of large square matrices, in this run."""
    copy: float
    """Bytes/s, read and written, of the fastest of several passes over a large array, in this run."""
    peak: float
    """FLOP/s that utilisation is a share of."""
    peak_source: str
    bandwidth: float
    """Bytes/s that the decoding floor is computed with: the vendor's, or the measured one."""
    bandwidth_source: str
    doubt: str = ""
    """What a reader should know about the peak."""

    @property
    def measured(self) -> bool:
        """Whether the peak is the measured rate."""
        return self.peak_source.startswith("measured")

    def again(self) -> Ceilings:
        """Measure once more and keep the best: other programs on the machine may have slowed the first one down."""
        matmul, copy = max(self.matmul, matmul_rate(self.dtype)), max(self.copy, copy_rate())
        return replace(
            self,
            matmul=matmul,
            copy=copy,
            peak=matmul if self.measured else self.peak,
            bandwidth=copy if self.bandwidth_source.startswith("measured") else self.bandwidth,
        )


def ceilings(dtype: str, given: float = 0.0) -> Ceilings:
    """Measure the device, and decide what the peak is.

    Args:
        dtype: precision of the products.
        given: TFLOP/s of one device that the user names, for a chip that is not in the table of `hardware.py`; 0: none.

    Raises:
        UserError: the given peak contradicts the vendor's or what a matrix product reached, or the measured rate is
            above the vendor's peak.
    """
    kind, given = jax.devices()[0].device_kind, given * TERA
    chip = chip_of(kind)
    vendor = None if chip is None else chip.peak.get(dtype)
    if not given >= 0:
        raise UserError(f"--peak must be positive, got {given / TERA:g} TFLOP/s.")
    if given and chip and vendor and abs(given / vendor - 1) > 0.01:
        raise UserError(
            f"--peak {given / TERA:g} TFLOP/s contradicts the vendor's {vendor / TERA:g} TFLOP/s ({dtype}) of a {kind} "
            f"({chip.source}); leave it out."
        )
    matmul, copy, doubt = matmul_rate(dtype), copy_rate(), ""
    if vendor and matmul > TOLERANCE * vendor:
        raise UserError(
            f"a matrix product reached {matmul / TERA:.3g} TFLOP/s, above the peak of {vendor / TERA:g} TFLOP/s of a "
            f"{kind}: the clock or the table is wrong, no figure is given."
        )
    if given and matmul > TOLERANCE * given:
        raise UserError(
            f"--peak {given / TERA:g} TFLOP/s is wrong: a matrix product of this device reached {matmul / TERA:.3g} "
            "TFLOP/s in this run. Leave it out, and the measured rate is the peak."
        )
    if given and not vendor and given > FAR * matmul:
        doubt = f"a matrix product reached only {matmul / given:.0%} of the peak given by --peak: is it this device's?"
    side = SIDE.get(jax.default_backend(), 8192)
    measured = f"measured: the fastest of {REPEATS} products of {side} x {side} {dtype} matrices in this run"
    return Ceilings(
        device=kind,
        dtype=dtype,
        matmul=matmul,
        copy=copy,
        peak=vendor or given or matmul,
        peak_source=f"vendor: {chip.source}" if chip and vendor else "given by --peak" if given else measured,
        bandwidth=chip.memory_bandwidth if chip else copy,
        bandwidth_source=f"vendor: {chip.source}"
        if chip
        else "measured: the fastest of several passes over a large array in this run",
        doubt=doubt,
    )


def busy() -> str:
    """Say if other programs keep the cores busy that a CPU's figures are about; "" if not, or on an accelerator."""
    if jax.default_backend() != "cpu":
        return ""
    import psutil  # noqa: PLC0415 - only where cores are what is measured

    cores = psutil.cpu_count() or 1
    # While we sleep; a load average would still hold the run before.
    kept = psutil.cpu_percent(interval=0.5) / 100 * cores
    if kept < 0.25 * cores:
        return ""
    return f"other programs kept {kept:.1f} of {cores} cores busy before this run began: its figures are disturbed"


def matmul_rate(dtype: str) -> float:
    """FLOP/s of the fastest product of two square matrices on one device.

    Their entries are random: on constant ones a GPU draws less power, and clocks higher than a model lets it.
    """
    n = SIDE.get(jax.default_backend(), 8192)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    return 2.0 * n**3 / _fastest(partial(_product, a, b))


def copy_rate() -> float:
    """Bytes/s, read and written, of the fastest pass over a large array on one device, in place."""
    size = COPIED.get(jax.default_backend(), 2**30)
    x = jnp.zeros(size // 4, jnp.float32)

    def run() -> jax.Array:
        nonlocal x
        x = _add(x)
        return x

    return 2.0 * size / _fastest(run)


_product = jax.jit(jnp.matmul)
_add = jax.jit(lambda x: x + 1.0, donate_argnums=0)


def _fastest(run: Callable[[], object]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(Timing(tuple(seconds)).seconds)
