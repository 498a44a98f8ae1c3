"""What a conversion is worth: how far the outputs of both sides lie apart on stated inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.tokenizer import Tokenizer

Batch = dict[str, NDArray[np.int32]]
Outputs = Mapping[str, NDArray[Any]]

TOLERANCE = 3e-5
"""Largest difference, as a share of the largest value of the reference: float32 against float64, through all layers."""
KL_TOLERANCE = 1e-6
"""Largest KL divergence of one prediction, in nats."""

LENGTHS = (37, 19, 6, 1)
"""Tokens of the random rows; the first fills the batch, the others leave padding."""
SEED = 0

SENTENCES = (
    ("All human beings are born free and equal.", "They are endowed with reason and conscience."),
    ("모든 인간은 자유롭다.", "x = [i ** 2 for i in range(10)]  # 😀"),
)
"""From article 1 of the Universal Declaration of Human Rights, and a line of code; cut where a row is full."""


@dataclass(frozen=True)
class Inputs:
    """What both sides compute."""

    batch: Batch
    described: dict[str, Any]
    """What the rows are, for the certificate."""


def inputs(vocabulary: int, context: int, types: int, tokenizer: Tokenizer | None) -> Inputs:
    """Draw rows of random tokens, and add a few sentences where there is a tokenizer.

    What stands in the padding of the random rows is random too, since it must not matter.
    """
    lengths_B = np.minimum(LENGTHS, context)
    width = int(lengths_B.max())
    tokens_BT = np.random.default_rng(SEED).integers(0, vocabulary, (len(lengths_B), width))
    types_BT = (np.arange(width) >= lengths_B[:, None] // 2) * (types - 1)
    described: dict[str, Any] = {"random_tokens": {"seed": SEED, "tokens_by_row": lengths_B.tolist()}}
    if tokenizer is not None:
        rows = [_tokenized(tokenizer, pair, types, width) for pair in SENTENCES]
        added_B = np.asarray([len(tokens) for tokens, _ in rows])
        padded = [[np.pad(x, (0, width - len(x))) for x in row] for row in rows]
        tokens_BT = np.concatenate([tokens_BT, [tokens for tokens, _ in padded]])
        types_BT = np.concatenate([types_BT, [kinds for _, kinds in padded]])
        lengths_B = np.concatenate([lengths_B, added_B])
        described["sentences"] = {"texts": SENTENCES, "tokens_by_row": added_B.tolist()}
    segments_BT = np.arange(width) < lengths_B[:, None]
    arrays = {"tokens": tokens_BT, "types": types_BT * segments_BT, "segments": segments_BT}
    return Inputs({name: x.astype(np.int32) for name, x in arrays.items()}, described)


def _tokenized(tokenizer: Tokenizer, pair: tuple[str, str], types: int, width: int) -> tuple[list[int], list[int]]:
    """Return tokens and types of two sentences: between [CLS] and [SEP], or one after the other."""
    first, second = tokenizer.encode_batch(pair)
    if tokenizer.cls is not None and tokenizer.sep is not None and types > 1:
        first, second = [tokenizer.cls, *first, tokenizer.sep], [*second, tokenizer.sep]
    return (first + second)[:width], ([0] * len(first) + [types - 1] * len(second))[:width]


def compare(ours: Outputs, theirs: Outputs, batch: Batch) -> dict[str, dict[str, float | None]]:
    """Measure each output at the real tokens: largest "difference", largest "value", and largest "kl" in nats."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"outputs {sorted(ours)} on our side, {sorted(theirs)} on theirs")
    real_BT = batch["segments"] != 0
    measured = {}
    for name, reference in theirs.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(reference, np.float64)
        by_token = b.ndim == 3
        x, y = (a[real_BT], b[real_BT]) if by_token else (a, b)
        kl = None
        if name == "span":  # a distribution over the tokens of a row, for the start and for the end
            kl = _kl(*(np.where(real_BT[..., None], z, -1e30).swapaxes(1, 2) for z in (b, a)))
        elif name not in ("hidden", "pooled") and b.shape[-1] > 1:
            kl = _kl(y, x)
        measured[name] = {"difference": float(np.abs(x - y).max()), "value": float(np.abs(y).max()), "kl": kl}
    return measured


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) of the worst row of logits."""
    from scipy.special import log_softmax  # noqa: PLC0415 - takes a quarter of a second

    log_p, log_q = log_softmax(p, axis=-1), log_softmax(q, axis=-1)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).max())


def failures(measured: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Say which outputs are too far apart; a NaN is."""
    wrong = []
    for name, m in measured.items():
        difference, value, kl = m["difference"] or 0.0, m["value"] or 0.0, m["kl"] or 0.0
        if not (difference <= TOLERANCE * value and kl <= KL_TOLERANCE):
            wrong.append(f"{name} differs by {difference:.2g} (largest value {value:.2g}, KL {kl:.2g} nats)")
    return wrong
