"""Every TPU recipe compiles for its slice, fits, and takes what it took: `make plan-all`. Needs libtpu, and no TPU.

A plan of `tests/golden/plan/` is a recipe, slices and overrides, with the memory of a device and the bytes of its
collectives as they were; UPDATE_GOLDEN=1 writes them anew. A weight that is silently replicated, or a gather that has
become an all-reduce, shows there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.test_plan_hlo import bert
from transformer_jax.cli.planning import VERBS, PlanOptions
from transformer_jax.cli.verb import parse
from transformer_jax.config import ComputeConfig, MeshConfig
from transformer_jax.decoding import Decoding
from transformer_jax.nn.module import Skeleton
from transformer_jax.planning.plan import Plan
from transformer_jax.planning.planner import plan
from transformer_jax.planning.target import find_target
from transformer_jax.recipes import find_recipe
from transformer_jax.sampling import Filters
from transformer_jax.sharding import make_mesh, replicated

GOLDEN = sorted((Path(__file__).parent / "golden" / "plan").glob("*.json"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,  # what is planned is what will run
    pytest.mark.filterwarnings("ignore"),  # of libtpu, about the machine
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: `make plan-all`"),
    pytest.mark.skipif("TJAX_PLAN_ALL" not in os.environ, reason="minutes a recipe: `make plan-all`"),
]

golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


@cache
def compiled(path: Path) -> Plan:
    was = json.loads(path.read_text(encoding="utf-8"))
    default = VERBS["plan"].default(was["recipe"])
    options = parse(PlanOptions, default, was["overrides"].split(), "tjax plan")
    found = plan(options.experiment, find_target(was["on"], was.get("slices", 1)))
    assert isinstance(found, Plan), f"{path.stem} does not fit any more: {found}"
    return found


@golden
def test_recipe_takes_what_it_took(path):
    found, was = compiled(path), json.loads(path.read_text(encoding="utf-8"))
    collectives: dict[str, dict[str, int]] = {}
    for move in found.moves:
        between = "" if move.network == "ICI" else f" over {move.network}"
        kind = collectives.setdefault(move.kind + between, {"bytes": 0, "calls": 0})
        kind["bytes"] += move.bytes
        kind["calls"] += move.calls
    now = {"memory": found.memory.total, "collectives": dict(sorted(collectives.items()))}
    if "UPDATE_GOLDEN" in os.environ:
        version = f"libtpu {importlib.metadata.version('libtpu')}"
        path.write_text(json.dumps(was | {"compiler": version} | now, indent=2) + "\n", encoding="utf-8")
        return
    assert found.source == "compiler"
    assert now["memory"] == pytest.approx(was["memory"], rel=0.03)
    assert now["collectives"].keys() == was["collectives"].keys()
    for kind, amounts in was["collectives"].items():
        assert now["collectives"][kind]["bytes"] == pytest.approx(amounts["bytes"], rel=0.05), kind


@golden
def test_estimate_of_memory_is_within_15_percent(path):
    found = compiled(path)
    guess = plan(found.experiment, found.target, compile=False)
    assert guess.memory.total == pytest.approx(found.memory.total, rel=0.15)


def test_what_was_compiled_before_is_no_trouble():
    """The cache of compiled programs holds nothing that a machine without TPUs could load."""
    target = find_target("v5e-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = (plan(bert(data=8), target) for _ in range(2))
    assert isinstance(first, Plan)
    assert first.to_json() == second.to_json()


def test_libtpu_does_not_complain_of_a_missing_tpu():
    """It is there for its compiler: verbs run on the CPU, and say nothing of it."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    program = "from transformer_jax.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "(cpu)" in done.stdout
    assert "TPU" not in done.stderr


@pytest.mark.parametrize("width", [768, 1600], ids=["124m", "1558m"])
def test_writing_copies_no_cache(width, monkeypatch):
    """Keys and values lie in a program of 16 tokens as they lie between two: it needs hardly any memory of its own."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    target, recipe = find_target("v5e-1"), find_recipe("gpt2_124m")
    mesh = make_mesh(MeshConfig(), target.compile_devices())
    model = replace(recipe.model, layers=3, width=width, heads=width // 64, feedforward=0, vocab_size=1024)
    decoding = Decoding((Skeleton.of(model, ComputeConfig("bfloat16", layers="unrolled")),), mesh, model.context, -1, 0)
    weights = (jax.tree.map(partial(_laid_out, mesh, jnp.bfloat16), decoding.skeletons[0].abstract),)
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 512), *[(8,)] * 4, ())]
    with jax.set_mesh(mesh):
        begun = jax.eval_shape(partial(decoding._start, places=1025), weights, *numbers, Filters())
        writing = jax.tree.map(partial(_laid_out, mesh, None), begun)
        closed, turns = jax.ShapeDtypeStruct((8,), bool), jax.ShapeDtypeStruct((), jnp.int32)
        program = decoding._write.lower(weights, writing, closed, Filters(), turns, alternatives=0).compile()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(writing.state))
    assert program.memory_analysis().temp_size_in_bytes < cache / 5


def _laid_out(mesh, dtype, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=replicated(mesh))
