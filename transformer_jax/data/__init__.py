"""Where examples come from. Data knows no model.

A configuration (`ParallelText`, `PackedText`, `MaskedText`, ...) opens the `OpenData` that training and evaluation see.
"""

from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.linear_functions import LinearFunctions
from transformer_jax.data.loader import Batch, OpenData
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.packed import PackedText
from transformer_jax.data.span import SpanQA
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.translation import ParallelText

__all__ = [
    "Batch",
    "LabelledText",
    "LinearFunctions",
    "MaskedText",
    "OpenData",
    "PackedText",
    "ParallelText",
    "SpanQA",
    "Tokenizer",
]
