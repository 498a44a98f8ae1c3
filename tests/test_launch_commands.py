"""What a launch would write and run: a pure function, judged line by line."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.schema import JOBSET, violations
from transformer_jax.cli.launching import overrides
from transformer_jax.errors import UserError
from transformer_jax.launch import Budget, Gke, Job, Local, Slurm, Source, TpuVm, commands, find_slice
from transformer_jax.launch.command import Command, shell
from transformer_jax.launch.secrets import environment, read_env_file, references, refuse_secrets
from transformer_jax.launch.watch import dry_run
from transformer_jax.recipes import find_recipe

SOURCE = Source(".", "0123456789abcdef0123456789abcdef01234567")
TPU = TpuVm(find_slice("v5e-16"), "my-project", "us-west4-a", "gs://my-bucket")
GKE = Gke(find_slice("v5e-16"), "my-project", "us-west4-a", "gs://my-bucket", cluster="my-cluster")
SLURM = Slurm(nodes=3, gpus_per_node=4, partition="gpu", time="24:00:00")


def job(backend, **changes) -> Job:
    plain = Job("gpt", ("tjax", "train", "gpt2_124m", "--out", "there"), backend, "runs/jobs/gpt", SOURCE)
    return replace(plain, **changes)


def words(backend, verb, **changes) -> list[str]:
    """The arguments of the one command that has `verb` in it."""
    (found,) = [command for command in commands(job(backend, **changes)) if verb in command.argv]
    return list(found.argv)


def test_a_tpu_is_one_queued_resource_whose_workers_start_themselves():
    create = words(replace(TPU, spot=True, valid_until="6h"), "create")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "gpt"]
    assert set(create[6:]) == {
        "--project=my-project",
        "--zone=us-west4-a",
        "--node-id=gpt",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--metadata-from-file=startup-script=runs/jobs/gpt/startup.sh,shutdown-script=runs/jobs/gpt/shutdown.sh",
        "--labels=tjax-job=gpt",
        "--spot",
        "--valid-until-duration=6h",
    }
    assert "--reserved" in words(replace(TPU, reserved=True), "create")
    several = words(replace(TPU, slices=2), "create")
    assert {"--node-count=2", "--node-prefix=gpt"} <= set(several)
    assert not [word for word in several if word.startswith("--node-id") or word == "--spot"]


@pytest.mark.parametrize("backend", [TPU, GKE], ids=["tpu_vm", "gke"])
def test_the_dry_run_of_two_slices_reads_as_it_did(backend, request):
    """UPDATE_GOLDEN=1 writes the scripts anew; read them against the vendors' pages, which `docs/launch.md` lists."""
    path = Path(__file__).parent / "golden" / "launch" / f"{request.node.callspec.id}_two_slices.sh"
    two = job(replace(backend, slices=2, spot=True), seconds=7200)
    text = dry_run(two, commands(two))
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
    assert (two.backend.chips, two.backend.workers, two.backend.devices) == (32, 8, 32)


def test_no_command_reaches_one_worker_where_all_are_meant():
    for backend in (TPU, replace(TPU, slices=2)):
        one = job(backend)
        for command in [*backend.stop(one, ""), backend.probe(one, ""), backend.logs(one, "", "all", 5, True)]:
            if "ssh" in command.argv:
                assert "--worker=all" in command.argv
                assert ("--node=all" in command.argv) == (backend.slices > 1)


def test_a_worker_of_the_second_slice_is_found_there():
    backend = replace(TPU, slices=2)
    assert {"--node=1", "--worker=2"} <= set(backend.logs(job(backend), "", "6", 5, False).argv)
    shell_there = backend.ssh(job(backend), "", "6").argv
    assert "gpt-1" in shell_there
    assert "--worker=2" in shell_there


@pytest.mark.parametrize("backend", [TPU, replace(TPU, slices=2), GKE, SLURM, Local(3)], ids=lambda b: type(b).__name__)
def test_the_dry_run_is_a_script_that_a_shell_can_read(backend, tmp_path):
    for changed in (False, True):
        one = job(backend, source=replace(SOURCE, changed=changed), env={"A": "it's $HOME"}, seconds=3600)
        text = dry_run(one, commands(one))
        script = tmp_path / "script.sh"
        script.write_text(text)
        subprocess.run(["bash", "-n", str(script)], check=True)
        for command in commands(one):
            assert f"# {command.purpose}" in text
            for path, content in command.files.items():
                assert content in text
                if path.endswith(".sh"):
                    script.write_text(content)
                    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_printed_command_means_what_is_run(tmp_path):
    argv = ("printf", "%s\n", "--a=it's", "two words", "$HOME", "--long-option-that-breaks-the-line=" + "x" * 90)
    for text in (shell(argv), shell(argv, broken=True), Command("print", argv).script()):
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == list(argv[2:])


