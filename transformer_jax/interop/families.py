"""The families that are exchanged."""

from __future__ import annotations

from transformer_jax.config import ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.interop.bert import BERT
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.gpt2 import GPT2
from transformer_jax.interop.llama import LLAMA
from transformer_jax.interop.mixtral import MIXTRAL
from transformer_jax.interop.table import Family
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.gpt import GPTConfig

FAMILIES = (BERT, GPT2, LLAMA, MIXTRAL)


def reader_of(fields: Fields) -> Family:
    """Return the family that reads this config.json. Raises `UserError` if none does."""
    kind = fields.model_type
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise UserError(f"{fields.where}: model_type='{kind}' is not supported; known are {known}.")


def writer_of(config: ModelConfig) -> Family:
    """Return the family that writes this model. Raises `UserError` if none does."""
    if isinstance(config, BertConfig | GPTConfig) and config.base_width:
        raise UserError("a model with model.base_width scales its logits and queries, which no config.json can say.")
    if isinstance(config, BertConfig) and not isinstance(config, BertSeq2SeqConfig):
        return BERT
    if isinstance(config, GPTConfig):
        if config.experts.count:
            return MIXTRAL
        return LLAMA if config.norm == "rmsnorm" else GPT2
    raise UserError(f"there is no counterpart of {type(config).__name__}; BertConfig and GPTConfig are exported.")
