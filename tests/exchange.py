"""Hugging Face folders of `fixtures/exchange_reference.npz`, made again from names and shapes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.fixtures.random_weights import tensors
from transformer_jax.config import ComputeConfig
from transformer_jax.interop.families import reader_of
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.importing import plan_of, read_params
from transformer_jax.interop.tensors import Tensors
from transformer_jax.nn.module import Skeleton
from transformer_jax.nn.stack import unstack_layers

CASES = (
    *("bert_tiny", "bert_mini", "bert_small", "bert_medium", "bert_base", "bert_large"),
    *("bert_mlm", "bert_classify", "bert_tag", "bert_span", "bert_encode"),
    *("gpt2_124m", "gpt2_355m", "gpt2_774m", "gpt2_1558m", "gpt2_untied"),
    *("llama_grouped", "llama_tied", "llama_biases", "mistral_window", "qwen3"),
)
OUTPUTS = ("mlm", "nsp", "classify", "tag", "span", "hidden", "pooled", "next")


@functools.cache
def _arrays():
    with np.load(Path(__file__).parent / "fixtures" / "exchange_reference.npz") as file:
        return dict(file)


def reference(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The batch of a case, and what transformers computes for it."""
    arrays = {name.removeprefix(f"{case}/"): x for name, x in _arrays().items() if name.startswith(f"{case}/")}
    batch = {name: arrays[name] for name in ("tokens", "types", "segments")}
    return batch, {name: arrays[name] for name in OUTPUTS if name in arrays}


def config_of(case: str) -> dict:
    """The config.json that transformers wrote."""
    return json.loads(str(_arrays()[f"{case}/config"]))


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """The tensors that transformers wrote."""
    return tensors(json.loads(str(_arrays()[f"{case}/shapes"])))


def write(folder: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    """Write a folder as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def folder_of(case: str, folder: Path) -> Path:
    """Write the folder of a case."""
    return write(folder, config_of(case), tensors_of(case))


def imported(case: str, folder: Path, compute: ComputeConfig):
    """The model of a case with the weights of its folder, and its configuration."""
    fields = Fields.load(folder_of(case, folder) / "config.json")
    with Tensors(folder) as opened:
        plan = plan_of(reader_of(fields), fields, opened)
        params = read_params(plan, opened)
    skeleton = Skeleton.of(plan.config, compute)
    return skeleton.bind(unstack_layers(params, skeleton.abstract)), plan.config
