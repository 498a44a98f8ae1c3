"""What PyTorch shall build to do the same work, and our parameters in its names: equal weights, equal loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import save_file

from transformer_jax.bench.batches import RESERVED, Batch
from transformer_jax.bench.decode import START, Prompted, check_prompted, random_prompts
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.interop.bert import BERT
from transformer_jax.interop.gpt2 import GPT2
from transformer_jax.interop.table import Family, Row, export_row, row, slots, used
from transformer_jax.interop.tensors import require_space
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.nn.stack import stack_layers
from transformer_jax.objectives import MaskedLM, Seq2Seq

What = Literal["train", "decode"]
Variant = Literal["eager", "compile", "compile-cudnn", "dynamic", "static", "static-compile"]

VARIANTS: dict[What, tuple[Variant, ...]] = {
    "train": ("eager", "compile", "compile-cudnn"),
    "decode": ("dynamic", "static", "static-compile"),
}
"""Ways that PyTorch can do the work: of training, the model called as it is, compiled, and compiled with cuDNN's
attention; of writing, with a cache that grows, one of fixed size, and that compiled."""

NEEDED = {"gpt": ("torch", "safetensors"), "bert": ("torch", "transformers", "safetensors")}
NEEDED |= dict.fromkeys(("marian", "generate", "translate"), NEEDED["bert"])
"""What each kind of peer imports."""

GPT2_BLOCK = ("learned", "layernorm", "gelu_tanh", False)
"""Positions, norm, activation and gate of GPT-2."""


_FAMILIES: dict[Any, Family] = {GPTConfig: GPT2, BertConfig: BERT}


def variants_of(what: What, asked: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return the variants to run, by default all that this device can; raises `UserError` for one of other work."""
    if wrong := [variant for variant in asked if variant not in VARIANTS[what]]:
        raise UserError(f"--peers {wrong[0]} does not go with --what {what}: choose among {', '.join(VARIANTS[what])}.")
    gpu = jax.default_backend() == "gpu"
    return tuple(asked) or tuple(variant for variant in VARIANTS[what] if gpu or variant != "compile-cudnn")


def training(experiment: Experiment, batch: Batch) -> dict[str, Any]:
    """Say what PyTorch shall train, on which batch.

    Raises:
        UserError: a model, an objective or an optimizer that the peers do not know.
    """
    model, optim, objective = experiment.model, experiment.optim, experiment.objective
    names: tuple[str, ...]
    kind: dict[str, Any]
    match model:
        case GPTConfig() if _is_gpt2(model):
            names, kind = ("tokens", "targets"), {"kind": "gpt", **_gpt2(model)}
        case BertConfig(task="pretrain", activation="gelu") if isinstance(objective, MaskedLM):
            names = ("tokens", "types", "positions_masked", "targets", "next")
            kind = {"kind": "bert", "context": model.context, "layers": model.layers, "types": model.types}
            kind |= {"norm_eps": model.norm_eps, "next_sentence": objective.next_sentence}
        case TransformerConfig(pre_norm=False) if isinstance(objective, Seq2Seq):
            names, kind = ("source", "target"), {"kind": "marian", **_marian(model), "smoothing": objective.smoothing}
            kind["places"] = max(batch[side].shape[1] for side in names)
        case _:
            raise UserError(
                f"{experiment.name}: there are PyTorch peers of GPT-2, of BERT's pre-training and of the (post-LN) "
                "Transformer only."
            )
    if experiment.optim.kind != "adam":
        raise UserError(f"optim.kind={optim.kind}: the PyTorch peers train with AdamW; add --optim.kind adam.")
    return {
        **kind,
        **_sizes(model),
        "dropout": model.dropout,
        "dtype": experiment.compute.dtype,
        "rate": 1e-4,
        "weight_decay": optim.weight_decay,
        "clip_norm": optim.clip_norm,
        "device": jax.default_backend(),
        "batch": {name: batch[name].tolist() for name in names},
    }


