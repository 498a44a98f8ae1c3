"""The families, one file each."""

from transformer_jax.models.transformer import TransformerConfig

__all__ = ["TransformerConfig"]
