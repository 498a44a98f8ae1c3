"""What is minimised: functions of (model, batch, key) that return sums, never means.

Sums add up over micro-batches, devices and hosts without weighting mistakes. What they are divided by depends on the
batch alone, so it is known before the gradient is taken; that way a loss may be a sum of several means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from transformer_jax.config import ObjectiveConfig
from transformer_jax.errors import UserError
from transformer_jax.nn.moe import Routes
from transformer_jax.sharding import CONTEXT, mesh_at_hand

Batch = dict[str, jax.Array]

Sums = dict[str, dict[str, jax.Array]]
"""Float32 sums by name, under the name of the weight they are divided by.

"loss" is differentiated, "nll" is the loss without regularisation, by which checkpoints are ranked; the rest are
metrics. A name under several weights stands for the sum of its means.
"""

Weights = dict[str, jax.Array]
"""What sums are divided by; "tokens" is always among them, for throughput."""


def means(sums: Sums, weights: Weights) -> dict[str, jax.Array]:
    """Divide every sum by its weight, and add up what has one name; nothing divided by nothing is 0."""
    total: dict[str, jax.Array] = {}
    for weight, values in sums.items():
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value / jnp.maximum(weights[weight], 1.0)
    return total


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy in nats against (1 - s) on the label and s spread evenly: [..., V] and [...] -> float32 [...].

    Label smoothing: Szegedy 2016, section 7; Vaswani 2017, section 5.4.
    """
    logits = logits.astype(jnp.float32)
    picked = _picked(logits, labels)
    even = smoothing * logits.mean(-1) if smoothing else 0.0
    return jax.nn.logsumexp(logits, axis=-1) - (1 - smoothing) * picked - even


