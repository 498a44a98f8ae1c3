"""How fast an experiment runs, beside what the device can do. A wrong figure is an error, not a result.

`train` is the step; `decode`, `data`, `checkpoint` and `depth` are what stands beside it. What each figure means is
said in `docs/bench.md`.
"""

from __future__ import annotations

from transformer_jax.bench.batches import random_pairs

__all__ = ["random_pairs"]
