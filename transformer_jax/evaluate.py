"""Scoring a trained translator on held-out text, beside floors that need no model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import track

from transformer_jax.config import DecodeConfig, Experiment
from transformer_jax.data.files import is_files, read_files
from transformer_jax.data.holdout import SPLITS
from transformer_jax.data.sources import open_splits
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError
from transformer_jax.logs import console
from transformer_jax.metrics import bleu, copy_source, nearest_neighbour
from transformer_jax.task_metrics import rouge
from transformer_jax.translate import Translation, Translator

Pair = tuple[str, str]


@dataclass(frozen=True)
class Scored:
    """Translations of a test set with their references and scores."""

    translations: list[Translation]
    references: list[str]
    scores: dict[str, Any]
    """"model" and the floors "copy_source" and "nearest_neighbour": BLEU, chrF and ROUGE."""


def score(translator: Translator, train: Sequence[Pair], test: Sequence[Pair], decode: DecodeConfig) -> Scored:
    """Translate the sources of `test`, and score the result and both floors by the same references.

    Raises:
        UserError: the test set is empty.
    """
    if not test:
        raise UserError("the test set is empty.")
    target_language = parallel_text(translator.experiment).target
    sources, references = [source for source, _ in test], [reference for _, reference in test]
    began = time.monotonic()
    # Sorted by length, so that a batch is not padded to its one long sentence.
    order = sorted(range(len(test)), key=lambda i: len(sources[i]))
    outputs = translator.translate((sources[i] for i in order), decode)
    done = list(track(outputs, "translating", total=len(test), console=console, disable=not console.is_terminal))
    seconds = time.monotonic() - began
    translations = [output for _, output in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]

    texts = {
        "model": [t.text for t in translations],
        "copy_source": copy_source(test),
        "nearest_neighbour": nearest_neighbour(train, sources),
    }
    scores = {name: scores_of(each, references, target_language) for name, each in texts.items()}
    scores["model"]["sentences_per_second"] = len(test) / seconds
    return Scored(translations, references, scores)


def scores_of(hypotheses: Sequence[str], references: Sequence[str], language: str) -> dict[str, Any]:
    """BLEU and chrF with their intervals over 300 resamples, and ROUGE, of texts against one reference each."""
    return bleu(hypotheses, references, language, resamples=300) | rouge(hypotheses, references, language)


def parallel_text(experiment: Experiment) -> ParallelText:
    """Return the data of a translation experiment; raises `UserError` for any other kind."""
    if not isinstance(experiment.data, ParallelText):
        raise UserError(f"'{experiment.name}' is trained on {type(experiment.data).__name__}, it does not translate.")
    return experiment.data


def read_test(data: ParallelText, test: str) -> list[Pair]:
    """Read another test set in full: the user's own files, or the test split of a TFDS dataset.

    Raises:
        UserError: the data is absent or malformed.
    """
    if is_files(test):
        return read_files(test, data.source, data.target).pairs
    splits = open_splits(test, data.source, data.target, dict.fromkeys(SPLITS, ""), data.data_dir)
    return splits["test"].read(0, len(splits["test"]))
