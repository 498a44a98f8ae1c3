"""The families, one file each."""

from transformer_jax.models.bert import BertConfig
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.in_context import InContextGPTConfig
from transformer_jax.models.rnn_lm import RNNLMConfig
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.models.transformer import TransformerConfig

LanguageModelConfig = GPTConfig | RNNLMConfig
"""The families that write one token after another, with `features`, `logits`, `start` and `extend`."""

__all__ = [
    "BertConfig",
    "BertSeq2SeqConfig",
    "GPTConfig",
    "InContextGPTConfig",
    "LanguageModelConfig",
    "RNNLMConfig",
    "RNNSeq2SeqConfig",
    "TransformerConfig",
]
