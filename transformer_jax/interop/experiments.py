"""The experiment of an imported model: how it reads text is known, what to train it on is for a recipe to say."""

from __future__ import annotations

from transformer_jax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.packed import PackedText
from transformer_jax.data.span import SpanQA
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM, Classification, MaskedLM, SpanExtraction

NO_DATASET = "none (imported)"
"""What data.dataset says of an imported model."""


def experiment_of(name: str, model: ModelConfig, labels: tuple[str, ...]) -> Experiment:
    """Return an experiment around a model, with the objective and the kind of data that its task has."""
    objective, data = _task(model, labels)
    return Experiment(name=name, model=model, objective=objective, data=data, optim=OptimConfig(), train=TrainConfig())


def _task(model: ModelConfig, labels: tuple[str, ...]) -> tuple[ObjectiveConfig, DataConfig]:
    if isinstance(model, GPTConfig):
        return CausalLM(), PackedText(NO_DATASET, context=min(model.context, 1024))
    assert isinstance(model, BertConfig)
    length = min(model.context, 384)
    if model.task == "span":
        return SpanExtraction(), SpanQA(NO_DATASET, max_length=length, max_query_length=min(64, length // 4))
    if model.task == "tag":
        return Classification("tags"), LabelledText(NO_DATASET, kind="tags", labels=labels, max_length=length)
    if model.task == "classify" and model.labels == 1:
        return Classification("number"), LabelledText(NO_DATASET, kind="number", max_length=length)
    if model.task == "classify":
        return Classification(), LabelledText(NO_DATASET, labels=labels, max_length=length)
    pairs = model.task == "pretrain"
    data = MaskedText(NO_DATASET, length=length, max_predictions=min(20, length), next_sentence=pairs)
    return MaskedLM(next_sentence=pairs), data
