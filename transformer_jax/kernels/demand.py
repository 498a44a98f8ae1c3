"""What a model asks of an attention backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """Everything on which depends who can serve."""

    platform: str
    """Of the devices: "cpu", "gpu", "tpu"."""
    dtype: str
    """Of queries, keys and values."""
    head_size: int
    dropout: float
    """On the attention weights."""
    length: int
    """Positions of the longest row."""
    context: int = 1
    """Devices over which the positions of a row are divided."""
