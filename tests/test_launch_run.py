"""Launching as a person does it, against programs that answer as the real ones do."""

from __future__ import annotations

import json
import tarfile

import pytest

from tests.fakes import PROGRAMS, git, make_world
from transformer_jax.cli import main
from transformer_jax.launch import store

RECIPE = "transformer_demo_en_ko"
SLICE = ["--on", "v5e-16", "--project", "p", "--zone", "us-west4-a", "--bucket", "gs://b-demo"]
BATCH = ["--on", "slurm", "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu"]
ROWS = ["--job", "demo", "--data.rows-multiple", "16"]
TPU = [*SLICE, *ROWS]
GKE = [*TPU, "--cluster", "c"]
SLURM = [*BATCH, *ROWS]
QUICK = ["--poll", "0", "--no-doctor"]
QUEUED = ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING"]
DONE = "EXIT 0 0 0 0"
CREATE = ("gcloud", "compute", "tpus", "queued-resources", "create")
DELETE = ("gcloud", "compute", "tpus", "queued-resources", "delete")


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


@pytest.fixture
def tjax(capfd):
    """Run a command line; returns exit code, standard output, standard error."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return call


def refused(result, *parts):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    *progress, last = err.splitlines()
    assert not [line for line in progress if "rror" in line], err
    assert last.startswith("tjax: "), err
    for part in parts:
        assert part in last, last


# Cloud TPU.


def test_a_run_on_a_slice_from_the_queue_to_its_end(world, tjax):
    world.is_so(lives=[[*QUEUED, "ACTIVE", "ACTIVE", DONE]])
    code, out, err = tjax("launch", RECIPE, *TPU, *QUICK, "--train.steps", "30", "--price", "1.2")
    assert code == 0, err
    assert out == ""
    for line in ("demo: queued (creating)", "demo: queued (waiting for resources)", "demo: running", "demo: done"):
        assert line in err
    script = (world.work / "runs/jobs/demo/startup.sh").read_text()
    options = "--data.rows-multiple 16 --train.steps 30"
    assert f"exec tjax train transformer_demo_en_ko {options} --out gs://b-demo/demo\n" in script
    with tarfile.open(world.bucket("b-demo/demo/launch/code.tar.gz")) as tree:
        assert {"pyproject.toml", "constraints/py312.txt"} <= set(tree.getnames())
    assert len(world.calls(*CREATE)) == len(world.calls(*DELETE)) == 1
    assert {"--force", "--quiet"} <= set(world.calls(*DELETE)[0])
    record = store.load("demo")
    assert record.phase == "done"
    assert record.job.source.commit == git("rev-parse", "HEAD", cwd=world.work)
    code, out, _ = tjax("jobs", "--json")
    (row,) = json.loads(out)["jobs"]
    assert (row["state"], row["chips"], row["where"]) == ("done", 16, "v5e-16 in us-west4-a")
    assert row["commit"] == record.job.source.commit


def test_a_slice_that_was_taken_away_is_asked_for_again(world, tjax):
    world.is_so(lives=[["ACTIVE", "SUSPENDED"], [*QUEUED, "ACTIVE", "SUSPENDED"], ["ACTIVE", DONE]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK, "--spot")
    assert code == 0, err
    assert err.count("asking for another slice") == 2
    assert len(world.calls(*CREATE)) == len(world.calls(*DELETE)) == 3
    assert "--spot" in world.calls(*CREATE)[0]
    assert len(world.calls("gcloud", "storage", "cp")) == 1  # the tree is still in the bucket
    assert store.load("demo").preemptions == 2


def test_a_slice_whose_machine_was_preempted_under_an_active_request(world, tjax):
    world.is_so(lives=[["ACTIVE"]], nodes="PREEMPTED")
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK, "--retries", "1")
    assert code == 1
    assert "failed: taken away, and launched again 1 times already" in err
    assert len(world.calls(*CREATE)) == len(world.calls(*DELETE)) == 2


def test_a_worker_that_fails_is_named_and_the_slice_given_back(world, tjax):
    world.is_so(lives=[["ACTIVE", "EXIT 1 2"]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK)
    assert code == 1
    assert "tjax: demo failed: w-0 ended with exit code 1. `tjax logs demo` shows what it wrote." in err
    assert len(world.calls(*CREATE)) == len(world.calls(*DELETE)) == 1


def test_who_was_lost_is_named_before_who_noticed_it(world, tjax):
    world.is_so(lives=[["ACTIVE", "EXIT 75 75 137 75"]])
    assert "w-2 ended with exit code 137" in tjax("launch", RECIPE, *TPU, *QUICK)[2]


def test_a_laptop_may_lose_its_network(world, tjax):
    world.is_so(lives=[["ACTIVE", "NO NETWORK", "NO NETWORK", "ACTIVE", DONE]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK)
    assert code == 0
    assert err.count("no answer") == 1
    world.is_so(lives=[["NO NETWORK"]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK)
    assert code == 2
    assert "Unable to find the server" in err.splitlines()[-1]
    assert store.load("demo").phase == "queued"  # nothing is known to have ended


def test_a_request_that_expires_says_so(world, tjax):
    world.is_so(lives=[["WAITING_FOR_RESOURCES", "FAILED"]], failed="The valid until time has passed.")
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK, "--valid-until", "1h")
    assert code == 1
    assert "demo failed: The valid until time has passed." in err


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        ({"signed_out": True}, ["gcloud is not signed in: run `gcloud auth login`."]),
        (
            {
                "create": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has "
                "been exceeded. Limit: 8 in zone us-west4-a. [EID: 0x12ab]"
            },
            [
                "Limit: 8 in zone us-west4-a.",
                "Ask for more of TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI",
                "quota",
            ],
        ),
        (
            {"create": "PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied on 'projects/p'"},
            ["permission denied", "tpu.queuedResources.create", "Ask an owner"],
        ),
        (
            {"create": "NOT_FOUND: Location us-west4-a is not found or access is unauthorized."},
            ["Location us-west4-a is not found", "locations list"],
        ),
        (
            {
                "create": "INVALID_ARGUMENT: Cloud TPU received a bad request. the accelerator v5litepod-16 was not "
                "found in zone us-west4-a"
            },
            ["v5litepod-16 was not found", "accelerator-types list"],
        ),
        (
            {"create": 'RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"; try another'},
            ["no more capacity", "--valid-until"],
        ),
        ({"forbidden_buckets": ["b-demo"]}, ["permission denied", "storage.objects.create"]),
    ],
    ids=["signed-out", "quota", "denied", "zone", "accelerator", "capacity", "bucket"],
)
def test_what_google_refuses_is_said_in_one_line(world, tjax, scenario, parts):
    world.is_so(**scenario)
    refused(tjax("launch", RECIPE, *TPU, *QUICK), *parts)
    assert world.calls(*DELETE) == []
    assert store.load("demo").phase == "failed"


def test_a_request_of_somebody_else_is_left_alone(world, tjax):
    world.is_so(lives=[["WAITING_FOR_RESOURCES"]])
    assert tjax("launch", RECIPE, *TPU, *QUICK, "--detach")[0] == 0
    (world.work / "runs/jobs/demo/job.json").unlink()  # as if another machine had launched it
    refused(tjax("launch", RECIPE, *TPU, *QUICK), "already exists", "--job")
    assert world.calls(*DELETE) == []


def test_the_doctor_is_asked_before_anything_is(world, tjax):
    at_hand = {"quotas": quota(8), "lives": [["ACTIVE", DONE]]}
    for scenario, part in (
        (at_hand, "quota: TPUV5sLitepodPerProjectPerZoneForTPUAPI allows 8 in us-west4-a, and 16 chips are needed"),
        (at_hand | {"quotas": quota(64), "bucket": {"location": "EUROPE-WEST4"}}, "bucket region: europe-west4, but"),
        (at_hand | {"quotas": quota(64), "offers": ["v4-8"]}, "does not offer v5litepod-16; it has none"),
        (at_hand | {"quotas": quota(64), "zones": []}, "Location us-west4-a is not found"),
        (at_hand | {"quotas": quota(64), "forbidden_buckets": ["b-demo"]}, "bucket writable"),
        (at_hand | {"signed_out": True}, "no account is signed in"),
    ):
        world.is_so(**scenario)
        refused(tjax("launch", RECIPE, *TPU, "--poll", "0"), part, "--no-doctor")
    world.is_so(**at_hand | {"quotas": quota(64)})
    large = ["launch", "gpt2_1558m", *SLICE, "--poll", "0"]
    refused(
        tjax(*large), "gpt2_1558m does not fit v5e-16", "GiB a device of 15.75 (estimate)", "tjax plan", "--no-doctor"
    )
    assert world.calls(*CREATE) == []
    assert tjax("launch", RECIPE, *TPU, "--poll", "0")[0] == 0


def quota(limit, name="TPUV5sLitepodPerProjectPerZoneForTPUAPI"):
    here = {
        "dimensions": {"zone": "us-west4-a"},
        "details": {"value": str(limit)},
        "applicableLocations": ["us-west4-a"],
    }
    other = {"dimensions": {"zone": "us-east1-c"}, "details": {"value": "1"}, "applicableLocations": ["us-east1-c"]}
    serving = {"quotaId": "TPUV5sLitepodServingPerProjectPerZoneForTPUAPI", "dimensionsInfos": [here]}
    return [{"quotaId": name, "dimensionsInfos": [here, other]}, serving]


def test_a_detached_job_is_found_looked_after_and_stopped(world, tjax):
    world.is_so(lives=[["PROVISIONING", "ACTIVE"]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK, "--detach")
    assert code == 0
    assert "tjax stop demo" in err
    assert "provisioning" in tjax("jobs")[1]
    code, _, err = tjax("stop", "demo")
    assert code == 0
    (save,) = [call for call in world.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh") if "kill -TERM" in call[-1]]
    assert "--worker=all" in save
    assert len(world.calls(*DELETE)) == 1
    assert store.load("demo").phase == "stopped"
    assert "is not running" in tjax("stop", "demo")[2]


def test_a_slice_is_given_back_even_if_its_workers_cannot_be_reached(world, tjax):
    world.is_so(lives=[["ACTIVE"]], ssh_fails=True)
    tjax("launch", RECIPE, *TPU, *QUICK, "--detach")
    refused(tjax("stop", "demo"), "ssh-add")
    assert len(world.calls(*DELETE)) == 1


def test_the_same_command_looks_after_a_job_that_runs(world, tjax):
    world.is_so(lives=[["ACTIVE", "ACTIVE", DONE]])
    tjax("launch", RECIPE, *TPU, *QUICK, "--detach")
    refused(tjax("launch", RECIPE, *TPU, *QUICK, "--train.steps", "5"), "runs already", "tjax stop demo")
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK)
    assert code == 0
    assert "runs already" in err
    assert len(world.calls(*CREATE)) == 1


def test_the_spend_cap_stops_the_job(world, tjax, monkeypatch):
    clock = iter(range(0, 10**9, 1800))  # every look is half an hour later
    monkeypatch.setattr("transformer_jax.launch.watch.now", lambda: next(clock))
    world.is_so(lives=[["ACTIVE"]])
    code, _, err = tjax("launch", RECIPE, *TPU, *QUICK, "--price", "1", "--max-cost", "30")
    assert code == 143
    assert "the spend cap of 30.00 is reached; stopping" in err
    assert len(world.calls(*DELETE)) == 1
    script = (world.work / "runs/jobs/demo/startup.sh").read_text()
    assert "left=$((6750 + " in script  # 30 / (16 chips x 1) hours
    code, out, _ = tjax("cost", "--json")
    (row,) = json.loads(out)["jobs"]
    assert row["cost"] == pytest.approx(row["hours"] * 16)
    assert row["cost"] >= 30
    assert json.loads(out)["total"] == row["cost"]
    assert "30.00" in tjax("cost")[1]
    # The cap is that of the job, not of one launch.
    world.is_so(lives=[["ACTIVE", DONE]])
    refused(tjax("launch", RECIPE, *TPU, *QUICK, "--price", "1", "--max-cost", "35"), "has cost", "--max-cost")
    tjax("launch", RECIPE, *TPU, *QUICK, "--price", "1", "--max-cost", "50", "--detach")
    script = (world.work / "runs/jobs/demo/startup.sh").read_text()
    left = int((50 - row["cost"]) / 16 * 3600)
    assert f"left=$(({left} + " in script


def test_logs_come_from_the_machine_and_afterwards_from_the_bucket(world, tjax):
    world.is_so(lives=[["ACTIVE"]], ssh="step 1\n")
    tjax("launch", RECIPE, *TPU, *QUICK, "--detach")
    code, out, _ = tjax("logs", "demo", "--worker", "3", "--lines", "7")
    assert (code, out) == (0, "step 1\n")
    assert {"--worker=3", "--command=tail -n 7 /opt/tjax/log"} <= set(
        world.calls("gcloud", "compute", "tpus", "tpu-vm")[-1]
    )
    tjax("logs", "demo", "--worker", "all", "--follow")
    assert "--worker=all" in world.calls("gcloud", "compute", "tpus", "tpu-vm")[-1]
    refused(tjax("logs", "demo", "--worker", "4"), "a number from 0 to 3, or all")
    refused(tjax("ssh", "demo", "--worker", "all"), "a number from 0 to 3")
    tjax("ssh", "demo", "--worker", "2")
    assert world.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")[-1][-1] == "--worker=2"
    tjax("stop", "demo")
    kept = world.bucket(f"b-demo/demo/launch/logs/{store.load('demo').job.attempt}/w-0.log")
    kept.parent.mkdir(parents=True)
    kept.write_text("the end\n")
    assert tjax("logs", "demo")[:2] == (0, "the end\n")


def test_the_doctor_asks_every_host_of_a_job(world, tjax):
    def line(process, **other):
        plain = {"process": process, "processes": 4, "host": f"w-{process}", "python": "3.12.1", "jax": "0.10.2"}
        plain |= {"jaxlib": "0.10.2", "libtpu": "0.0.30", "flax": "0.12.8", "transformer_jax": "0.1.0"}
        return json.dumps(plain | {"commit": "abc", "chips": 4, "disk": 80.0, "clock": 1000.0 + process} | other) + "\n"

    world.is_so(lives=[["ACTIVE"]], ssh="".join(map(line, range(4))))
    tjax("launch", RECIPE, *TPU, *QUICK, "--detach")
    code, out, _ = tjax("doctor", "--job", "demo")
    assert code == 0, out
    assert "ok         all workers answer: 4 of 4" in out or "ok  all workers answer: 4 of 4" in out
    world.is_so(lives=[["ACTIVE"]], ssh=line(0) + line(1, jax="0.10.1") + line(3, disk=2.0))
    code, out, _ = tjax("doctor", "--job", "demo", "--json")
    assert code == 1
    found = {(check["name"], check["status"]): check for check in json.loads(out)["checks"]}
    assert "3 of 4" in found["all workers answer", "failed"]["detail"]
    told = [check["detail"] for check in json.loads(out)["checks"]]
    assert "jax differs: 0.10.2 on w-0, w-3; 0.10.1 on w-1" in told
    assert "w-3 has only 2.0 GiB of disk left; 10 are needed" in told


def test_what_cannot_be_looked_at_is_never_ok(world, tjax):
    world.is_so(quotas=[], bucket={"location": "NAM4", "location_type": "dual-region"})
    code, out, _ = tjax("doctor", *SLICE, "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["quota"]["status"] == "unchecked"
    assert checks["bucket region"]["status"] == "unchecked"
    hosts = next(check for name, check in checks.items() if "coordinator port" in name)
    assert hosts["status"] == "unchecked"
    assert checks["jax devices"]["status"] == "ok"
    assert checks["slice in the zone"]["status"] == "ok"
    assert code == any(check["status"] == "failed" for check in checks.values())


# The tree that travels.


def test_a_changed_tree_is_refused_or_travels_whole(world, tjax):
    (world.work / "pyproject.toml").write_text('[project]\nname = "transformer_jax"\nversion = "2"\n')
    (world.work / "new.py").write_text("x = 1\n")
    refused(tjax("launch", RECIPE, *TPU, *QUICK), "pyproject.toml and 1 more", "--allow-dirty")
    world.is_so(lives=[["ACTIVE", DONE]])
    status = git("status", "--porcelain", cwd=world.work)
    assert tjax("launch", RECIPE, *TPU, *QUICK, "--allow-dirty")[0] == 0
    assert (
        git("status", "--porcelain", "--", ".", ":(exclude)runs", cwd=world.work) == status
    )  # the index is the user's
    with tarfile.open(world.bucket("b-demo/demo/launch/code.tar.gz")) as tree:
        assert "new.py" in tree.getnames()
        assert "runs" not in tree.getnames()
        assert b'version = "2"' in tree.extractfile("pyproject.toml").read()
    patch = world.bucket("b-demo/demo/launch/changes.patch").read_text()
    assert '+version = "2"' in patch
    assert "new.py" in patch
    assert store.load("demo").job.source.label.endswith("+changes")


def test_launching_twice_needs_no_commit_of_what_launching_wrote(world, tjax):
    world.is_so(lives=[["ACTIVE", DONE]])
    assert tjax("launch", RECIPE, *TPU, *QUICK)[0] == 0
    assert tjax("launch", RECIPE, *TPU, *QUICK)[0] == 0


def test_a_recipe_of_ones_own_must_travel(world, tjax, tmp_path):
    text = (
        "from experiments.transformer import transformer_demo_en_ko\nfrom transformer_jax.config import Experiment\n\n"
        "def mine() -> Experiment:\n    return transformer_demo_en_ko()\n"
    )
    (tmp_path / "mine.py").write_text(text)
    refused(tjax("launch", f"{tmp_path / 'mine.py'}:mine", *TPU, *QUICK), "outside the working tree")
    (world.work / "recipes").mkdir()
    (world.work / "recipes" / "mine.py").write_text(text)
    git("add", "--all", cwd=world.work)
    git("commit", "--quiet", "--message=mine", cwd=world.work)
    code, out, _ = tjax("launch", f"{world.work / 'recipes' / 'mine.py'}:mine", *TPU, "--dry-run")
    assert code == 0
    assert "exec tjax train recipes/mine.py:mine --data.rows-multiple 16 --out gs://b-demo/demo\n" in out


def test_another_project_must_say_how_it_is_installed(world, tjax):
    (world.work / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    git("commit", "--quiet", "--all", "--message=mine", cwd=world.work)
    refused(tjax("launch", RECIPE, *TPU, *QUICK), "--setup")
    code, out, _ = tjax("launch", RECIPE, *TPU, "--dry-run", "--setup", "../uv/bin/uv sync")
    assert code == 0
    assert "install() {\n    ../uv/bin/uv sync\n}" in out


def test_a_folder_without_a_commit_cannot_be_launched(world, tjax, tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path / "bare")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    refused(tjax("launch", RECIPE, *TPU), "not a git checkout")
    git("init", "--quiet", cwd=tmp_path / "bare")
    refused(tjax("launch", RECIPE, *TPU), "no commit yet")


def test_a_dry_run_changes_nothing_and_says_what_the_launch_does(world, tjax):
    code, out, err = tjax("launch", RECIPE, *TPU, "--spot", "--dry-run")
    assert (code, err) == (0, "")
    assert world.calls() == []
    assert not (world.work / "runs").exists()
    world.is_so(lives=[["ACTIVE", DONE]])
    tjax("launch", RECIPE, *TPU, *QUICK, "--spot")
    create = world.calls(*CREATE)[0]
    assert all(word in out for word in create)
    for call in world.calls("gcloud", "storage", "cp"):
        assert " ".join(call) in out


# GKE.


def test_a_jobset_is_applied_and_watched(world, tjax):
    running = {"restarts": 1, "replicatedJobsStatus": [{"name": "slice", "ready": 1}]}
    world.is_so(status=[{}, running, {"terminalState": "Completed", "restarts": 1}], logs="step 1\n")
    code, _, err = tjax("launch", RECIPE, *GKE, *QUICK)
    assert code == 0, err
    assert "demo: queued (its pods wait for nodes)" in err
    assert "demo: running (restarted 1 of 10 times)" in err
    manifest = json.loads((world.work / "runs/jobs/demo/jobset.json").read_text())
    assert manifest["metadata"]["name"] == "demo"
    reach = world.calls("gcloud", "container", "clusters", "get-credentials")[0]
    assert {"c", "--location=us-west4-a", "--project=p"} <= set(reach)
    assert tjax("logs", "demo", "--worker", "3")[1] == "step 1\n"
    logs = world.calls("kubectl", "logs")[-1]
    assert any("job-completion-index=3" in word for word in logs)


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        ({"no_jobset": True}, ["no JobSet controller", "jobset.sigs.k8s.io"]),
        ({"forbidden": True}, ["permission denied", 'cannot create resource "jobsets"']),
        ({"unauthorized": True}, ["gcloud auth login"]),
    ],
    ids=["no-jobset", "forbidden", "unauthorized"],
)
def test_what_a_cluster_refuses_is_said_in_one_line(world, tjax, scenario, parts):
    world.is_so(**scenario)
    refused(tjax("launch", RECIPE, *GKE, *QUICK), *parts)


def test_a_jobset_that_fails_or_is_stopped(world, tjax):
    message = "jobset failed due to one or more job failures (first failed job: demo-slice-0)"
    world.is_so(status=[{"terminalState": "Failed", "conditions": [{"type": "Failed", "message": message}]}])
    code, _, err = tjax("launch", RECIPE, *GKE, *QUICK)
    assert code == 1
    assert message in err
    world.is_so(status=[{"terminalState": "Failed"}], exit_codes="124 143")
    assert tjax("launch", RECIPE, *GKE, *QUICK)[0] == 143
    assert store.load("demo").detail == "the spend cap is reached"
    world.is_so(status=[{}])
    tjax("launch", RECIPE, *GKE, *QUICK, "--detach")
    assert tjax("stop", "demo")[0] == 0
    assert world.calls("kubectl", "delete", "jobset")[-1][3] == "demo"


def test_the_doctor_of_a_cluster(world, tjax):
    world.is_so(no_jobset=True, nodes_ready={"tpu-0": 1})
    code, out, _ = tjax("doctor", *SLICE, "--cluster", "c", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert checks["JobSet"]["status"] == "failed"
    assert "install it" in checks["JobSet"]["mend"]
    assert checks["nodes"]["status"] == "unchecked"
    assert checks["nodes"]["detail"].startswith("0 of 1 slices of v5e-16 are there (4 nodes in one pool each)")


@pytest.mark.parametrize(
    ("pools", "status", "there"),
    [({"a": 4, "b": 4}, "ok", "2 slices"), ({"a": 8}, "ok", "2 slices"), ({"a": 4, "b": 3}, "unchecked", "1 of 2")],
)
def test_every_slice_needs_a_node_pool_of_its_own(world, tjax, pools, status, there):
    world.is_so(nodes_ready=pools)
    checks = json.loads(tjax("doctor", *SLICE, "--slices", "2", "--cluster", "c", "--json")[1])["checks"]
    (nodes,) = [check for check in checks if check["name"] == "nodes"]
    assert (nodes["status"], nodes["detail"][: len(there)]) == (status, there)


# SLURM.


def test_a_batch_job_is_submitted_and_watched(world, tjax):
    world.is_so(squeue=["PENDING (Priority)", "RUNNING node[1-2]", "gone"], exit="0", job="demo")
    code, _, err = tjax("launch", RECIPE, *SLURM, *QUICK)
    assert code == 0, err
    assert "demo: queued (pending (Priority))" in err
    assert "demo: running (node[1-2])" in err
    assert store.load("demo").handle == "4711"
    assert world.calls("squeue")[0][1] == "--jobs=4711"
    script = (world.work / "runs/jobs/demo/job.sh").read_text()
    assert f"export PYTHONPATH={world.work}/runs/jobs/demo/code" in script
    assert (world.work / "runs/jobs/demo/code/pyproject.toml").exists()


@pytest.mark.parametrize(
    ("written", "code", "phase"), [("3", 1, "failed"), ("143", 143, "stopped"), ("124", 143, "stopped")]
)
def test_how_a_batch_job_ended(world, tjax, written, code, phase):
    world.is_so(squeue=["RUNNING node[1-2]", "gone"], exit=written, job="demo")
    assert tjax("launch", RECIPE, *SLURM, *QUICK)[0] == code
    assert store.load("demo").phase == phase


@pytest.mark.parametrize(
    ("scenario", "options", "parts"),
    [
        ({"partitions": ["cpu"]}, [], ["invalid partition specified: gpu", "sinfo"]),
        ({"sbatch": "Invalid account or account/partition combination specified"}, [], ["sacctmgr"]),
        ({"sbatch": "Requested node configuration is not available"}, [], ["Requested node configuration"]),
    ],
    ids=["partition", "account", "nodes"],
)
def test_what_slurm_refuses_is_said_in_one_line(world, tjax, scenario, options, parts):
    world.is_so(**scenario)
    refused(tjax("launch", RECIPE, *SLURM, *QUICK, *options), *parts)


def test_a_batch_job_is_stopped_gently(world, tjax):
    world.is_so(squeue=["RUNNING node[1-2]"])
    tjax("launch", RECIPE, *SLURM, *QUICK, "--detach")
    assert tjax("stop", "demo")[0] == 0
    assert (world.work / "runs/jobs/demo/stop").exists()
    assert [call[1:] for call in world.calls("scancel")] == [["--signal=TERM", "4711"], ["--state=PENDING", "4711"]]


def test_the_doctor_of_a_batch_system(world, tjax):
    world.is_so(sinfo="1 gpu:h100:8 1-00:00:00")
    code, out, _ = tjax("doctor", *BATCH)
    assert code == 1
    assert "nodes: 1 nodes, and 2 are needed" in out
    world.is_so(sinfo="8 gpu:a100:2(S:0-1),nvme:1 1-00:00:00")
    assert "GPUs: a node has 2 GPUs, and 4 are needed" in tjax("doctor", *BATCH)[1]


# Mistakes.


def test_mistakes_before_anything_is_spent(world, tjax):
    def launch(*options):
        return tjax("launch", RECIPE, *options)

    refused(launch(), "--on v5e-16")
    refused(launch("--on", "v5e-17"), "v5e-16 (16 chips) or v5e-32 (32 chips)")
    refused(launch("--on", "slrum"), "Did you mean 'slurm'?")
    refused(launch(*TPU, "--nodes", "3"), "--nodes says nothing about --on v5e-16")
    refused(launch("--on", "local", "--bucket", "gs://b-demo"), "--bucket says nothing about --on local")
    refused(launch("--on", "local", "--retries", "3"), "--retries says nothing about --on local")
    refused(launch("--on", "local", "--detach"), "--detach")
    refused(launch("--on", "slurm", "--keep"), "--keep says nothing about --on slurm")
    refused(launch("--on", "v5e"), "v5e-1, v5e-4, v5e-8")
    refused(launch("--on", "2xv5e-16"), "--on v5e-16 --slices 2")
    refused(launch("--on", "v5e-16", *ROWS), "--project and --zone and --bucket are needed")
    refused(launch(*TPU, "--project", "My Project"), "my-project-123")
    refused(launch(*TPU, "--valid-until", "tomorrow"), "6h")
    refused(launch(*TPU, "--out", "runs/mine"), "name a folder of a bucket")
    refused(launch("--on", "slurm", "--retries", "-1"), "--retries")
    refused(launch("--on", "slurm", "--nodes", "0"), "--nodes")
    refused(launch(*TPU, "--slices", "0"), "--slices")
    refused(launch(*TPU, "--mesh.fsdp", "5"), "5 together, do not divide them")
    refused(launch(*TPU, "--mesh.data", "3"), "mesh data=3", "16 device")
    refused(launch(*TPU, "--mesh.data", "4", "--mesh.fsdp", "2"), "16 device")
    refused(launch(*TPU, "--slices", "2", "--mesh.data", "1", "--mesh.fsdp", "32"), "data=1 does not divide among 2")
    refused(launch("--on", "v3-8", *TPU[2:], "--slices", "2"), "joined from v4 on")
    refused(launch(*TPU, "--data.rows-multiple", "8"), "do not divide it", "--data.rows-multiple 16")
    refused(launch(*TPU, "--model.heads", "5"), "model.heads=5 does not divide")
    refused(launch(*TPU, "--env", "WANDB_API_KEY=abc"), "looks like a secret")
    refused(launch(*TPU, "--env-file", "absent.env"), "no such file")
    refused(launch(*TPU, "--max-cost", "10"), "--price")
    refused(launch(*TPU, "--proyect", "p"), "--proyect", "--project")
    refused(tjax("doctor", "--on", "v5e-16"), "--project and --zone and --bucket are needed")
    refused(tjax("logs", "dema"), "no job 'dema'")
    refused(tjax("launch", "transformer_demo_en_kr", *TPU), "Did you mean")
    assert world.calls() == []


def test_programs_that_are_not_there(tmp_path, monkeypatch, tjax):
    world = make_world(tmp_path, monkeypatch, [name for name in PROGRAMS if name not in ("gcloud", "sbatch")])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'tools'}")
    (tmp_path / "tools").mkdir()
    for tool in ("git", "sh", "env", "mkdir", "tar", "rm", "gzip"):
        (tmp_path / "tools" / tool).symlink_to(f"/usr/bin/{tool}")
    refused(tjax("launch", RECIPE, *TPU, *QUICK), "gcloud is not on PATH", "install the Google Cloud CLI")
    refused(tjax("launch", RECIPE, *SLURM, *QUICK), "sbatch is not on PATH", "login node")
    assert world.calls() == []


def test_a_damaged_record_is_named(world, tjax):
    (world.work / "runs/jobs/demo").mkdir(parents=True)
    (world.work / "runs/jobs/demo/job.json").write_text("{")
    refused(tjax("jobs"), "job.json is damaged")
    (world.work / "runs/jobs/demo/job.json").write_text('{"job": {}}')
    refused(tjax("logs", "demo"), "job.json is damaged")
