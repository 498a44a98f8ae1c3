"""A process that answers but does not come along: it is named, with where it is, and in the end not waited for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests.tiny import write_pairs
from transformer_jax import distributed, pulse
from transformer_jax.errors import UserError
from transformer_jax.launch.local import free_port

RECIPE = """\
from dataclasses import replace
from tests.tiny import tiny
from transformer_jax.config import Experiment

def run() -> Experiment:
    one = tiny("pairs.tsv")
    model = replace(one.model, encoder_layers=1, decoder_layers=1)
    return replace(one, model=model, data=replace(one.data, bucket_lengths=(32,)))
"""

# Process 1 has come to step 3, and does not go on.
PROGRAM = """\
import os, time
from transformer_jax import distributed, pulse
pulse.PATIENCE, pulse.EVERY, distributed.PARTING = 4, 1, 3
from transformer_jax.session import Session
launch = Session._launch
def go_on(session):
    while session.step == 3 and os.environ["TJAX_PROCESS"] == "1":
        if os.environ["BUG"]:
            raise RuntimeError("a bug")
        time.sleep(0.1)
    return launch(session)
Session._launch = go_on
from transformer_jax.cli import main; main()
"""


@pytest.fixture
def watch(monkeypatch):
    """Watch from process 0 of 3, on a clock of our own, how far all are every 30 s; returns what was said."""

    def run(places):
        clock, said, rest = [0.0], [], iter(places)
        one = pulse.Pulse(silent=100, stuck=120)
        one.newest = lambda: "the last complete checkpoint is 400"

        def sleep(seconds):
            clock[0] += seconds
            one._heard = clock[0]  # all answer
            if clock[0] % 30 == 0:
                now = next(rest)
                one.place = now[0]
                one._look(lambda _: [(f"tjax_places/{process}", str(place)) for process, place in enumerate(now)])

        def end(code):
            raise StopIteration(code)

        monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        monkeypatch.setattr(pulse, "say", said.append)
        monkeypatch.setattr(pulse, "end", end)
        monkeypatch.setattr(jax, "process_index", lambda: 0)
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        with pytest.raises(StopIteration) as stop:
            one._watch()
        return said, stop.value.value

    return run


def test_who_lies_behind_is_named_and_in_the_end_not_waited_for(watch):
    (*said, last), code = watch([(8, 7, 8)] * 9)
    assert said == [f"process 0 of 3 has waited {seconds} s for process 1" for seconds in (30, 60, 90)]
    assert re.match(
        r"tjax: process 0 of 3 has waited 120 s for process 1: .*; the last complete checkpoint is 400\. St", last
    )
    assert code == pulse.LOST


def test_who_lies_behind_says_where_it_is(watch):
    said, _ = watch([(7, 8, 8)] * 4)
    here = r"transformer_jax/pulse\.py:\d+ \(_line_of_main_thread\)"  # the main thread looks itself
    assert re.fullmatch(rf"process 0 of 3 keeps the others waiting for 30 s, at {here}", said[0])


@pytest.mark.parametrize(
    "places",
    [
        [(8, 8, 8)] * 20,  # a long step, or the network: nobody is to blame
        [(8 + n, 7 + n, 8 + n) for n in range(20)],  # slow, but they move
        [(8, 7, 4 + n) for n in range(4)] * 5,  # somebody else moves
    ],
    ids=["together", "slow", "other"],
)
def test_who_moves_is_waited_for(watch, places):
    said, code = watch(places)
    assert (said, code) == ([], None)


def test_nobody_is_asked_while_this_process_moves():
    one = pulse.Pulse(100)

    def told(_):
        raise AssertionError

    for one.place in range(5):
        one._look(told)


@pytest.fixture
def ended(monkeypatch):
    """Process 2 of 3, which would end; returns what it says and tells, and its exit code."""
    said, told, codes = [], [], []

    def end(code):
        codes.append(code)
        raise SystemExit

    client = SimpleNamespace(key_value_set=lambda key, why: told.append((key, why)))
    monkeypatch.setattr(pulse, "say", said.append)
    monkeypatch.setattr(pulse, "end", end)
    monkeypatch.setattr(pulse.multihost, "get_jax_distributed_client", lambda: client)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    return said, told, codes


def test_before_training_a_loss_ends_the_job_too_and_a_bug_is_shown(monkeypatch, ended, capsys):
    said, told, codes = ended
    monkeypatch.setattr(distributed, "_pulse", pulse.Pulse(100))
    monkeypatch.setattr(distributed, "part", codes.append)
    with pytest.raises(SystemExit):
        distributed._crashed(
            jax.errors.JaxRuntimeError, jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed"), None
        )
    distributed._crashed(jax.errors.JaxRuntimeError, jax.errors.JaxRuntimeError("INTERNAL: a bug"), None)
    reason = "process 2 of 3 has lost the others (UNKNOWN: Gloo AllGather failed)"
    assert [line.partition("; ")[0] for line in said] == [f"tjax: {reason}"]
    assert "; no step was under way. Start all again" in said[0]
    assert told == [(f"{pulse.ENDS}/first", reason)]
    assert codes == [pulse.LOST, 1]
    assert "INTERNAL: a bug" in capsys.readouterr().err


def test_what_one_finds_lost_ends_the_others_unless_they_are_through(ended):
    said, _, codes = ended
    one, told = pulse.Pulse(100), [("tjax_ends/first", "process 0 of 3 has lost the others")]
    one._heed([])
    with pytest.raises(SystemExit):
        one._heed(told)
    assert said[0].startswith("tjax: process 2 of 3 ends too (process 0 of 3 has lost the others); no step")
    one.newest = None
    one._heed(told)
    assert codes == [pulse.LOST]


@pytest.mark.parametrize("value", ["soon", "0", "-3"])
def test_patience_is_a_number_of_seconds(monkeypatch, value):
    for name, own in {"TJAX_COORDINATOR": "h:1", "TJAX_PROCESSES": "2", "TJAX_PROCESS": "0"}.items():
        monkeypatch.setenv(name, own)
    monkeypatch.setenv("TJAX_STUCK_TIMEOUT", value)
    with pytest.raises(UserError, match=f"TJAX_STUCK_TIMEOUT={value} is not a number of seconds"):
        distributed.initialize()


def run(folder, **environment) -> list[tuple[int, str]]:
    """Train in two processes; returns exit code and words of each."""
    port = free_port()
    running = []
    for process in range(2):
        own = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TJAX_COORDINATOR": f"127.0.0.1:{port}",
            "TJAX_PROCESSES": "2",
            "TJAX_PROCESS": str(process),
        }
        command = [sys.executable, "-c", PROGRAM, "train", "recipes.py:run", "--train.save-every", "2", "--out", "run"]
        running.append(subprocess.Popen(command, cwd=folder, env=own | environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, words) for process, words in zip(running, said, strict=True)]


@pytest.mark.slow
@pytest.mark.multi
def test_a_main_thread_that_is_stuck_or_dies_ends_the_job(tmp_path):
    write_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "recipes.py").write_text(RECIPE)
    (code, waiting), (own, stuck) = run(tmp_path, BUG="", TJAX_STUCK_TIMEOUT="12")
    assert code == own == pulse.LOST, waiting + stuck
    line = r"transformer_jax/session\.py:\d+ \(train\), in .*:\d+ \(go_on\)"
    assert re.search(rf"process 1 of 2 keeps the others waiting for \d+ s, at {line}", stuck), stuck
    assert re.search(r"process 0 of 2 has waited \d+ s for process 1", waiting), waiting
    assert "checkpoints/2. Start all again" in waiting + stuck
    (code, waiting), (own, dead) = run(tmp_path, BUG="yes")
    assert "restored step 2" in waiting
    assert (code, own) == (pulse.LOST, 1), waiting + dead
    assert "RuntimeError: a bug" in dead
    assert re.search(r"^tjax: process 0 of 2 has (lost the others|heard nothing of process 1)", waiting, re.M), waiting
