"""Scoring any run on its held-out test split: the means of its objective, and what its task is scored by.

Translators have a module of their own (`evaluate.py`), since they are scored by what they write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.by_position import by_position, next_tokens
from transformer_jax.checkpoint import load_meta, load_params
from transformer_jax.config import DataConfig, Experiment, MeshConfig, flatten
from transformer_jax.data.baselines import baselines
from transformer_jax.data.function_baselines import function_baselines
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.labelled_data import LabelledData
from transformer_jax.data.linear_functions import FunctionData
from transformer_jax.data.loader import OpenData
from transformer_jax.data.masked import MaskedData
from transformer_jax.data.packed import PackedData
from transformer_jax.data.span_data import SpanData
from transformer_jax.data.text_baselines import text_baselines
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.objectives import means
from transformer_jax.provenance import provenance
from transformer_jax.reading import Reader
from transformer_jax.task_metrics import metrics_for, score, squad, tagging
from transformer_jax.train import Trainer

RESAMPLES = 1000


def held_out(run: Path, test: str = "", *, positions: bool = False) -> dict[str, Any]:
    """Score a run on its test split, or on another test set that its data can read.

    Args:
        run: the run folder.
        test: another test set.
        positions: also score next tokens by their position.

    Returns:
        "scores": by name, "value" and "interval" (95 %, bootstrap over batches or examples); "floors": what needs no
        training of ours, by name; "by_position", if asked for; and facts about the run, as JSON.

    Raises:
        UserError: no readable checkpoint, absent or malformed data, or positions of a run that predicts no next token.
    """
    experiment, tokenizer_json = load_meta(run)
    if positions:
        next_tokens(experiment)
    config = _with_test(experiment, test)
    data = config.open(experiment.model.vocab_size, tokenizer_json)
    say(data.describe())
    # What it was trained with and started from may not be here: kernels, devices, another run.
    here = replace(experiment.compute, attention="auto")
    trainer = Trainer.of(replace(experiment, mesh=MeshConfig(), compute=here, init=replace(experiment.init, run="")))
    params, steps = load_params(run, trainer.skeleton, trainer.mesh)
    eval_step = trainer.eval_step()
    parts = [eval_step(params, trainer.put(batch)) for batch in data.test_batches()]
    scores = _objective_scores(trainer, jax.device_get(parts))
    placed = {"by_position": by_position(trainer, params, data.test_batches()).to_json()} if positions else {}
    floors: dict[str, dict[str, Any]] = {}
    if isinstance(config, LabelledText) and isinstance(data, LabelledData):
        metrics = _label_metrics(config, data)
        scores |= _named(metrics(Reader.open(run).predictions(data.test_batches())))
        floors = _label_floors(config, data, metrics)
    elif isinstance(data, SpanData):
        scores |= _named(_span_scores(run, data))
    elif isinstance(data, MaskedData):
        accuracy = {"next": "nsp_accuracy"}  # the others fill gaps
        floors = {name: _named({accuracy.get(name, "mlm_accuracy"): v}) for name, v in baselines(data).items()}
    elif isinstance(data, PackedData):
        floors = {name: _named(values) for name, values in text_baselines(data).items()}
    elif isinstance(data, FunctionData):
        floors = {name: _named(values) for name, values in function_baselines(data).items()}
    return {
        "run": str(run),
        "experiment": experiment.name,
        "checkpoints": steps,
        "test": test or f"{dict(flatten(config)).get('dataset', type(config).__name__)} (test)",
        "scores": scores,
        "floors": floors,
        **placed,
        "data": data.summary(),
        "provenance": provenance(),
    }


def _with_test(experiment: Experiment, test: str) -> DataConfig:
    if not test:
        return experiment.data
    if "test" not in dict(flatten(experiment.data)):
        raise UserError(f"{type(experiment.data).__name__} has no test split of its own to replace.")
    return replace(experiment.data, test=test)  # type: ignore[call-arg]


def _objective_scores(trainer: Trainer, parts: list[Any]) -> dict[str, dict[str, Any]]:
    """Means of the objective over all batches, with intervals from resampled batches."""
    if not parts:
        raise UserError("the test split is empty.")
    sums, weights = jax.tree.map(lambda *xs: np.asarray(xs, np.float64), *parts)

    def over(chosen: np.ndarray) -> dict[str, float]:
        total = jax.tree.map(lambda xs: xs[chosen].sum(), (sums, weights))
        values = {name: float(value) for name, value in means(*total).items() if name != "loss"}
        return trainer.experiment.objective.derived(values)

    n = len(parts)
    values = over(np.arange(n))
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES if n > 1 else 0, n))
    resampled = [over(draw) for draw in draws]
    return {
        name: {
            "value": value,
            "interval": np.percentile([r[name] for r in resampled], (2.5, 97.5)).tolist() if resampled else None,
        }
        for name, value in values.items()
    }


def _label_metrics(config: LabelledText, data: LabelledData) -> Callable[[list[Any]], dict[str, Any]]:
    references = data.references("test")
    if config.kind == "tags":
        return lambda predicted: tagging(predicted, references, resamples=RESAMPLES)  # type: ignore[arg-type]
    names = metrics_for(config.dataset, config.kind, len(data.labels))
    return lambda predicted: score(names, predicted, references, resamples=RESAMPLES)


def _label_floors(
    config: LabelledText, data: OpenData, metrics: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What the most frequent class, and logistic regression on TF-IDF of words and pairs of words, would score."""
    if config.kind != "classes" or not isinstance(data, LabelledData):
        return {}
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415 - takes most of a second
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415

    texts = {split: [f"{e.text} {e.pair}" for e in data.examples(split)] for split in ("train", "test")}
    labels = np.asarray(data.references("train"))
    common = int(np.bincount(labels).argmax())
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(texts["train"], labels)
    return {
        "most frequent class": _named(metrics([common] * len(texts["test"]))),
        "TF-IDF, logistic regression": _named(metrics(model.predict(texts["test"]).tolist())),
    }


def _span_scores(run: Path, data: SpanData) -> dict[str, Any]:
    """Exact match and F1; where some questions have no answer, at the threshold that is best on validation."""
    reader, references = Reader.open(run), data.references("test")
    threshold = None
    if not all(references.values()):
        answers = reader.spans(data.windows("validation"), data.validation_batches())
        null = {answer.id: answer.null_difference for answer in answers}
        texts = {answer.id: answer.text for answer in answers}
        threshold = squad(texts, data.references("validation"), null)["best_f1_thresh"]
    answers = reader.spans(data.windows("test"), data.test_batches(), null_threshold=threshold)
    return squad({answer.id: answer.text for answer in answers}, references, resamples=RESAMPLES)


def _named(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Put every score beside its interval."""
    return {
        name: {"value": value, "interval": scores.get(f"{name}_interval")}
        for name, value in scores.items()
        if not name.endswith(("_interval", "total")) and name != "examples"
    }
