"""Run folders of small decoder-only models with random parameters: nothing is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tests.tiny import tiny
from transformer_jax.completion import Completer
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.nn.stack import stack_layers
from transformer_jax.sharding import make_mesh, parameter_shardings

TEXT = [
    "Was ever woman in this humour woo'd? Was ever woman in this humour won?",
    "Give me my horse: bind up my wounds. Have mercy, Jesu! Soft, I did but dream.",
    "Der Rabe raucht – 까마귀가 담배를 피운다 🐦.",
]
CHARACTERS = Tokenizer.characters(TEXT[:2])
BYTES = Tokenizer.train(TEXT, 300)

GPT2 = GPTConfig(context=48, width=24, layers=1, heads=4, feedforward=40, init_std=0.5)
MODERN = replace(
    GPT2, layers=2, kv_heads=2, windows=(0, 5), positions="rope", norm="rmsnorm", activation="silu", gated=True
)
"""A dense layer and a sliding one."""


def experiment(model: GPTConfig, tokenizer: Tokenizer, name: str = "tiny_gpt") -> Experiment:
    """The least that a run needs to be opened."""
    model = replace(model, vocab_size=tokenizer.vocab_size)
    return replace(tiny(), name=name, model=model, compute=ComputeConfig(layers="unrolled"))


def random_params(model: GPTConfig, seed: int = 0) -> tuple[Skeleton, Params]:
    """Large enough that the next token depends on the ones before it, biases and norms included."""
    skeleton = Skeleton.of(model, ComputeConfig(layers="unrolled"))
    params = jax.jit(skeleton.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return skeleton, jax.tree.unflatten(tree, noisy)


def completer(
    model: GPTConfig = MODERN,
    tokenizer: Tokenizer = CHARACTERS,
    seed: int = 0,
    mesh: MeshConfig | None = None,
    devices: int = 1,
) -> Completer:
    """Open a model without a run folder, on so many devices."""
    setup = experiment(model, tokenizer)
    skeleton, params = random_params(setup.model, seed)
    arranged = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    shardings = parameter_shardings(skeleton.abstract, skeleton.letters, arranged)
    return Completer(setup, tokenizer, skeleton, arranged, lambda: jax.device_put(params, shardings))


def run_folder(path: Path, model: GPTConfig = MODERN, tokenizer: Tokenizer = CHARACTERS, seed: int = 0) -> Path:
    """Write what `load_meta` and `load_params` need of a checkpoint."""
    setup = experiment(model, tokenizer)
    _, params = random_params(setup.model, seed)
    folder = path.absolute() / "checkpoints" / "1"
    (folder / "meta").mkdir(parents=True)
    meta = {"experiment": setup.to_json(), "tokenizer": tokenizer.to_json(), "labels": []}
    (folder / "meta" / "metadata").write_text(json.dumps(meta), encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", jax.tree.map(jnp.asarray, stack_layers(params)))
    return path
