"""Laws of `tjax inspect`: it says what a checkpoint holds, whoever wrote it, and reads no array."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from tests.tiny import small, write_pairs
from transformer_jax import verbs
from transformer_jax.cli import main
from transformer_jax.config import ComputeConfig, MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.inspection import inspect_checkpoint
from transformer_jax.nn.module import Skeleton, parameter_count


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    """A run of 2 x 2 x 2 devices, whose arrays are then destroyed, so that nobody can read them."""
    folder = tmp_path_factory.mktemp("pod")
    experiment = small(write_pairs(folder / "pairs.tsv"), steps=2, save_every=1, eval_every=2)
    run = folder / "run"
    verbs.train(replace(experiment, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), run)
    destroyed = [path for path in run.glob("checkpoints/*/*/ocdbt.process_*/d/*") if path.is_file()]
    for path in destroyed:
        path.unlink()
    assert destroyed
    return run


def inspected_elsewhere(path: Path) -> dict:
    """Inspect in a process with one device and no accelerator."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", "from transformer_jax.cli import main; main()", "inspect", str(path), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_checkpoint_of_a_pod_is_told_on_one_device_without_its_arrays(pod):
    found = inspected_elsewhere(pod)
    experiment = small()
    skeleton = Skeleton.of(experiment.model, ComputeConfig(layers="scan"))
    assert (found["step"], found["steps"]) == (2, [1, 2])
    assert {axis: size for axis, size in found["mesh"].items() if size > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found["experiment"]["model"]["feedforward"] == 40
    assert found["parameters"] == parameter_count(skeleton.abstract)
    params = {a["name"]: a for a in found["arrays"] if a["name"].startswith("params.")}
    shapes = {
        f"params.{jax.tree_util.keystr(path, simple=True, separator='.')}": list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(skeleton.abstract)
    }
    assert {name: a["shape"] for name, a in params.items()} == shapes
    assert params["params.decoder.layers.attention.q.weight"]["sharding"] == ["", "fsdp", "tensor", ""]
    assert all(a["dtype"] == "float32" and a["bytes"] == 4 * math.prod(a["shape"]) for a in params.values())
    moments = sum(a["bytes"] for a in found["arrays"] if a["name"].startswith("optimizer.") and ".mu." in a["name"])
    assert moments == found["bytes"]["params"]


def test_step_folder_and_a_lost_experiment(pod, tmp_path, capsys):
    alone = shutil.copytree(pod / "checkpoints" / "1", tmp_path / "1")
    shutil.rmtree(alone / "meta")
    found = inspect_checkpoint(alone)
    assert (found.step, found.steps, found.experiment) == (1, [1], None)
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(pod / "checkpoints" / "1")])
    told = capsys.readouterr().out
    assert "tiny, step 1" in told
    assert "written by 8 device(s): data=2, fsdp=2" in told
    assert "params.embedding" in told
    assert "optimizer." not in told


def test_what_is_no_checkpoint_gets_one_line(pod, tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder without a checkpoint of ours"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is a file without a checkpoint"):
        inspect_checkpoint(pod / "experiment.json")
    broken = shutil.copytree(pod, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints" / "2" / "params" / "d")
    (broken / "checkpoints" / "2" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match="what describes its arrays is lost"):
        inspect_checkpoint(broken)