def test_the_jobset_follows_its_schema():
    plain = GKE.manifest(job(GKE))
    assert violations(plain, JOBSET, JOBSET) == []
    rich = replace(GKE, spot=True, slices=3, service_account="writer", namespace="research")
    full = rich.manifest(
        job(rich, seconds=7200, env={"A": "1"}, env_file="secrets.env", secrets={"WANDB_API_KEY": "wandb/key"})
    )
    assert violations(full, JOBSET, JOBSET) == []
    spec = full["spec"]["replicatedJobs"][0]
    assert spec["replicas"] == 3
    assert spec["template"]["spec"]["parallelism"] == spec["template"]["spec"]["completions"] == 4
    pod = spec["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (train,) = pod["containers"]
    assert train["resources"]["limits"] == {"google.com/tpu": "4"}
    assert {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}} in train["env"]
    assert train["envFrom"] == [{"secretRef": {"name": "gpt-env"}}]
    # What trying again will not mend is not tried again.
    assert spec["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 124]
    (rule,) = full["spec"]["failurePolicy"]["rules"]
    assert rule == {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_the_schema_can_refuse():
    wrong = json.loads(json.dumps(GKE.manifest(job(GKE))))
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["paralellism"] = 4
    wrong["spec"]["failurePolicy"]["maxRestarts"] = "10"
    del wrong["spec"]["replicatedJobs"][0]["name"]
    assert len(violations(wrong, JOBSET, JOBSET)) == 3


def test_the_same_in_terms_of_xpk():
    (line,) = [note for note in GKE.notes(job(GKE)) if note.startswith("xpk")]
    for part in ("--tpu-type=v5litepod-16", "--num-slices=1", "--cluster=my-cluster", "--workload=gpt"):
        assert part in line
    assert "--zone=us-west4-a" in line
    assert "--zone" not in replace(GKE, zone="us-west4").notes(job(GKE))[-1]


def test_every_kubectl_names_its_cluster():
    one = job(GKE, env_file="x")
    steps = [*commands(one), *GKE.stop(one, ""), GKE.logs(one, "", "2", 5, True), GKE.ssh(one, "", "2")]
    found = [shell(step.argv) for step in steps if "kubectl" in shell(step.argv)]
    assert len(found) >= 7
    for line in found:
        assert line.count("--context=gke_my-project_us-west4-a_my-cluster") == line.count("kubectl ")


def test_one_process_a_gpu_under_slurm():
    (script,) = [content for command in commands(job(SLURM)) for content in command.files.values()]
    for line in ("--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@300", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "srun --label --kill-on-bad-exit=1 tjax train gpt2_124m --out there\n" in script
    assert SLURM.chips == SLURM.workers == 12
    assert Slurm(nodes=5, gpus_per_node=0).chips == 5
    assert "--partition" not in Slurm().script(job(Slurm()))
    more = replace(SLURM, sbatch=("cpus-per-task=12", "exclusive"))
    assert "#SBATCH --cpus-per-task=12\n#SBATCH --exclusive\n" in more.script(job(more))


def test_processes_know_who_they_are():
    backend = Local(3, devices_per_process=2)
    own = [backend.environment(process, 4567) for process in range(3)]
    assert [env["TJAX_PROCESS"] for env in own] == ["0", "1", "2"]
    assert {(env["TJAX_COORDINATOR"], env["TJAX_PROCESSES"]) for env in own} == {("127.0.0.1:4567", "3")}
    assert backend.devices == 6
    shared = Local(2, gpus=("0", "1", "2", "5"))
    assert [shared.environment(process, 1)["CUDA_VISIBLE_DEVICES"] for process in range(2)] == ["0,1", "2,5"]
    with pytest.raises(UserError, match="does not divide the 4 GPUs"):
        commands(job(replace(shared, processes=3)))


def test_the_cap_is_kept_on_the_machines_too():
    budget = Budget(price=1.5, most=36.0)
    assert budget.cost(16, 3600) == 24.0
    assert budget.seconds_left(16, 0.0) == 5400
    assert budget.seconds_left(16, 24.0) == 1800
    assert budget.seconds_left(16, 99.0) == 1
    assert Budget(price=1.5).seconds_left(16, 99.0) == 0
    for backend in (TPU, GKE, SLURM):
        texts = [text for command in commands(job(backend, seconds=5400)) for text in command.files.values()]
        (text,) = [text for text in texts if "timeout --signal=TERM --kill-after=300" in text]
        assert "left=$((5400 " in text
    with pytest.raises(UserError, match="--price"):
        commands(job(TPU, budget=Budget(most=10.0)))


def test_the_tree_that_travels_is_a_commit_and_perhaps_a_patch():
    names = [word for command in commands(job(TPU)) for word in command.argv if "runs/jobs" in word]
    assert not [name for name in names if "patch" in name]
    changed = commands(job(TPU, source=replace(SOURCE, changed=True)))
    (upload,) = [command.argv for command in changed if command.argv[:3] == ("gcloud", "storage", "cp")]
    assert "runs/jobs/gpt/changes.patch" in upload
    for command in changed:
        assert "TJAX_COMMIT" not in " ".join(command.argv)
    startup = changed[-1].files["runs/jobs/gpt/startup.sh"]
    assert f"export TJAX_COMMIT={SOURCE.commit}+changes\n" in startup


def test_no_secret_reaches_a_command_line(tmp_path):
    file = tmp_path / "secrets.env"
    file.write_text("# mine\nWANDB_API_KEY=hf_abcdefghijklmnopqrstuvwxyz\n\nNAME=two words\n")
    with pytest.raises(UserError, match="chmod 600"):
        read_env_file(str(file))
    file.chmod(0o600)
    assert read_env_file(str(file)) == {"WANDB_API_KEY": "hf_abcdefghijklmnopqrstuvwxyz", "NAME": "two words"}
    for backend in (TPU, SLURM):
        for command in commands(job(backend, env_file=str(file))):
            assert "hf_" not in " ".join([*command.argv, *command.files.values()])
    stored = commands(job(TPU, secrets={"WANDB_API_KEY": "wandb"}))[-1].files["runs/jobs/gpt/startup.sh"]
    assert "gcloud secrets versions access latest --secret=wandb --project=my-project" in stored
    file.write_text("no equals sign\n")
    with pytest.raises(UserError, match=r"secrets\.env:1"):
        read_env_file(str(file))


@pytest.mark.parametrize(
    "pair",
    [
        "WANDB_API_KEY=x",
        "MY_TOKEN=x",
        "DB_PASSWORD=x",
        "A=hf_abcdefghijklmnopqrstuvwxyz",
        "A=sk-abcdefghijklmnopqrstuvwxyz",
        "A=ghp_abcdefghijklmnopqrstuvwxyz",
        "A=0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_looks_like_a_secret_is_refused(pair):
    with pytest.raises(UserError, match="looks like a secret"):
        environment([pair])
    value = pair.partition("=")[2]
    if value.startswith(("hf_", "sk-", "ghp_")):
        with pytest.raises(UserError, match="secret"):
            refuse_secrets(["tjax", "train", "--data.dataset", value])
        with pytest.raises(UserError, match="secret itself"):
            references([f"A={value}"])


def test_plain_environment_passes():
    assert environment(["LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2", "A="]) == {
        "LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2",
        "A": "",
    }
    assert references(["WANDB_API_KEY=wandb/key"]) == {"WANDB_API_KEY": "wandb/key"}
    for bad in ("A", "1A=2", "=x"):
        with pytest.raises(UserError, match="NAME=VALUE"):
            environment([bad])


@pytest.mark.parametrize(
    ("backend", "changes", "part"),
    [
        (TPU, {"name": "Gpt_2"}, "lower-case"),
        (replace(TPU, zone="us-west4"), {}, "--zone us-west4"),
        (replace(TPU, bucket="my-bucket"), {}, "gs://"),
        (replace(TPU, bucket="gs://b"), {}, "three characters or more"),
        (replace(TPU, project=""), {}, "--project is needed"),
        (replace(TPU, valid_until="6 hours"), {}, "--valid-until 6 hours"),
        (replace(TPU, slices=0), {}, "--slices"),
        (replace(TPU, spot=True, reserved=True), {}, "--spot and --reserved"),
        (replace(TPU, slice=find_slice("tpu7x-8")), {}, "--cluster"),
        (replace(GKE, slice=find_slice("v5e-8"), slices=2), {}, "several hosts"),
        (replace(GKE, slice=find_slice("v2-8")), {}, "GKE"),
        (GKE, {"secrets": {"A": "wandb"}}, "SECRET/KEY"),
        (replace(SLURM, time="one day"), {}, "--time one day"),
        (replace(SLURM, nodes=0), {}, "--nodes"),
        (replace(SLURM, sbatch=("nodes=2",)), {}, "sets nodes itself"),
        (replace(SLURM, sbatch=("--mem=0",)), {}, "without its hyphens"),
        (SLURM, {"secrets": {"A": "wandb"}}, "--env-file"),
        (SLURM, {"env_file": "absent.env"}, "no such file"),
        (Local(0), {}, "--processes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(backend, changes, part):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        commands(job(backend, **changes))
    assert part in str(error.value)


def test_changes_of_a_recipe_are_passed_on_as_options():
    before = find_recipe("transformer_demo_en_ko")
    assert overrides(before, before) == []
    after = replace(
        before,
        train=replace(before.train, steps=7),
        mesh=replace(before.mesh, data=2, fsdp=-1),
        optim=replace(before.optim, schedule=replace(before.optim.schedule, peak=3e-5, kind="cosine")),
        data=replace(before.data, bucket_lengths=(8, 16, 24)),
    )
    options = overrides(before, after)
    assert options[options.index("--train.steps") + 1] == "7"
    assert options[options.index("--mesh.fsdp") + 1] == "-1"
    start = options.index("--data.bucket-lengths")
    assert options[start + 1 : start + 4] == ["8", "16", "24"]
