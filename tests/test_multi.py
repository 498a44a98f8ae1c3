"""Several processes, one job: what a pod does, on the loopback interface."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.test_loop import losses, params_of
from tests.tiny import write_pairs
from transformer_jax.checkpoint import steps_of

# As many devices in all, however many processes they are spread over.
PROGRAM = """\
import sys
import jax
process, count, port, steps, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
from dataclasses import replace
from tests.tiny import tiny
from transformer_jax import train
from transformer_jax.config import MeshConfig
experiment = replace(tiny("pairs.tsv", steps=int(steps)), mesh=MeshConfig(data=2, fsdp=2, tensor=1))
train(experiment, out)
"""


def job(folder: Path, processes: int, steps: int, out: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }
    arguments = [[str(p), str(processes), str(port), str(steps), out] for p in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *args], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        for args in arguments
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.multi
def test_processes_come_and_go_and_the_numbers_stay(tmp_path):
    write_pairs(tmp_path / "pairs.tsv")
    job(tmp_path, 1, 12, "alone")
    job(tmp_path, 2, 12, "together")
    assert steps_of(tmp_path / "together") == [4, 8, 12]
    job(tmp_path, 2, 4, "mixed")
    job(tmp_path, 4, 8, "mixed")
    job(tmp_path, 1, 12, "mixed")
    alone = params_of(tmp_path / "alone")
    for run in ("together", "mixed"):
        assert len(losses(tmp_path / run)) == len(losses(tmp_path / "alone"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params_of(tmp_path / run), alone)
