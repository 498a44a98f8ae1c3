"""What runs on the workers: the scripts are run here, and the hosts meet over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fakes import make_world
from transformer_jax.launch import Job, Slurm, Source, TpuVm, commands, find_slice, probe
from transformer_jax.launch.local import free_port

ROOT = Path(__file__).parent.parent
SOURCE = Source(".", "0123456789abcdef0123456789abcdef01234567")


def report(process, **other):
    plain = {"process": process, "processes": 3, "host": f"w-{process}", "python": "3.12.1", "commit": "abc"}
    plain |= dict.fromkeys(probe.PACKAGES, "1.0") | {"chips": 4, "disk": 80.0, "clock": 1000.0}
    return plain | other


def test_hosts_that_agree_and_hosts_that_do_not():
    same = [report(process) for process in range(3)]
    assert probe.compare(same) == []
    for change, said in (
        ({"jax": "0.9"}, "jax differs: 1.0 on w-0, w-2; 0.9 on w-1"),
        ({"libtpu": "absent"}, "libtpu differs: 1.0 on w-0, w-2; absent on w-1"),
        ({"commit": "def"}, "commit differs: abc on w-0, w-2; def on w-1"),
        ({"chips": 3}, "chips differs: 4 on w-0, w-2; 3 on w-1"),
        ({"clock": 1030.0}, "the clocks differ by 30 s"),
        ({"disk": 1.5}, "w-1 has only 1.5 GiB of disk left; 10 are needed"),
    ):
        assert probe.compare([same[0], report(1, **change), same[2]]) == [said]
    assert probe.compare([same[0], same[2]]) == ["of 3 workers these did not answer: 1"]


def meet(monkeypatch, reports, count=3, seconds=20.0):
    """Let hosts with these reports meet; returns what each was told."""
    port, told = free_port(), {}
    mine = threading.local()
    monkeypatch.setattr(probe, "report", lambda: mine.report)

    def run(one):
        mine.report = one
        process = one["process"]
        told[process] = probe._host(count, port, seconds) if process == 0 else probe._visit("127.0.0.1", port, seconds)

    threads = [threading.Thread(target=run, args=(one,)) for one in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


PLAIN = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}
SECOND = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}


@pytest.mark.parametrize(
    ("env", "who"), [(PLAIN, (2, 4, "a", 8482)), (PLAIN | SECOND, (6, 12, "first", 8482))], ids=["one", "several"]
)
@pytest.mark.parametrize("told_by", ["environment", "metadata"])
def test_workers_of_several_slices_are_numbered_through_as_jax_does(monkeypatch, env, who, told_by):
    for name in (*PLAIN, *SECOND, "TJAX_PROCESS", "SLURM_PROCID", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    described = "ZONE: 'us-west4-a'\n" + "".join(f"{name}: '{env[name]}'\n" for name in SECOND if name in env)
    metadata = {"worker-network-endpoints": "x:1:a,x:2:b,x:3:c,x:4:d", "agent-worker-number": "2", "tpu-env": described}
    monkeypatch.setattr(probe, "_metadata", metadata.__getitem__)
    if told_by == "environment":  # GKE
        monkeypatch.setattr(probe, "_metadata", {}.__getitem__)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
    assert probe.peers() == who


def test_hosts_meet_at_the_port_of_the_coordinator(monkeypatch):
    now = time.time()
    assert meet(monkeypatch, [report(p, clock=now) for p in (2, 1, 0)]) == {0: [], 1: [], 2: []}
    told = meet(monkeypatch, [report(0, clock=now), report(1, clock=now), report(2, clock=now, jax="0.9")])
    assert list(told.values()) == [["jax differs: 1.0 on w-0, w-1; 0.9 on w-2"]] * 3


def test_one_worker_alone_is_named_and_does_not_hang(monkeypatch, capfd):
    now = time.time()
    monkeypatch.setattr(probe, "EVERY", 0.2)
    told = meet(monkeypatch, [report(0, clock=now), report(1, clock=now)], seconds=1.0)
    assert list(told.values()) == [["of 3 workers these did not answer: 2"]] * 2
    assert "waiting for workers 2" in capfd.readouterr().err
    (alone,) = meet(monkeypatch, [report(1)], seconds=0.5).values()
    assert "waiting for the first worker at 127.0.0.1:" in capfd.readouterr().err
    assert "cannot be reached" in alone[0]
    assert "is the port open between the hosts?" in alone[0]


def test_a_host_tells_about_itself():
    environment = os.environ | {"TJAX_PROCESS": "1", "TJAX_PROCESSES": "2", "TJAX_COORDINATOR": "127.0.0.1:1"}
    argv = [sys.executable, str(ROOT / "transformer_jax/launch/probe.py")]
    done = subprocess.run(argv, env=environment | {"TJAX_COMMIT": "abc"}, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["process"], told["processes"], told["commit"]) == (1, 2, "abc")
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["jax"] != "absent"
    assert told["disk"] > 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TJAX_PROCESS": "2", "TJAX_PROCESSES": "4", "TJAX_COORDINATOR": "10.0.0.1:77"}, (2, 4, "10.0.0.1", 77)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a.svc,b.svc"}, (1, 2, "a.svc", 8482)),
        (
            {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a.svc", "JAX_COORDINATOR_PORT": "99"},
            (0, 1, "a.svc", 99),
        ),
    ],
)
def test_a_host_finds_its_peers(monkeypatch, environment, expected):
    for name in ("TJAX_PROCESS", "SLURM_PROCID", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert probe.peers() == expected


def test_a_cloud_tpu_worker_asks_the_metadata_server(monkeypatch):
    for name in ("TJAX_PROCESS", "SLURM_PROCID", "JAX_COORDINATOR_PORT", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for endpoints in ("10.0.0.7,10.0.0.8,10.0.0.9", "a:0:10.0.0.7,b:1:10.0.0.8,c:2:10.0.0.9"):
        told = {"worker-network-endpoints": endpoints, "agent-worker-number": "2", "tpu-env": "ZONE: 'z'\n"}
        monkeypatch.setattr(probe, "_metadata", told.__getitem__)
        assert probe.peers() == (2, 3, "10.0.0.7", 8482)


# The start-up script of a Cloud TPU worker.

# Stands for the installation: a Python that finds this package, and a `tjax` that does what the test says.
SETUP = """\
mkdir -p ../venv/bin
cp {folder}/python ../venv/bin
cp {folder}/tjax ../venv/bin"""
PYTHON = f"""\
#!/bin/sh
[ "$1 $2" = "-m transformer_jax.launch.probe" ] || exit 9
shift 2
{{first}}
exec {sys.executable} -S {ROOT / "transformer_jax/launch/probe.py"} "$@"
"""


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """Run the start-up script on the workers of a slice, at once; returns exit codes by worker."""
    world = make_world(tmp_path, monkeypatch)
    for program, line in (
        ("curl", 'echo "$TJAX_PROCESS"'),
        ("hostname", 'echo "w-$TJAX_PROCESS"'),
        ("sleep", "exec /bin/sleep 0.1"),
    ):
        path = tmp_path / "bin" / program
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    code = world.bucket("b-demo/demo/launch/code.tar.gz")
    code.parent.mkdir(parents=True)
    subprocess.run(["tar", "-czf", code, "pyproject.toml"], cwd=world.work, check=True)
    backend = TpuVm(find_slice("v5e-16"), "p", "us-west4-a", "gs://b-demo")

    def run(train, workers=2, stop=False, first="", **changes):
        for name, text in (("python", PYTHON.format(first=first)), ("tjax", f"#!/bin/sh\n{train}\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        setup = SETUP.format(folder=tmp_path)
        one = Job("demo", ("tjax", "train", "x"), backend, str(tmp_path / "job"), SOURCE, setup=setup, **changes)
        script = tmp_path / "startup.sh"
        # Two of the four hosts are enough here.
        script.write_text(commands(one)[-1].files[f"{one.folder}/startup.sh"].replace("hosts=4", f"hosts={workers}"))
        port = str(free_port())
        running = []
        for worker in range(workers):
            own = {"TJAX_HOME": str(tmp_path / f"w{worker}"), "TJAX_PROCESS": str(worker)}
            own |= {"TJAX_PROCESSES": str(workers), "TJAX_COORDINATOR": f"127.0.0.1:{port}"}
            running.append(subprocess.Popen(["bash", str(script)], env=os.environ | own))
        if stop:
            for worker, process in enumerate(running):
                mark = tmp_path / f"w{worker}" / "code" / "started"
                while not mark.exists() and process.poll() is None:
                    pass
                # As systemd does: the script itself hears nothing, its shutdown script is run.
                shutdown = commands(one)[-1].files[f"{one.folder}/shutdown.sh"]
                subprocess.run(["bash", "-c", shutdown.replace("/opt/tjax", str(tmp_path / f"w{worker}"))], check=True)
        return [process.wait(timeout=120) for process in running], world

    return run


def test_workers_install_agree_train_and_report(pod, tmp_path):
    codes, world = pod('echo "$A $TJAX_COMMIT $*" > seen', env={"A": "1 2"}, secrets={"KEY": "stored"})
    assert codes == [0, 0], (tmp_path / "w0" / "log").read_text()
    for worker in range(2):
        assert (tmp_path / f"w{worker}" / "code" / "seen").read_text() == f"1 2 {SOURCE.commit} train x\n"
        assert world.bucket(f"b-demo/demo/launch/exit/1/w-{worker}").read_text() == f"w-{worker} 0\n"
        assert world.bucket(f"b-demo/demo/launch/logs/1/w-{worker}.log").exists()
    # The first worker gives the slice back, once.
    (delete,) = world.calls("gcloud", "compute", "tpus", "queued-resources", "delete")
    assert {"demo", "--force", "--async"} <= set(delete)
    assert len(world.calls("gcloud", "secrets", "versions", "access")) == 2
    # After a reboot nothing is done twice.
    assert pod("echo again > seen")[0] == [0, 0]
    assert "again" not in (tmp_path / "w0" / "code" / "seen").read_text()


def test_the_exit_code_of_training_is_reported(pod, tmp_path):
    codes, world = pod("exit 3", keep=True)
    assert codes == [3, 3]
    assert world.bucket("b-demo/demo/launch/exit/1/w-1").read_text() == "w-1 3\n"
    assert world.calls("gcloud", "compute", "tpus", "queued-resources", "delete") == []


def test_a_preempted_worker_saves_and_does_not_count_as_ended(pod, tmp_path):
    train = 'trap "echo saved > saved; exit 143" TERM; touch started; while true; do sleep 0.1; done'
    codes, world = pod(train, stop=True)
    assert codes == [143, 143]
    for worker in range(2):
        assert (tmp_path / f"w{worker}" / "code" / "saved").exists()
        assert not world.bucket(f"b-demo/demo/launch/exit/1/w-{worker}").exists()
        assert world.bucket(f"b-demo/demo/launch/logs/1/w-{worker}.log").exists()
    assert world.calls("gcloud", "compute", "tpus", "queued-resources", "delete") == []


def test_a_cap_goes_on_counting_after_a_reboot(pod, tmp_path):
    train = 'trap "exit 143" TERM; touch started; while true; do sleep 0.1; done'
    for worker in range(2):
        (tmp_path / f"w{worker}").mkdir()
        (tmp_path / f"w{worker}" / "1.began").write_text(f"{time.time() - 3598:.0f}\n")
    codes, world = pod(train, seconds=3600)
    assert codes == [124, 124]
    assert world.bucket("b-demo/demo/launch/exit/1/w-0").read_text() == "w-0 124\n"


def test_workers_that_disagree_do_not_train(pod, tmp_path):
    codes, world = pod("touch trained", first='[ "$TJAX_PROCESS" = 0 ] || TJAX_COMMIT=other')
    assert codes == [1, 1]
    for worker in range(2):
        log = (tmp_path / f"w{worker}" / "log").read_text()
        assert "tjax: before training: commit differs: " in log
        assert not (tmp_path / f"w{worker}" / "code" / "trained").exists()
        assert world.bucket(f"b-demo/demo/launch/exit/1/w-{worker}").read_text() == f"w-{worker} 1\n"


# The batch script of SLURM.


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run the batch script once, as a node would; returns its exit code."""
    world = make_world(tmp_path, monkeypatch)
    folder = tmp_path / "job"
    (folder / "code").mkdir(parents=True)
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "python").chmod(0o755)

    def run(train, turns=0, **changes):
        path = tmp_path / "bin" / "tjax"
        path.write_text(f"#!/bin/sh\n{train}\n")
        path.chmod(0o755)
        one = Job("demo", ("tjax", "train", "x"), Slurm(retries=3), str(folder), SOURCE, **changes)
        text = one.backend.script(one)
        (folder / "job.sh").write_text(text)
        own = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(turns)}
        return subprocess.run(["bash", folder / "job.sh"], env=os.environ | own, check=False).returncode, world, folder

    return run


