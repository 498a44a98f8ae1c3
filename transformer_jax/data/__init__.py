"""Where examples come from. Data knows no model.

`ParallelText` is the configuration; its `open` gives the `OpenData` that training and evaluation see.
"""

from transformer_jax.data.loader import Batch, OpenData
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.translation import ParallelText

__all__ = ["Batch", "OpenData", "ParallelText", "Tokenizer"]
