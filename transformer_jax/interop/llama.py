"""Llama and its relatives (Mistral, Qwen 3): their table, and their config.json."""

from __future__ import annotations

from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.gpt2 import outputs, refuse
from transformer_jax.interop.table import Family, row
from transformer_jax.models.gpt import GPTConfig

_LAYER, _OURS = "layers.{layer}", "decoder.layers"

_ROWS = (
    row("embed_tokens.weight", ("embedding.table", "V D")),
    row(f"{_LAYER}.input_layernorm.weight", (f"{_OURS}.attention_residual.norm.scale", "D")),
    row(f"{_LAYER}.self_attn.q_proj.weight", (f"{_OURS}.attention.q.weight", "NH D")),
    row(f"{_LAYER}.self_attn.q_proj.bias", (f"{_OURS}.attention.q.bias", "NH")),
    row(f"{_LAYER}.self_attn.k_proj.weight", (f"{_OURS}.attention.k.weight", "KH D")),
    row(f"{_LAYER}.self_attn.k_proj.bias", (f"{_OURS}.attention.k.bias", "KH")),
    row(f"{_LAYER}.self_attn.v_proj.weight", (f"{_OURS}.attention.v.weight", "KH D")),
    row(f"{_LAYER}.self_attn.v_proj.bias", (f"{_OURS}.attention.v.bias", "KH")),
    row(f"{_LAYER}.self_attn.q_norm.weight", (f"{_OURS}.attention.q_norm.scale", "H")),
    row(f"{_LAYER}.self_attn.k_norm.weight", (f"{_OURS}.attention.k_norm.scale", "H")),
    row(f"{_LAYER}.self_attn.o_proj.weight", (f"{_OURS}.attention.out.weight", "D NH")),
    row(f"{_LAYER}.self_attn.o_proj.bias", (f"{_OURS}.attention.out.bias", "D")),
    row(f"{_LAYER}.post_attention_layernorm.weight", (f"{_OURS}.feedforward_residual.norm.scale", "D")),
    row(f"{_LAYER}.mlp.up_proj.weight", (f"{_OURS}.feedforward.up.weight", "F D")),
    row(f"{_LAYER}.mlp.up_proj.bias", (f"{_OURS}.feedforward.up.bias", "F")),
    row(f"{_LAYER}.mlp.gate_proj.weight", (f"{_OURS}.feedforward.gate.weight", "F D")),
    row(f"{_LAYER}.mlp.gate_proj.bias", (f"{_OURS}.feedforward.gate.bias", "F")),
    row(f"{_LAYER}.mlp.down_proj.weight", (f"{_OURS}.feedforward.down.weight", "D F")),
    row(f"{_LAYER}.mlp.down_proj.bias", (f"{_OURS}.feedforward.down.bias", "D")),
    row("norm.weight", ("norm.scale", "D")),
    row("lm_head.weight", ("output.table", "V D")),
)


def read_decoder(fields: Fields, kind: str) -> GPTConfig:
    """Read what the relatives of Llama have in common; "kind" says what an absent field means."""
    layers = fields.take("num_hidden_layers", int)
    fields.require(hidden_act="silu", is_encoder_decoder=False, is_decoder=False, add_cross_attention=False)
    bias = fields.take("attention_bias", bool, False)
    if bias != fields.take("mlp_bias", bool, False):
        raise UserError(f"{fields.where}: attention_bias={bias} without the same mlp_bias is not supported.")
    heads = fields.take("num_attention_heads", int)
    kv_heads = {"llama": heads, "mistral": 8, "mixtral": 8, "qwen3": 32}[kind]
    return GPTConfig(
        vocab_size=fields.take("vocab_size", int),
        context=fields.take("max_position_embeddings", int),
        width=fields.take("hidden_size", int),
        layers=layers,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int, kv_heads),
        head_size=fields.take("head_dim", int, 128 if kind == "qwen3" else fields.values["hidden_size"] // heads),
        feedforward=fields.take("intermediate_size", int),
        activation="silu",
        gated=True,
        norm="rmsnorm",
        norm_eps=fields.take("rms_norm_eps", float, 1e-5 if kind == "mixtral" else 1e-6),
        bias=bias,
        qk_norm=kind == "qwen3",
        positions="rope",
        rope_theta=_rope_theta(fields, 1e6 if kind == "mixtral" else 10_000.0),
        windows=_windows(fields, kind, layers),
        tied=fields.take("tie_word_embeddings", bool, False),
        dropout=fields.take("attention_dropout", float, 0.0),
        init_std=fields.take("initializer_range", float, 0.02),
        scaled_residual=False,
    )


def _rope_theta(fields: Fields, default: float) -> float:
    """Read the base of the angles, as versions 4 and 5 of transformers write it; angles that are scaled are refused."""
    rope = fields.take("rope_parameters", dict, {}) | fields.take("rope_scaling", dict, {})
    theta = rope.pop("rope_theta", None) or fields.take("rope_theta", float, default)
    fields.require(rope_theta=theta, partial_rotary_factor=1.0)
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope} - {"default"}
    if kinds or rope:
        kind = ", ".join(map(str, kinds)) or "default"
        raise UserError(f"{fields.where}: rope of the type '{kind}' {rope or ''} is not supported, only 'default'.")
    return float(theta)


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int, ...]:
    """Read how far back each layer sees; () if all see everything."""
    if kind == "llama":
        return ()
    # Absent means 4096 there, null means none; so does absent in Mixtral.
    absent = 0 if "sliding_window" in fields.values or kind == "mixtral" else 4096
    window = fields.take("sliding_window", int, absent)
    if kind in ("mistral", "mixtral"):
        return (window,) if window else ()
    first = fields.take("max_window_layers", int, 28)
    window = window if fields.take("use_sliding_window", bool, False) else 0
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = fields.take("layer_types", list, default)
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{fields.where}: layer_types={kinds} is not supported for {layers} layers.")
    windows = tuple(window if name == "sliding_attention" else 0 for name in kinds)
    return windows if any(windows) else ()


def write_decoder(config: GPTConfig) -> dict[str, Any]:
    """Return the config.json of a decoder of this dialect; raises `UserError` for what it cannot say."""
    block = config.block
    windows = {config.window(i) for i in range(config.layers)}
    differs = {
        "norm": config.norm != "rmsnorm",
        "pre_norm": not config.pre_norm,
        "positions": config.positions != "rope",
        "gated": not config.gated,
        "activation": config.activation != "silu",
        "windows": len(windows - {0}) > 1 or (len(windows) > 1 and not config.qk_norm),
        "bias": config.bias and (config.qk_norm or windows != {0}),
    }
    refuse("Llama, Mistral or Qwen 3", config, differs)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": block.kv,
        "head_dim": block.size,
        "intermediate_size": block.feedforward,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
    }
    window = max(windows)
    if config.qk_norm:
        kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(config.layers)]
        sliding = {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": kinds}
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **values, **sliding}
    if window:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **values, "sliding_window": window}
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **values, **biases}


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen3"),
    read=lambda fields, _: read_decoder(fields, fields.model_type),
    write=write_decoder,
    rows=lambda _: _ROWS,
    outputs=outputs,
    prefix="model.",
    unprefixed=("lm_head.",),
    buffers=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
)
