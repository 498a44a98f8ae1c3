"""Mixtral: the table of Mistral with experts, and its config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.gpt2 import outputs
from transformer_jax.interop.llama import LLAMA, read_decoder, write_decoder
from transformer_jax.interop.table import row
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.moe import DENSE, ExpertsConfig

_THEIRS, _OURS = "layers.{layer}.block_sparse_moe", "decoder.layers.feedforward"
_EXPERT = _THEIRS + ".experts.{expert}"

_ROWS = (
    *(entry for entry in LLAMA.rows(None) if ".mlp." not in entry.theirs),
    row(f"{_THEIRS}.gate.weight", (f"{_OURS}.router.weight", "E D")),
    row(f"{_EXPERT}.w1.weight", (f"{_OURS}.experts.gate.weight", "F D")),
    row(f"{_EXPERT}.w2.weight", (f"{_OURS}.experts.down.weight", "D F")),
    row(f"{_EXPERT}.w3.weight", (f"{_OURS}.experts.up.weight", "F D")),
)


def _read(fields: Fields, names: frozenset[str]) -> GPTConfig:
    fields.require(router_jitter_noise=0.0, output_router_logits=False)
    count = fields.take("num_local_experts", int, 8)
    chosen = fields.take("num_experts_per_tok", int, 2)
    # Theirs is the mean of the layers, and counts every choice.
    balance = fields.take("router_aux_loss_coef", float, 0.001) * chosen
    config = read_decoder(fields, "mixtral")
    experts = ExpertsConfig(count, chosen, capacity=0.0, balance_loss=balance / config.layers, z_loss=0.0)
    return replace(config, experts=experts)


def _write(config: GPTConfig) -> dict[str, Any]:
    experts = config.experts
    if not experts.normalised or config.qk_norm or config.bias:
        raise UserError(
            "this decoder cannot be written as Mixtral, which divides the weights of the chosen experts by their sum "
            "(model.experts.normalised) and has neither biases nor norms of queries and keys."
        )
    window = config.window(0)
    return {
        **write_decoder(replace(config, experts=DENSE)),
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "router_aux_loss_coef": experts.balance_loss * config.layers / experts.chosen,
        "sliding_window": window or None,
    }


MIXTRAL = replace(
    LLAMA, name="mixtral", model_types=("mixtral",), read=_read, write=_write, rows=lambda _: _ROWS, outputs=outputs
)