def test_a_batch_job_that_ran_out_of_time_takes_another_turn(batch):
    _, world, folder = batch("exit 143")
    assert world.calls("scontrol", "requeue") == [["scontrol", "requeue", "4711"]]
    assert not (folder / "exit").exists()
    _, world, folder = batch("exit 143", turns=3)
    assert len(world.calls("scontrol", "requeue")) == 1
    assert (folder / "exit").read_text() == "143\n"


def test_a_batch_job_that_was_stopped_or_ended_takes_none(batch):
    _, world, folder = batch("exit 0")
    assert (folder / "exit").read_text() == "0\n"
    (folder / "stop").touch()
    code, world, _ = batch("exit 143")
    assert code == 143
    assert (folder / "exit").read_text() == "143\n"
    code, world, _ = batch("exit 5")
    assert (code, (folder / "exit").read_text()) == (5, "5\n")
    assert world.calls("scontrol", "requeue") == []


def test_a_batch_job_reads_its_environment(batch, tmp_path):
    file = tmp_path / "own.env"
    file.write_text("# mine\nB=two words\n\n")
    file.chmod(0o600)
    _, _, folder = batch('echo "$A|$B|$TJAX_COMMIT" > seen', env={"A": "it's"}, env_file=str(file))
    assert (folder / "code" / "seen").read_text() == f"it's|two words|{SOURCE.commit}\n"


def test_the_cap_of_a_batch_job_holds_for_all_its_turns(batch):
    _, world, folder = batch("sleep 5", seconds=1)
    assert (folder / "exit").read_text() == "124\n"
    assert world.calls("scontrol", "requeue") == []
    assert 1 <= int((folder / "spent").read_text()) < 60
    (folder / "spent").write_text("3599\n")
    assert batch("sleep 5", seconds=3600)[0] == 124
    assert int((folder / "spent").read_text()) >= 3600
