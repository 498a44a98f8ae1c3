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
from transformer_jax import distributed
from transformer_jax.checkpoint import steps_of
from transformer_jax.errors import UserError

RECIPE = """\
from dataclasses import replace
from tests.tiny import tiny
from transformer_jax.config import Experiment, MeshConfig

def run() -> Experiment:
    return replace(tiny("pairs.tsv"), mesh=MeshConfig(data=2, fsdp=2, tensor=1))
"""


def job(folder: Path, processes: int, steps: int, out: str) -> None:
    """Run `tjax train`, unchanged, in every process: as many devices in all, however many they are spread over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }
    program = "from transformer_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "train", "recipes.py:run", "--train.steps", str(steps), "--out", out]
    running = []
    for process in range(processes):
        address = {"TJAX_COORDINATOR": f"127.0.0.1:{port}", "TJAX_PROCESSES": str(processes)}
        own = environment | (address | {"TJAX_PROCESS": str(process)} if processes > 1 else {})
        running.append(subprocess.Popen(command, cwd=folder, env=own, stderr=subprocess.PIPE, text=True))
    for started in running:
        _, err = started.communicate(timeout=300)
        assert started.returncode == 0, err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"TJAX_COORDINATOR": "host:1234", "TJAX_PROCESSES": "2"}, "TJAX_PROCESS not set"),
        ({"TJAX_COORDINATOR": "host", "TJAX_PROCESSES": "2", "TJAX_PROCESS": "0"}, "TJAX_COORDINATOR=host is not"),
        ({"TJAX_COORDINATOR": "h:1", "TJAX_PROCESSES": "2", "TJAX_PROCESS": "2"}, "must be a number below"),
    ],
)
def test_addresses_that_cannot_be(monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize()


@pytest.mark.slow
@pytest.mark.multi
def test_who_waits_says_for_whom_and_gives_up_in_one_line(tmp_path):
    (tmp_path / "recipes.py").write_text(RECIPE)
    write_pairs(tmp_path / "pairs.tsv")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        "from transformer_jax import distributed; distributed.PATIENCE = 1\n"
        "from transformer_jax.cli import main; main()"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "TJAX_COORDINATOR": f"127.0.0.1:{port}",
        "TJAX_PROCESSES": "2",
        "TJAX_PROCESS": "1",  # the coordinator never comes
        "TJAX_JOIN_TIMEOUT": "4",
    }
    command = [sys.executable, "-c", program, "train", "recipes.py:run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "waiting for 2 processes at 127.0.0.1" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.multi
def test_processes_come_and_go_and_the_numbers_stay(tmp_path):
    write_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "recipes.py").write_text(RECIPE)
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
