"""What masked language modelling has to beat: guesses that need no model."""

from __future__ import annotations

import numpy as np

from transformer_jax.data.corpus import Corpus
from transformer_jax.data.masked import MaskedData
from transformer_jax.data.masking import NO_TARGET


def baselines(data: MaskedData, most: int = 20_000_000) -> dict[str, float]:
    """Score what needs no model on the masks of the validation rows, for comparison.

    Returns:
        "unigram": accuracy of always the most frequent token of the training text; "bigram": of the token that most
        often follows the true left neighbour (counted on at most `most` tokens; the most frequent one where the
        neighbour never occurred or is special); "next": share of the more frequent answer of next-sentence prediction.

    """
    size = data.tokenizer.vocab_size
    texts = [corpus.gather(np.arange(*bounds)) for corpus in data.training for bounds in _stretches(corpus, most)]
    flat = np.concatenate(texts)
    frequent = int(np.bincount(flat, minlength=size).argmax())
    keys, counts = np.unique(
        np.concatenate([t[:-1].astype(np.int64) * size + t[1:] for t in texts]), return_counts=True
    )
    best_V = np.full(size, frequent)
    ascending = np.argsort(counts, kind="stable")
    best_V[keys[ascending] // size] = keys[ascending] % size  # the last to be written is the most frequent
    best_V[list(data.tokenizer.specials)] = frequent
    hits, total, follows = np.zeros(2), 0, [0, 0]
    for batch in data.validation_batches():
        true_BT = batch["tokens"].copy()
        row, column = np.nonzero(batch["targets"] != NO_TARGET)
        target, position = batch["targets"][row, column], batch["positions_masked"][row, column]
        true_BT[row, position] = target
        hits += [(target == frequent).sum(), (target == best_V[true_BT[row, position - 1]]).sum()]
        total += len(target)
        follows = [n + int((batch["next"] == label).sum()) for label, n in enumerate(follows)]
    unigram, bigram = hits / max(total, 1)
    return {"unigram": float(unigram), "bigram": float(bigram), "next": max(follows) / max(sum(follows), 1)}


def _stretches(corpus: Corpus, most: int) -> list[tuple[int, int]]:
    """Return the addresses of documents, up to `most` tokens of them."""
    enough = int(np.searchsorted(np.cumsum(corpus.length_N), most)) + 1
    return [
        (b, b + n) for b, n in zip(corpus.begin_N[:enough].tolist(), corpus.length_N[:enough].tolist(), strict=True)
    ]