@jax.custom_vjp
def _picked(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the label's logit: [..., V] and [...] -> [...].

    The derivative of a gather is a scatter into zeros, a second array of all logits. A comparison that compilers fuse
    with what else the gradient of the logits is made of takes none.
    """
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def _picked_forward(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    return _picked(logits, labels), (labels, jnp.arange(logits.shape[-1], dtype=labels.dtype))


def _picked_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, None]:
    labels, tokens_V = kept
    return jnp.where(labels[..., None] == tokens_V, g[..., None], 0), None


_picked.defvjp(_picked_forward, _picked_backward)


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether no token scores better than the label: [..., V] and [...] -> booleans; cheaper than to find the best."""
    return _picked(logits, labels) >= logits.max(-1)


def _scored(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Sum cross-entropy and hits of a classifier over the entries whose label is not negative."""
    real = (labels >= 0).astype(jnp.float32)
    labels = jnp.maximum(labels, 0)
    return {"nll": (cross_entropy(logits, labels) * real).sum(), "accuracy": (_hits(logits, labels) * real).sum()}


def _count(mask: jax.Array) -> jax.Array:
    return mask.astype(jnp.float32).sum()


def _read(model: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Read the rows: [B, T, D], and the sums of routing that a model with experts tells of it."""
    return model.routed(batch, key=key) if isinstance(model, Routes) else (model.read(batch, key=key), {})


@dataclass(frozen=True)
class Seq2Seq(ObjectiveConfig):
    """Predict each target token from the source and the target tokens before it.

    The batch holds "source" [B, S] and "target" [B, T + 1], which begins with the start of the sentence; 0 is padding.
    """

    smoothing: float = 0.1
    """Label smoothing; the reported "nll" is without it."""

    def check(self) -> None:
        """Smoothing is a share."""
        if not 0 <= self.smoothing < 1:
            raise UserError(f"objective.smoothing must lie in [0, 1), got {self.smoothing}.")

    def weights(self, batch: Batch) -> Weights:
        """Count the real target tokens."""
        return {"tokens": _count(batch["target"][:, 1:] != 0)}

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum over the real target tokens."""
        labels_BT = batch["target"][:, 1:]
        logits_BTV = model(batch["source"], batch["target"][:, :-1], key=key)
        real_BT = (labels_BT != 0).astype(jnp.float32)
        return {
            "tokens": {
                "loss": (cross_entropy(logits_BTV, labels_BT, self.smoothing) * real_BT).sum(),
                "nll": (cross_entropy(logits_BTV, labels_BT) * real_BT).sum(),
                "accuracy": (_hits(logits_BTV, labels_BT) * real_BT).sum(),
            }
        }


@dataclass(frozen=True)
class CausalLM(ObjectiveConfig):
    """Predict each token from those before it in its document.

    The batch holds "tokens", "targets" (-1: none), "segments" (0: padding), "positions", each [B, T], and "bytes" [B],
    the UTF-8 bytes that the targets of a row stand for.
    """

    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits small (Chowdhery 2022, 5)."""
    chunk: int = 0
    """Positions of a row whose logits are held at a time, and computed again for the gradient; 0: all, held."""

    def check(self) -> None:
        """Neither number is negative."""
        if self.z_loss < 0 or self.chunk < 0:
            raise UserError(f"objective.z_loss and .chunk must not be negative, got {self.z_loss} and {self.chunk}.")

    def weights(self, batch: Batch) -> Weights:
        """Count the targets, and the real positions."""
        return {"tokens": _count(batch["targets"] >= 0), "positions": _count(batch["segments"] != 0)}

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum over the targets; "bytes" is the text they stand for."""
        x_BTD, routing = _read(model, batch, key)
        sums = {"tokens": self.score(model, x_BTD, batch["targets"]) | {"bytes": batch["bytes"].sum()}}
        return sums | ({"positions": routing} if routing else {})

    def score(self, model: Any, x_BTD: jax.Array, targets_BT: jax.Array) -> dict[str, jax.Array]:
        """Sum loss, nll and hits over targets that are not negative."""

        def sums(x_BTD: jax.Array, targets_BT: jax.Array) -> dict[str, jax.Array]:
            logits_BTV = model.logits(x_BTD)
            scores = _scored(logits_BTV, targets_BT)
            loss = scores["nll"]
            if self.z_loss:
                z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
                loss += self.z_loss * (jnp.square(z_BT) * (targets_BT >= 0)).sum()
            return scores | {"loss": loss}

        length = targets_BT.shape[1]
        if not self.chunk or self.chunk >= length:
            return sums(x_BTD, targets_BT)
        pieces = -(-length // self.chunk)
        spare = pieces * self.chunk - length
        context = mesh_at_hand().shape.get(CONTEXT, 1)
        if context > 1 and (self.chunk % context or spare):
            raise UserError(
                f"objective.chunk={self.chunk} must be a multiple of mesh.context={context} and divide the {length} "
                "positions of a row."
            )
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, spare), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, spare)), constant_values=-1)
        # Position t goes to piece t mod pieces: where positions are divided, every device keeps those it holds.
        cut = [jnp.moveaxis(x.reshape(len(x), self.chunk, pieces, *x.shape[2:]), 2, 0) for x in (x_BTD, targets_BT)]

        def add(total: dict[str, jax.Array], piece: Any) -> tuple[dict[str, jax.Array], None]:
            return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*piece)), None

        zeros = dict.fromkeys(("accuracy", "loss", "nll"), jnp.zeros(()))
        return jax.lax.scan(add, zeros, tuple(cut))[0]

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Add perplexity, and bits per byte in place of bytes per token."""
        values = dict(values)
        size = values.pop("bytes")
        values["perplexity"] = math.exp(min(values["nll"], 700.0))
        if size:
            values["bits_per_byte"] = values["nll"] / (size * math.log(2))
        return values


@dataclass(frozen=True)
class MaskedLM(ObjectiveConfig):
    """Fill the gaps, and tell whether the second sentence follows the first: the sum of two means (Devlin 2018, A.2).

    The batch holds "tokens", "types", "segments" [B, T], "positions_masked" and "targets" [B, M] (-1: none), and
    "next" [B] (1: it follows, 0: it does not, -1: no pair).
    """

    next_sentence: bool = True
    """Train on the second task too."""

    def weights(self, batch: Batch) -> Weights:
        """Count the gaps, the pairs, and the real tokens."""
        return {
            "masked": _count(batch["targets"] >= 0),
            "pairs": _count(batch["next"] >= 0),
            "tokens": _count(batch["segments"] != 0),
        }

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum over gaps and over pairs."""
        x_BTD = model.read(batch, key=key)
        gaps = _scored(model.fill(x_BTD, batch["positions_masked"]), batch["targets"])
        sums = {
            "masked": {
                "loss": gaps["nll"],
                "nll": gaps["nll"],
                "mlm_nll": gaps["nll"],
                "mlm_accuracy": gaps["accuracy"],
            }
        }
        if self.next_sentence:
            pairs = _scored(model.follows(x_BTD), batch["next"])
            sums["pairs"] = {
                "loss": pairs["nll"],
                "nll": pairs["nll"],
                "nsp_nll": pairs["nll"],
                "nsp_accuracy": pairs["accuracy"],
            }
        return sums


@dataclass(frozen=True)
class Classification(ObjectiveConfig):
    """Tell the label of a row ("label" int [B]), of each token ([B, T]), or a number (float [B]).

    The batch also holds "tokens", "types", "segments" [B, T]; a negative class is none, a row of padding has no number.
    """

    kind: Literal["classes", "number", "tags"] = "classes"
    lm_weight: float = 0.0
    """Weight of the loss of predicting "targets" [B, T], the row's own next tokens (Radford 2018, section 3.2)."""

    def check(self) -> None:
        """The weight is not negative."""
        if self.lm_weight < 0:
            raise UserError(f"objective.lm_weight must not be negative, got {self.lm_weight}.")

    def weights(self, batch: Batch) -> Weights:
        """Count the labels, and the real tokens."""
        if self.kind == "number":
            labels = _count((batch["segments"] != 0).any(-1))
        else:
            labels = _count(batch["label"] >= 0)
        weights = {"labels": labels, "tokens": _count(batch["segments"] != 0)}
        return weights | ({"targets": _count(batch["targets"] >= 0)} if self.lm_weight else {})

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum over labels: cross-entropy and hits, or the squared error."""
        read_key, label_key = (None, None) if key is None else jax.random.split(key)
        x_BTD, routing = _read(model, batch, read_key)
        logits = label_scores(model, x_BTD, batch, label_key)
        if self.kind == "number":
            real_B = (batch["segments"] != 0).any(-1).astype(jnp.float32)
            error = (jnp.square(logits[..., 0] - batch["label"]) * real_B).sum()
            sums = {"labels": {"loss": error, "nll": error}}
        else:
            scores = _scored(logits, batch["label"])
            sums = {"labels": scores | {"loss": scores["nll"]}}
        if self.lm_weight:
            nll = CausalLM().score(model, x_BTD, batch["targets"])["nll"]
            sums["targets"] = {"loss": self.lm_weight * nll, "lm_nll": nll}
        return sums | ({"tokens": routing} if routing else {})


def label_scores(model: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Score the labels of rows that have been read: float32 [B, Z], or [B, T, Z] of tags.

    If the texts of a row come in the other order too ("swapped"), that is read as well and the scores are added up
    (Radford 2018, section 3.3).
    """
    scores: jax.Array = model.label(x_BTD, batch["segments"], key=key)
    if "swapped" in batch:
        read_key, label_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 1))
        other_BTD = model.read({**batch, "tokens": batch["swapped"]}, key=read_key)
        scores += model.label(other_BTD, batch["segments"], key=label_key)
    return scores


