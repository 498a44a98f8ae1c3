"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_loop import assert_equal_runs
from tests.tiny import write_pairs
from transformer_jax.checkpoint import steps_of

RECIPE = """\
from dataclasses import replace
from tests.tiny import tiny
from transformer_jax.config import Experiment

def run() -> Experiment:
    return tiny("pairs.tsv", steps=300, eval_every=50, save_every=10, log_every=5)
"""


def start(folder: Path, out: str) -> subprocess.Popen:
    program = "from transformer_jax.cli import main; main()"
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", "recipes.py:run", "--out", out],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_metrics(process: subprocess.Popen, folder: Path, beyond: int) -> None:
    """Wait until the run has logged past `beyond` lines, or has ended."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > beyond):
        time.sleep(0.02)


def assert_ends_well(process: subprocess.Popen) -> str:
    """Wait for the end; returns what was said."""
    _, err = process.communicate()
    assert process.returncode == 0, err
    return err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_pairs(folder / "pairs.tsv")
    (folder / "recipes.py").write_text(RECIPE)
    assert_ends_well(start(folder, "whole"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_arbitrary_moments(folder, seed):
    moments, out, kills = random.Random(seed), f"killed{seed}", 0
    for _ in range(3):
        process = start(folder, out)
        wait_for_metrics(process, folder / out, beyond=moments.choice([0, 2, 5]))
        time.sleep(moments.uniform(0, 1.0))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills, "the run ended before it could be killed"
    assert_ends_well(start(folder, out))
    assert_equal_runs(folder / out, folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first_and_say_so(folder, number):
    out = f"stopped{number}"
    process = start(folder, out)
    wait_for_metrics(process, folder / out, beyond=3)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name} at step" in err
    assert "the same command continues" in err
    step = steps_of(folder / out)[-1]
    assert f"at step {step};" in err
    assert f"restored step {step} of 300" in assert_ends_well(start(folder, out))
    assert_equal_runs(folder / out, folder / "whole")
