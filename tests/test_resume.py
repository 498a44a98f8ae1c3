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

pytestmark = [pytest.mark.slow, pytest.mark.optimised]  # a thousand steps

RECIPE = """\
from tests.tiny import small
from transformer_jax.config import Experiment

def run() -> Experiment:
    return small("pairs.tsv", steps=300, eval_every=50, save_every=10, log_every=5)
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


def lines(folder: Path) -> int:
    """Count the lines that a run has logged."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_metrics(process: subprocess.Popen, folder: Path, beyond: int) -> None:
    """Wait until the run has logged past `beyond` lines, or has ended."""
    while process.poll() is None and lines(folder) <= beyond:
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


def test_sigkill_at_arbitrary_moments(folder):
    moments, run, kills = random.Random(0), folder / "killed", 0
    for further in (0, 2, 5):
        beyond = lines(run) + further
        process = start(folder, run.name)
        wait_for_metrics(process, run, beyond)
        time.sleep(moments.uniform(0, 1.0))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills, "the run ended before it could be killed"
    assert_ends_well(start(folder, run.name))
    assert_equal_runs(run, folder / "whole")


def test_signals_save_first_and_say_so(folder):
    run, restored = folder / "stopped", ""
    for number in (signal.SIGTERM, signal.SIGINT):
        beyond = lines(run) + 3
        process = start(folder, run.name)
        wait_for_metrics(process, run, beyond)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 128 + number, err
        assert f"stopped by {number.name} at step" in err
        assert "the same command continues" in err
        assert restored in err
        step = steps_of(run)[-1]
        assert f"at step {step};" in err
        restored = f"restored step {step} of 300"
    assert restored in assert_ends_well(start(folder, run.name))
    assert_equal_runs(run, folder / "whole")