@dataclass(frozen=True)
class SpanExtraction(ObjectiveConfig):
    """Tell where the answer starts and where it ends: "start" and "end" [B] (-1: row of padding) (Devlin 2018, 4.2).

    The batch also holds "tokens", "types", "segments" [B, T].
    """

    def weights(self, batch: Batch) -> Weights:
        """Count the questions, and the real tokens."""
        return {"questions": _count(batch["start"] >= 0), "tokens": _count(batch["segments"] != 0)}

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum the mean of both cross-entropies, and the questions whose start and end are both found."""
        read_key, head_key = (None, None) if key is None else jax.random.split(key)
        logits_BTZ = model.label(model.read(batch, key=read_key), batch["segments"], key=head_key)
        logits_BTZ = jnp.where(batch["segments"][..., None] != 0, logits_BTZ, -1e30)
        sides = [_scored(logits_BTZ[..., i], batch[name]) for i, name in enumerate(("start", "end"))]
        nll = (sides[0]["nll"] + sides[1]["nll"]) / 2
        hits = (logits_BTZ.argmax(1) == jnp.stack([batch["start"], batch["end"]], axis=-1)).all(-1)
        return {"questions": {"loss": nll, "nll": nll, "accuracy": hits.astype(jnp.float32).sum()}}


@dataclass(frozen=True)
class InContextRegression(ObjectiveConfig):
    """Predict each value of a function from its input and the examples before it (Garg 2022, equation 2).

    The batch holds "inputs" [B, P, Z], "values" [B, P] and "segments" [B, P] (0: padding). "nll" is the squared error;
    "error_after_k" is that after k examples, divided by the error of answering 0.
    """

    def weights(self, batch: Batch) -> Weights:
        """Count values and the positions they take, and sum the squared values after k examples, for each k."""
        real_BP = (batch["segments"] != 0).astype(jnp.float32)
        power_P = (jnp.square(batch["values"]) * real_BP).sum(0)
        weights = {"values": real_BP.sum(), "tokens": 2 * real_BP.sum()}
        return weights | {f"power_{k}": power for k, power in _by_number(power_P)}

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        """Sum squared errors over values."""
        real_BP = (batch["segments"] != 0).astype(jnp.float32)
        predicted_BP = model.predict(batch["inputs"], batch["values"], batch["segments"], key=key)
        error_P = (jnp.square(predicted_BP - batch["values"]) * real_BP).sum(0)
        sums: Sums = {"values": {"loss": error_P.sum(), "nll": error_P.sum()}}
        return sums | {f"power_{k}": {f"error_after_{k}": error} for k, error in _by_number(error_P)}


def _by_number(x_P: jax.Array) -> list[tuple[str, jax.Array]]:
    """Pair the elements with their numbers, written so that names with them sort: 00, 01, ... 40."""
    return [(str(k).zfill(len(str(len(x_P) - 1))), x_P[k]) for k in range(len(x_P))]
