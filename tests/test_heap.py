"""Memory that a program frees and takes again is not filled with zeros each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from transformer_jax import heap

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import ctypes, importlib.util, resource, sys, threading
spec = importlib.util.spec_from_file_location("heap", sys.argv[1])
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)
heap.ACCELERATORS = sys.argv[2:]
heap.keep()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def work():
    for _ in range(20):
        taken = c.malloc(2**26)
        ctypes.memset(taken, 1, 2**26)
        c.free(taken)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(*accelerators: str) -> int:
    command = [sys.executable, "-c", PROGRAM, heap.__file__, *accelerators]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not HUGE.exists() or "[always]" in HUGE.read_text(), reason="needs Linux with pages of 4 KiB")
def test_pages_are_taken_from_the_kernel_once():
    assert faults() < faults("/") / 5  # "/" exists: an accelerator is there, and nothing is changed
