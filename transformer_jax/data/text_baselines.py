"""What a language model has to beat: counts of tokens and of pairs of them, and a general compressor."""

from __future__ import annotations

import lzma
import math

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.packed import PackedData

MOST = 20_000_000
"""Training tokens that are counted, at most."""

COMPRESSED = 5_000_000
"""Tokens of either split that are compressed, at most: some ten seconds."""


def text_baselines(data: PackedData, most: int = MOST) -> dict[str, dict[str, float]]:
    """Score what needs no training of ours on the test documents.

    Returns:
        "unigram": every token as often as in training, each seen once more; "bigram": as often as after the token
        before it, mixed with the unigram by the number of different followers (Witten and Bell 1991, method C): "nll"
        in nats a token, "perplexity" and "bits_per_byte". "xz -9": "bits_per_byte" by which compressed
        training text grows where test text is appended to it.
    """
    size = data.tokenizer.vocab_size
    tokens = _joined(data, most)
    unigram_V = (np.bincount(tokens, minlength=size) + 1) / (len(tokens) + size)
    pairs, counts = np.unique(tokens[:-1].astype(np.int64) * size + tokens[1:], return_counts=True)
    before = pairs // size
    seen_V = np.bincount(before, weights=counts, minlength=size)
    followers_V = np.bincount(before, minlength=size)

    nll, targets, of_bytes, text = np.zeros(2), 0, 0.0, []
    for batch in data.test_batches():
        real_BT = batch["targets"] >= 0
        target, previous = batch["targets"][real_BT].astype(np.int64), batch["tokens"][real_BT].astype(np.int64)
        place = np.minimum(np.searchsorted(pairs, previous * size + target), len(pairs) - 1)
        count = np.where(pairs[place] == previous * size + target, counts[place], 0)
        one = unigram_V[target]
        weight = np.maximum(followers_V[previous], 1)  # a token that was never followed: the unigram alone
        two = (count + weight * one) / (seen_V[previous] + weight)
        nll += [-np.log(one).sum(), -np.log(two).sum()]
        if targets < COMPRESSED:
            text.append(target)
        targets += len(target)
        of_bytes += float(batch["bytes"].sum())
    scores = {
        name: {
            "nll": total / targets,
            "perplexity": math.exp(total / targets),
            "bits_per_byte": total / math.log(2) / max(of_bytes, 1.0),
        }
        for name, total in zip(("unigram", "bigram"), nll.tolist(), strict=True)
    }
    trained, tested = (
        data.tokenizer.decode(ids, stop=False).encode("utf-8") for ids in (tokens[:COMPRESSED], np.concatenate(text))
    )
    grown = len(lzma.compress(trained + tested, preset=9)) - len(lzma.compress(trained, preset=9))
    return scores | {"xz -9": {"bits_per_byte": 8 * grown / max(len(tested), 1)}}


def _joined(data: PackedData, most: int) -> NDArray[np.int32]:
    """Join the training documents, each between two ends of text, up to `most` tokens."""
    (end,) = data.tokenizer.require_roles(("eos",), "the tokenizer")
    parts, length = [np.asarray([end], np.int32)], 1
    for corpus in data.training:
        for document in range(len(corpus)):
            if length > most:
                break
            parts += [corpus.tokens(document), parts[0]]
            length += len(parts[-2]) + 1
    return np.concatenate(parts)
