"""Exchange with Hugging Face: `convert` imports their folders as runs of ours and exports runs of ours as theirs."""

from transformer_jax.interop.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
