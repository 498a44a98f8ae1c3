"""GPT-2: its table, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax

from transformer_jax.errors import UserError
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.table import Family, row
from transformer_jax.models.gpt import GPTConfig

_LAYER, _OURS = "h.{layer}", "decoder.layers"

_ROWS = (
    row("wte.weight", ("embedding.table", "V D")),
    row("wpe.weight", ("positions.table", "T D")),
    row(f"{_LAYER}.ln_1.weight", (f"{_OURS}.attention_residual.norm.scale", "D")),
    row(f"{_LAYER}.ln_1.bias", (f"{_OURS}.attention_residual.norm.bias", "D")),
    # Their Conv1D holds (in, out), and c_attn queries, keys and values side by side.
    row(
        f"{_LAYER}.attn.c_attn.weight",
        (f"{_OURS}.attention.q.weight", "D NH"),
        (f"{_OURS}.attention.k.weight", "D KH"),
        (f"{_OURS}.attention.v.weight", "D KH"),
    ),
    row(
        f"{_LAYER}.attn.c_attn.bias",
        (f"{_OURS}.attention.q.bias", "NH"),
        (f"{_OURS}.attention.k.bias", "KH"),
        (f"{_OURS}.attention.v.bias", "KH"),
    ),
    row(f"{_LAYER}.attn.c_proj.weight", (f"{_OURS}.attention.out.weight", "NH D")),
    row(f"{_LAYER}.attn.c_proj.bias", (f"{_OURS}.attention.out.bias", "D")),
    row(f"{_LAYER}.ln_2.weight", (f"{_OURS}.feedforward_residual.norm.scale", "D")),
    row(f"{_LAYER}.ln_2.bias", (f"{_OURS}.feedforward_residual.norm.bias", "D")),
    row(f"{_LAYER}.mlp.c_fc.weight", (f"{_OURS}.feedforward.up.weight", "D F")),
    row(f"{_LAYER}.mlp.c_fc.bias", (f"{_OURS}.feedforward.up.bias", "F")),
    row(f"{_LAYER}.mlp.c_proj.weight", (f"{_OURS}.feedforward.down.weight", "F D")),
    row(f"{_LAYER}.mlp.c_proj.bias", (f"{_OURS}.feedforward.down.bias", "D")),
    row("ln_f.weight", ("norm.scale", "D")),
    row("ln_f.bias", ("norm.bias", "D")),
    row("lm_head.weight", ("output.table", "V D")),
)

_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu", "silu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def _read(fields: Fields, names: frozenset[str]) -> GPTConfig:
    fields.require(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
        is_decoder=False,
        pruned_heads={},
    )
    width = fields.take("n_embd", int, 768)
    return GPTConfig(
        vocab_size=fields.take("vocab_size", int, 50_257),
        context=fields.take("n_positions", int, 1024),
        width=width,
        layers=fields.take("n_layer", int, 12),
        heads=fields.take("n_head", int, 12),
        feedforward=fields.take("n_inner", int, 4 * width),
        activation=fields.choose("activation_function", _ACTIVATIONS, "gelu_new"),
        norm_eps=fields.take("layer_norm_epsilon", float, 1e-5),
        tied=fields.take("tie_word_embeddings", bool, True),
        dropout=fields.take("resid_pdrop", float, 0.1),
        init_std=fields.take("initializer_range", float, 0.02),
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    block = config.block
    differs = {
        "norm": config.norm != "layernorm",
        "pre_norm": not config.pre_norm,
        "bias": not config.bias,
        "positions": config.positions != "learned",
        "windows": any(config.windows),
        "gated": config.gated,
        "qk_norm": config.qk_norm,
        "kv_heads": block.kv != block.heads,
        "head_size": block.size * block.heads != block.width,
    }
    refuse("GPT-2", config, differs)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": block.feedforward if block.feedforward != 4 * block.width else None,
        "activation_function": activations[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.init_std,
    }


def refuse(name: str, config: GPTConfig, differs: Mapping[str, bool]) -> None:
    """Raise `UserError` for the settings of a decoder that a family of Hugging Face's cannot express."""
    if config.task != "lm":
        raise UserError(f"model.task={config.task} cannot be written as {name}: transformers' head has no bias.")
    if found := [f"model.{field}={getattr(config, field)}" for field, is_so in differs.items() if is_so]:
        raise UserError(f"this decoder cannot be written as {name}: {', '.join(found)}.")


def outputs(model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Score the next token: [B, T, V]."""
    return {"next": model(batch["tokens"], batch["segments"])}


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    read=_read,
    write=_write,
    rows=lambda _: _ROWS,
    outputs=outputs,
    prefix="transformer.",
    unprefixed=("lm_head.",),
    buffers=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    tied=(("lm_head.weight", "wte.weight"),),
)
