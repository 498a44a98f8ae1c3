"""Several processes, one job: what a pod does, on the loopback interface."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.test_loop import losses, params_of
from tests.tiny import small, write_pairs
from transformer_jax import distributed, pulse
from transformer_jax.anomalies import read_anomalies, read_batch
from transformer_jax.checkpoint import steps_of
from transformer_jax.errors import UserError
from transformer_jax.launch.local import free_port

RECIPE = """\
from dataclasses import replace
from tests.tiny import small
from transformer_jax.config import Experiment, MeshConfig

def run() -> Experiment:
    return replace(small("pairs.tsv"), mesh=MeshConfig(data=2, fsdp=2, tensor=1))
"""


@pytest.fixture
def folder(tmp_path):
    """A recipe and its data."""
    (tmp_path / "recipes.py").write_text(RECIPE)
    write_pairs(tmp_path / "pairs.tsv")
    return tmp_path


def start(folder: Path, processes: int, *arguments: str, lost: int = 30, first: str = "") -> list[subprocess.Popen]:
    """Start `tjax train`, unchanged, in every process: as many devices in all, however many they are spread over."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        # Only process 0 fills the cache: the others would compile alone, while it waits for them, 30 s at most (gloo).
        "JAX_ENABLE_COMPILATION_CACHE": str(processes == 1),
        "TJAX_LOST_TIMEOUT": str(lost),
    }
    program = f"{first}from transformer_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "train", "recipes.py:run", *arguments]
    running, port = [], free_port()
    for process in range(processes):
        address = {"TJAX_COORDINATOR": f"127.0.0.1:{port}", "TJAX_PROCESSES": str(processes)}
        own = environment | (address | {"TJAX_PROCESS": str(process)} if processes > 1 else {})
        running.append(subprocess.Popen(command, cwd=folder, env=own, stderr=subprocess.PIPE, text=True))
    return running


def job(folder: Path, processes: int, steps: int, out: str) -> list[str]:
    """Run a job to its end; returns what each process said."""
    running = start(folder, processes, "--train.steps", str(steps), "--out", out)
    try:
        said = [started.communicate(timeout=300)[1] for started in running]
    finally:
        for started in running:
            started.kill()
    assert [started.returncode for started in running] == [0] * processes, said
    return said


def wait_for_metrics(running: list[subprocess.Popen], run: Path, lines: int) -> None:
    """Wait until a job has logged so many lines."""
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert [process.poll() for process in running] == [None] * len(running)
        time.sleep(0.05)


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
@pytest.mark.parametrize(
    ("process", "whom"),
    [
        ("1", r"process 0, which does not answer at 127\.0\.0\.1:\d+ \(Connection refused\)"),
        ("0", r"process 1 to come to 127\.0\.0\.1:\d+"),
    ],
)
def test_who_waits_says_for_whom_and_gives_up_in_one_line(folder, process, whom):
    program = (
        "from transformer_jax import distributed; distributed.PATIENCE = 1\n"
        "from transformer_jax.cli import main; main()"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "TJAX_COORDINATOR": f"127.0.0.1:{free_port()}",
        "TJAX_PROCESSES": "2",
        "TJAX_PROCESS": process,  # the other one never comes
        "TJAX_JOIN_TIMEOUT": "3",
    }
    command = [sys.executable, "-c", program, "train", "recipes.py:run"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert re.search(rf"process {process} of 2 has waited 1 s for {whom}", done.stderr)
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"tjax: process {process} of 2 gave up after 3 s of waiting for {whom}; .*TJAX_JOIN_TIMEOUT", last)
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.multi
def test_a_notice_or_a_loss_ends_all_and_the_same_command_goes_on(folder):
    run, endless = folder / "run", ("--train.steps", "5000", "--out", "run")
    running = start(folder, 2, *endless, "--train.save-every", "5000")
    wait_for_metrics(running, run, 5)
    running[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, said
    stopped = {re.search(r"stopped by SIGTERM at step (\d+);", words).group(1) for words in said}
    (step,) = map(int, stopped)
    assert steps_of(run) == [step]
    assert step < 5000

    # A collective fails, or it waits and the meetings of all fail; without process 0, JAX aborts the others.
    for killed, why in ((1, "has heard nothing of process 1 "), (0, "was aborted by JAX, ")):
        running = start(folder, 2, *endless, "--train.save-every", "4")
        wait_for_metrics(running, run, (run / "metrics.jsonl").read_text().count("\n") + 8)
        running[killed].kill()
        said = running[1 - killed].communicate(timeout=200)[1]
        running[killed].communicate()
        assert f"restored step {step} of 5000" in said
        assert running[1 - killed].returncode == pulse.LOST, said
        ours = rf"^tjax: process {1 - killed} of 2 (has lost the others|{why}).*/checkpoints/\d+\. Start all again"
        assert re.search(ours, said, re.M), said
        step = steps_of(run)[-1]
    assert f"restored step {step} of {step + 1}" in job(folder, 2, step + 1, "run")[0]


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize(("hangs", "whom"), [(1, "process 1"), (0, "process 0, where all meet")])
def test_a_process_that_hangs_is_named_and_not_waited_for(folder, hangs, whom):
    often = "from transformer_jax import pulse; pulse.PATIENCE = 8; "
    arguments = ("--train.steps", "5000", "--train.save-every", "4", "--out", "run")
    running = start(folder, 2, *arguments, lost=20, first=often)
    wait_for_metrics(running, folder / "run", 8)
    running[hangs].send_signal(signal.SIGSTOP)
    other = 1 - hangs
    said = running[other].communicate(timeout=200)[1]
    running[hangs].kill()
    running[hangs].communicate()
    assert running[other].returncode == pulse.LOST, said
    assert re.search(rf"^process {other} of 2 has heard nothing of {whom} for \d+ s$", said, re.M)
    last = rf"tjax: process {other} of 2 has heard nothing of {whom} for \d\d s: .*/checkpoints/\d+\. Start all again"
    assert re.match(last, said.splitlines()[-1])


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("reached the barrier: 1/2. Some timed out task names:\n1\n\nRPC: /xla.coordination/Barrier [x='2']", ["1"]),
        ("first task: 9. Some timed out task names: 1, 12\nRPC: 3", ["1", "12"]),
        ("timed out task names: /job:jax_worker/replica:0/task:7", ["7"]),
        ("UNAVAILABLE: 5", []),
    ],
)
def test_who_missed_a_meeting_is_read_from_what_jax_says(named, found):
    assert pulse.missing(named) == found


