"""Memory that a program frees and takes again is not filled with zeros each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from transformer_jax import heap

PROGRAM = """
import importlib.util, resource, sys, threading
import numpy as np
spec = importlib.util.spec_from_file_location("heap", sys.argv[1])
heap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heap)
heap.ACCELERATORS = sys.argv[2:]
heap.keep()
def work():
    for _ in range(50):
        np.ones(2**22, np.float64)  # 32 MiB
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(*accelerators: str) -> int:
    command = [sys.executable, "-c", PROGRAM, heap.__file__, *accelerators]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_pages_are_taken_from_the_kernel_once():
    assert faults() < faults("/") / 5  # "/" exists: an accelerator is there, and nothing is changed
