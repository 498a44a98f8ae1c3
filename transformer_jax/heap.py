"""The heap of a process whose programs run on CPUs."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
KEPT = 2**31 - 1
"""Bytes of free memory that are kept; what is more goes back to the system."""
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
"""Where NVIDIA's, AMD's and Google's drivers show what they have."""


def on_cpu() -> bool:
    """Tell whether this machine shows no accelerator."""
    return not any(Path(device).exists() for device in ACCELERATORS)


def keep() -> None:
    """Keep memory that was freed, where the C library is glibc and programs run on CPUs.

    XLA asks for the memory of a program anew at each call. What is large, glibc maps and unmaps every time, and the
    kernel fills each page with zeros: a fifth of a training step. To be called before JAX starts its threads, which
    would each have a heap of their own that holds nothing large.
    """
    if sys.platform != "linux" or not on_cpu():
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, KEPT)):
            mallopt(option, value)