def test_who_was_stopped_itself_blames_nobody(monkeypatch):
    clock, naps = [0.0], iter([1.0] * 40 + [400.0] + [1.0] * 20)
    said: list[str] = []

    def sleep(_):
        clock[0] += next(naps)

    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(pulse, "say", said.append)
    watching = pulse.Pulse(100, 1800)
    watching.newest = str
    with pytest.raises((StopIteration, RuntimeError)):
        watching._watch()
    assert [line.rpartition(" for ")[2] for line in said] == ["30 s"]  # then it slept itself, and counts anew


@pytest.mark.slow
@pytest.mark.multi
def test_processes_come_and_go_and_the_numbers_stay(folder):
    job(folder, 1, 12, "alone")
    job(folder, 2, 4, "mixed")
    job(folder, 4, 8, "mixed")
    job(folder, 1, 12, "mixed")
    assert steps_of(folder / "mixed") == [4, 8, 12]
    assert len(losses(folder / "mixed")) == len(losses(folder / "alone"))
    alone, mixed = params_of(folder / "alone"), params_of(folder / "mixed")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mixed, alone)


@pytest.mark.slow
@pytest.mark.multi
def test_all_processes_answer_a_nan_alike(folder):
    hot = ("--optim.schedule.peak", "1e30", "--optim.schedule.warmup", "1", "--optim.clip-norm", "0")
    running = start(folder, 2, *hot, "--train.on-nan", "rollback", "--train.max-rollbacks", "1", "--out", "run")
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    lines = [
        re.search(r"^tjax: loss is nan .* at step 2, .* after 1 rollback\(s\)", words, re.M).group() for words in said
    ]
    assert lines[0] == lines[1]
    assert [anomaly.policy for anomaly in read_anomalies(folder / "run")] == ["rollback", "stop"]
    batch = read_batch(folder / "run", 2)
    assert len(batch["source"]) == len(batch["example"])
    assert [int(i) for i in batch["example"] if i >= 0] == read_anomalies(folder / "run")[-1].examples
    examples = set(read_anomalies(folder / "run")[-1].examples)
    iterators = [small(folder / "pairs.tsv").data.open(306).train_iterator(0, process, 2) for process in (0, 1)]
    # Step 2 met the second batch; behind the rollback to step 0, steps 1 and 2 met the third and the fourth.
    fourth = [[next(iterator) for _ in range(4)][-1]["example"] for iterator in iterators]
    assert examples == {int(i) for part in fourth for i in part if i >= 0}
