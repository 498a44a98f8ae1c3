"""The command lines that we make, read by the vendors' own programs where they are installed; nothing is reached."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from transformer_jax.launch import Gke, Job, Source, TpuVm, commands, find_slice
from transformer_jax.launch.vendors import explain

TPU = TpuVm(
    find_slice("v5e-16"),
    "p",
    "us-west4-a",
    "gs://b-demo",
    spot=True,
    valid_until="6h",
    service_account="me@p.iam.gserviceaccount.com",
    network="n",
    subnetwork="s",
    internal_ip=True,
)


def asked(tmp_path, backend) -> set[tuple[str, ...]]:
    """Every command that a job on this backend can lead to."""
    (tmp_path / "env").write_text("A=1\n")
    one = Job("demo", ("tjax", "train", "x"), backend, str(tmp_path), Source(".", "a" * 40), env_file=f"{tmp_path}/env")
    steps = [*commands(one), *backend.stop(one, ""), *backend.finish(one), backend.ssh(one, "", "3")]
    steps += [backend.logs(one, "", "all", 9, True), backend.logs(one, "", "1", 9, False, over=True)]
    for step in steps:
        for path, content in step.files.items():
            Path(path).write_text(content)
    return {step.argv for step in steps}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_reads_every_command(tmp_path):
    nobody = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "nobody"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    (tmp_path / "code.tar.gz").touch()
    found = asked(tmp_path, TPU) | asked(tmp_path, replace(TPU, slices=2, internal_ip=False))
    # One of each kind: of one slice, and of several.
    found = {
        (*argv[:5], len(argv)): argv for argv in sorted(found) if argv[:3] == ("gcloud", "compute", "tpus")
    }.values()
    assert len(found) >= 6
    running = {argv: subprocess.Popen(argv, env=nobody, stderr=subprocess.PIPE, text=True) for argv in found}
    for argv, process in running.items():
        _, err = process.communicate(timeout=120)
        # It looks for an account only after it has understood the command; a mistake in an option comes before.
        assert "do not currently have an active account" in err, (argv, err)
        assert "gcloud auth login" in str(explain(argv, process.returncode, err))
    wrong = subprocess.run(
        [*next(iter(found)), "--no-such-option"], env=nobody, capture_output=True, text=True, check=False
    )
    assert "active account" not in wrong.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_reads_every_command(tmp_path):
    backend = Gke(find_slice("v5e-16"), "p", "us-west4-a", "gs://b-demo", cluster="c")
    config = tmp_path / "config"
    cluster = "{name: c, cluster: {server: 'http://127.0.0.1:9'}}"
    context = "{name: gke_p_us-west4-a_c, context: {cluster: c, user: ''}}"
    config.write_text(f"apiVersion: v1\nkind: Config\nclusters: [{cluster}]\ncontexts: [{context}]\n")
    for argv in asked(tmp_path, backend):
        if argv[0] != "kubectl":
            continue
        own = os.environ | {"KUBECONFIG": str(config)}
        done = subprocess.run([*argv, "--request-timeout=2s"], env=own, capture_output=True, text=True, check=False)
        assert "127.0.0.1:9" in done.stderr, (argv, done.stderr)
        assert "the cluster does not answer" in str(explain(argv, done.returncode, done.stderr))
