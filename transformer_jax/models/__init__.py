"""The families, one file each."""

from transformer_jax.models.bert import BertConfig
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.in_context import InContextGPTConfig
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.models.transformer import TransformerConfig

__all__ = [
    "BertConfig",
    "BertSeq2SeqConfig",
    "GPTConfig",
    "InContextGPTConfig",
    "RNNSeq2SeqConfig",
    "TransformerConfig",
]
