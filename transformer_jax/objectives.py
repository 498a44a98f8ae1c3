"""What is minimised: functions of (model, batch, key) that return sums, never means.

Sums add up over micro-batches, devices and hosts without weighting mistakes; the step divides once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.config import ObjectiveConfig
from transformer_jax.errors import UserError

BOS = 1

Sums = dict[str, jax.Array]
"""Float32 scalars: "loss" is differentiated, "weight" is what all others are divided by, "nll" is the loss without
regularisation, by which checkpoints are ranked; the rest are metrics."""


def smoothed_cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy in nats against (1 - s) on the label and s spread evenly over the vocabulary: [B, T].

    Label smoothing: Szegedy 2016, section 7; Vaswani 2017, section 5.4.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    label_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    return norm_BT - (1 - smoothing) * label_BT - smoothing * logits_BTV.mean(-1)


@dataclass(frozen=True)
class Seq2Seq(ObjectiveConfig):
    """Predict each target token from the source and the target tokens before it."""

    smoothing: float = 0.1
    """Label smoothing; the reported "nll" is without it."""

    def check(self) -> None:
        """Smoothing is a share."""
        if not 0 <= self.smoothing < 1:
            raise UserError(f"objective.smoothing must lie in [0, 1), got {self.smoothing}.")

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Sums:
        """Sum over the real target tokens; the batch holds "source" [B, S] and "target" [B, T], padded with 0."""
        target_BT = batch["target"]
        shifted_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)
        logits_BTV = model(batch["source"], shifted_BT, key=key)
        weight_BT = (target_BT != 0).astype(jnp.float32)
        return {
            "loss": (smoothed_cross_entropy(logits_BTV, target_BT, self.smoothing) * weight_BT).sum(),
            "nll": (smoothed_cross_entropy(logits_BTV, target_BT, 0.0) * weight_BT).sum(),
            "accuracy": ((logits_BTV.argmax(-1) == target_BT) * weight_BT).sum(),
            "weight": weight_BT.sum(),
        }
