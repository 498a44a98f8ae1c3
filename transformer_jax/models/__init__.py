"""The families, one file each."""

from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.models.transformer import TransformerConfig

__all__ = ["RNNSeq2SeqConfig", "TransformerConfig"]
