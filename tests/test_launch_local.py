"""Processes on this machine that form one job: they really run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from transformer_jax.launch import Job, Local, store
from transformer_jax.launch.job import State
from transformer_jax.launch.local import free_port, run_here
from transformer_jax.launch.store import Record

WHO = "import os; print(os.environ['TJAX_PROCESS'], 'of', os.environ['TJAX_PROCESSES'], os.environ['TJAX_COORDINATOR'])"

# Says that it is there, then waits for SIGTERM, saves, and ends as `tjax train` does.
WAITS = """\
import os, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("here", flush=True)
time.sleep(60)
"""


def job(tmp_path, program, processes=3, **backend) -> Job:
    command = (sys.executable, "-S", "-c", program)
    return Job("local", command, Local(processes, **backend), str(tmp_path / "job"))


def run(one: Job) -> int:
    return run_here(one, one.backend)


def test_every_process_is_told_who_it_is(tmp_path, capfd):
    one = job(tmp_path, WHO)
    assert run(one) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    port = lines[0].rpartition(":")[2]
    assert lines == [f"[{process}] {process} of 3 127.0.0.1:{port}" for process in range(3)]
    for process in range(3):
        assert (tmp_path / "job" / f"worker-{process}.log").read_text() == lines[process][4:] + "\n"
    assert one.backend.state(one, "").phase == "done"


def test_the_port_can_be_chosen(tmp_path, capfd):
    port = free_port()
    run(job(tmp_path, WHO, port=port))
    assert f"127.0.0.1:{port}" in capfd.readouterr().out


def test_the_first_failure_ends_all_and_is_the_exit_code(tmp_path, capfd):
    program = WAITS.replace(
        "time.sleep(60)", 'time.sleep(0.5); sys.exit(7) if os.environ["TJAX_PROCESS"] == "1" else time.sleep(60)'
    )
    began = time.monotonic()
    one = job(tmp_path, program)
    assert run(one) == 7
    assert time.monotonic() - began < 20
    out, err = capfd.readouterr()
    assert "process 1 ended with exit code 7; telling the others to end" in err
    assert {"[0] saved", "[2] saved"} <= set(out.splitlines())
    state = one.backend.state(one, "")
    assert (state.phase, state.code) == ("failed", 7)


def test_a_process_that_is_killed_counts_as_failed(tmp_path):
    program = "import os, signal, time; os.environ['TJAX_PROCESS'] == '2' and os.kill(os.getpid(), 9); time.sleep(60)"
    assert run(job(tmp_path, program)) == 137


def test_a_process_that_does_not_end_is_killed_after_a_while(tmp_path):
    program = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "time.sleep(0.4); sys.exit(3) if os.environ['TJAX_PROCESS'] == '0' else time.sleep(60)"
    )
    began = time.monotonic()
    one = job(tmp_path, program, processes=2, grace=0.3)
    assert run(one) == 3
    assert time.monotonic() - began < 20


LAUNCHER = """\
import sys
from transformer_jax.launch.local import Local, run_here
from transformer_jax.launch.job import Job
one = Job("local", (sys.executable, "-S", "-c", sys.argv[1]), Local(2), sys.argv[2])
sys.exit(run_here(one, one.backend))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process(tmp_path, number):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WAITS, str(tmp_path / "job")], stdout=subprocess.PIPE, text=True
    )
    seen = [launcher.stdout.readline(), launcher.stdout.readline()]
    assert sorted(seen) == ["[0] here\n", "[1] here\n"]
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert launcher.returncode == 143


def test_devices_and_environment_reach_the_processes(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    file = tmp_path / "own.env"
    file.write_text("B=two words\n")
    file.chmod(0o600)
    program = "import os; print(os.environ['XLA_FLAGS'].split()[-1], os.environ['A'], os.environ['B'])"
    one = replace(job(tmp_path, program, 2, devices_per_process=3), env={"A": "1"}, env_file=str(file))
    assert run(one) == 0
    assert "--xla_force_host_platform_device_count=3 1 two words" in capfd.readouterr().out


JAX = """\
import os
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
env = os.environ
jax.distributed.initialize(env["TJAX_COORDINATOR"], int(env["TJAX_PROCESSES"]), int(env["TJAX_PROCESS"]))
from jax.experimental import multihost_utils
import numpy as np
total = multihost_utils.process_allgather(np.float32(jax.process_index() + 1)).sum()
told = jax.process_count(), len(jax.local_devices()), len(jax.devices()), int(total)
open(f"{env['OUT']}/{env['TJAX_PROCESS']}", "w").write(repr(told))
"""


@pytest.mark.slow
@pytest.mark.multi
def test_the_processes_form_one_jax_job(tmp_path):
    command = (sys.executable, "-c", JAX)
    one = Job("jax", command, Local(2, devices_per_process=3), str(tmp_path / "job"), env={"OUT": str(tmp_path)})
    assert run(one) == 0
    assert [(tmp_path / str(process)).read_text() for process in range(2)] == ["(2, 3, 6, 3)"] * 2


def test_a_record_survives_and_knows_a_launch_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = replace(job(tmp_path, WHO), folder=str(store.JOBS / "local"))
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = Record(one, handle=str(gone.pid), launched=1.0).seen(State("running"), 10.0).seen(State("running"), 40.0)
    record.save()
    assert store.load("local") == record
    assert record.seconds == 30.0
    assert one.backend.state(one, record.handle).detail == "the launch was killed"
    assert one.backend.state(one, str(os.getpid())).phase == "running"


def test_time_between_two_looks_is_counted_and_time_in_the_queue_is_not(tmp_path):
    record = Record(job(tmp_path, WHO))
    for phase, now in [
        ("queued", 0.0),
        ("running", 100.0),
        ("running", 160.0),
        ("preempted", 220.0),
        ("queued", 300.0),
    ]:
        record = record.seen(State(phase), now)
    assert record.seconds == 120.0
    record = record.seen(State("running"), 1000.0).seen(State("done"), 1010.0)
    assert record.seconds == 130.0
    assert record.over