def writing(experiment: Experiment, rows: int, prompted: Prompted) -> dict[str, Any]:
    """Say what transformers' `generate` shall write, after which prompts or sentences.

    Raises:
        UserError: a model that is no GPT-2 and no (post-LN) Transformer, or more tokens than its context.
    """
    model = experiment.model
    check_prompted(experiment, prompted)
    kind: dict[str, Any]
    match model:
        case GPTConfig() if _is_gpt2(model) and model.bias:
            kind, least = {"kind": "generate", **_gpt2(model)}, 0
        case TransformerConfig(pre_norm=False):
            kind, least = {"kind": "translate", **_marian(model), "dropout": 0.0}, RESERVED
            kind |= {"places": max(prompted.prompt, prompted.new + 1), "beams": experiment.decode.beam}
            kind |= {"start": START, "length_penalty": experiment.decode.length_penalty}
        case _:
            raise UserError(
                f"{experiment.name}: --what decode has PyTorch peers of GPT-2 and of the (post-LN) Transformer only."
            )
    return {
        **kind,
        **_sizes(model),
        "dtype": experiment.compute.dtype,
        "device": jax.default_backend(),
        "prompts": random_prompts(model.vocab_size, rows, prompted, least),
        "new": prompted.new,
    }


def write_weights(experiment: Experiment, params: Params, file: Path) -> None:
    """Write parameters as a safetensors file, in the names that the library transformers has for such a model.

    Raises:
        UserError: the disk cannot hold them.
    """
    config: Any = experiment.model
    skeleton = Skeleton.of(config, replace(experiment.compute, layers="scan"))
    rows = MARIAN if isinstance(config, TransformerConfig) else _FAMILIES[type(config)].rows(config)
    require_space(file.parent, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(stack_layers(params))
    }
    holes = slots(skeleton)
    save_file({name: t for one in used(rows, holes) for name, t in export_row(one, holes, arrays.__getitem__)}, file)


def _is_gpt2(model: GPTConfig) -> bool:
    return (
        (model.positions, model.norm, model.activation, model.gated) == GPT2_BLOCK
        and model.pre_norm
        and model.tied
        and model.task == "lm"
        and not (model.qk_norm or model.windows or model.kv_heads or model.head_size or model.base_width)
    )


def _gpt2(model: GPTConfig) -> dict[str, Any]:
    return {"context": model.context, "layers": model.layers, "norm_eps": model.norm_eps, "bias": model.bias}


def _marian(model: TransformerConfig) -> dict[str, Any]:
    layers = {"encoder_layers": model.encoder_layers, "decoder_layers": model.decoder_layers}
    return {**layers, "bias": model.attention_bias}


def _sizes(model: Any) -> dict[str, Any]:
    sizes = {"vocab_size": model.vocab_size, "width": model.width, "heads": model.heads}
    return sizes | {"feedforward": model.block.feedforward}


def _attention(theirs: str, ours: str, residual: str) -> tuple[Row, ...]:
    projections = {"q_proj": ("q", "NH", "D"), "k_proj": ("k", "KH", "D"), "v_proj": ("v", "KH", "D")}
    projections |= {"out_proj": ("out", "D", "NH")}
    return (
        *(
            row(f"{theirs}.{p}.weight", (f"{ours}.{q}.weight", f"{out} {of}"))
            for p, (q, out, of) in projections.items()
        ),
        *(row(f"{theirs}.{p}.bias", (f"{ours}.{q}.bias", out)) for p, (q, out, _) in projections.items()),
        *_norm(f"{theirs}_layer_norm", residual),
    )


def _norm(theirs: str, residual: str) -> tuple[Row, ...]:
    return (
        row(f"{theirs}.weight", (f"{residual}.norm.scale", "D")),
        row(f"{theirs}.bias", (f"{residual}.norm.bias", "D")),
    )


def _side(side: str, sublayers: Mapping[str, tuple[str, str]]) -> tuple[Row, ...]:
    theirs, ours = f"{side}.layers.{{layer}}", f"{side}.layers"
    return (
        *(
            one
            for name, (attention, residual) in sublayers.items()
            for one in _attention(f"{theirs}.{name}", f"{ours}.{attention}", f"{ours}.{residual}")
        ),
        row(f"{theirs}.fc1.weight", (f"{ours}.feedforward.up.weight", "F D")),
        row(f"{theirs}.fc1.bias", (f"{ours}.feedforward.up.bias", "F")),
        row(f"{theirs}.fc2.weight", (f"{ours}.feedforward.down.weight", "D F")),
        row(f"{theirs}.fc2.bias", (f"{ours}.feedforward.down.bias", "D")),
        *_norm(f"{theirs}.final_layer_norm", f"{ours}.feedforward_residual"),
    )


_SELF = {"self_attn": ("attention", "attention_residual")}
MARIAN = (
    row("shared.weight", ("embedding.table", "V D")),
    *_side("encoder", _SELF),
    *_side("decoder", _SELF | {"encoder_attn": ("cross", "cross_residual")}),
)
"""The Transformer in the names of transformers' Marian, whose position vectors are set to ours (their channels are
in another order, which is why this is no way to exchange models)."""
