"""BERT: its table, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from transformer_jax.errors import UserError
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.table import Family, Row, row
from transformer_jax.models.bert import BertConfig

_LAYER, _OURS = "encoder.layer.{layer}", "encoder.layers"

_BODY = (
    row("embeddings.word_embeddings.weight", ("embeddings.tokens.table", "V D")),
    row("embeddings.position_embeddings.weight", ("embeddings.positions.table", "T D")),
    row("embeddings.token_type_embeddings.weight", ("embeddings.types.table", "Z D")),
    row("embeddings.LayerNorm.weight", ("embeddings.norm.scale", "D")),
    row("embeddings.LayerNorm.bias", ("embeddings.norm.bias", "D")),
    row(f"{_LAYER}.attention.self.query.weight", (f"{_OURS}.attention.q.weight", "NH D")),
    row(f"{_LAYER}.attention.self.query.bias", (f"{_OURS}.attention.q.bias", "NH")),
    row(f"{_LAYER}.attention.self.key.weight", (f"{_OURS}.attention.k.weight", "KH D")),
    row(f"{_LAYER}.attention.self.key.bias", (f"{_OURS}.attention.k.bias", "KH")),
    row(f"{_LAYER}.attention.self.value.weight", (f"{_OURS}.attention.v.weight", "KH D")),
    row(f"{_LAYER}.attention.self.value.bias", (f"{_OURS}.attention.v.bias", "KH")),
    row(f"{_LAYER}.attention.output.dense.weight", (f"{_OURS}.attention.out.weight", "D NH")),
    row(f"{_LAYER}.attention.output.dense.bias", (f"{_OURS}.attention.out.bias", "D")),
    row(f"{_LAYER}.attention.output.LayerNorm.weight", (f"{_OURS}.attention_residual.norm.scale", "D")),
    row(f"{_LAYER}.attention.output.LayerNorm.bias", (f"{_OURS}.attention_residual.norm.bias", "D")),
    row(f"{_LAYER}.intermediate.dense.weight", (f"{_OURS}.feedforward.up.weight", "F D")),
    row(f"{_LAYER}.intermediate.dense.bias", (f"{_OURS}.feedforward.up.bias", "F")),
    row(f"{_LAYER}.output.dense.weight", (f"{_OURS}.feedforward.down.weight", "D F")),
    row(f"{_LAYER}.output.dense.bias", (f"{_OURS}.feedforward.down.bias", "D")),
    row(f"{_LAYER}.output.LayerNorm.weight", (f"{_OURS}.feedforward_residual.norm.scale", "D")),
    row(f"{_LAYER}.output.LayerNorm.bias", (f"{_OURS}.feedforward_residual.norm.bias", "D")),
    row("pooler.dense.weight", ("pooler.weight", "F D")),
    row("pooler.dense.bias", ("pooler.bias", "F")),
    row("cls.predictions.transform.dense.weight", ("pretraining.transform.weight", "F D")),
    row("cls.predictions.transform.dense.bias", ("pretraining.transform.bias", "F")),
    row("cls.predictions.transform.LayerNorm.weight", ("pretraining.norm.scale", "D")),
    row("cls.predictions.transform.LayerNorm.bias", ("pretraining.norm.bias", "D")),
    row("cls.predictions.bias", ("pretraining.bias", "V")),
    row("cls.seq_relationship.weight", ("pretraining.following.weight", "Z D")),
    row("cls.seq_relationship.bias", ("pretraining.following.bias", "Z")),
)

_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_ARCHITECTURES = {
    "pretrain": "BertForPreTraining",
    "mlm": "BertForMaskedLM",
    "classify": "BertForSequenceClassification",
    "tag": "BertForTokenClassification",
    "span": "BertForQuestionAnswering",
    "encode": "BertModel",
}


def _rows(config: BertConfig) -> tuple[Row, ...]:
    head = "qa_outputs" if config.task == "span" else "classifier"
    return (*_BODY, row(f"{head}.weight", ("head.weight", "Z D")), row(f"{head}.bias", ("head.bias", "Z")))


def _task(fields: Fields, names: frozenset[str]) -> str:
    """Tell the head from the tensors that are there; only two heads have the same names."""
    if "cls.predictions.bias" in names:
        return "pretrain" if "cls.seq_relationship.weight" in names else "mlm"
    if "qa_outputs.weight" in names:
        return "span"
    if "classifier.weight" not in names:
        return "encode"
    architecture = (fields.take("architectures", list, [""]) or [""])[0]
    for task in ("classify", "tag"):
        if architecture == _ARCHITECTURES[task]:
            return task
    raise UserError(
        f"{fields.where}: there is a classifier, but architectures={architecture!r} is neither "
        f"{_ARCHITECTURES['classify']} nor {_ARCHITECTURES['tag']}."
    )


def _read(fields: Fields, names: frozenset[str]) -> BertConfig:
    fields.require(
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
        tie_word_embeddings=True,
        pruned_heads={},
    )
    task: Any = _task(fields, names)
    labels = len(fields.take("id2label", dict, {})) or fields.take("num_labels", int, 2)
    return BertConfig(
        vocab_size=fields.take("vocab_size", int, 30_522),
        context=fields.take("max_position_embeddings", int, 512),
        width=fields.take("hidden_size", int, 768),
        layers=fields.take("num_hidden_layers", int, 12),
        heads=fields.take("num_attention_heads", int, 12),
        feedforward=fields.take("intermediate_size", int, 3072),
        activation=fields.choose("hidden_act", _ACTIVATIONS, "gelu"),
        norm_eps=fields.take("layer_norm_eps", float, 1e-12),
        types=fields.take("type_vocab_size", int, 2),
        dropout=fields.take("hidden_dropout_prob", float, 0.1),
        init_std=fields.take("initializer_range", float, 0.02),
        task=task,
        labels=labels if task in ("classify", "tag") else 0,
    )


def _write(config: BertConfig) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "model_type": "bert",
        "architectures": [_ARCHITECTURES[config.task]],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.block.feedforward,
        "hidden_act": activations[config.activation],
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        **({"id2label": {str(i): f"LABEL_{i}" for i in range(config.labels)}} if config.labels else {}),
    }


def _outputs(model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return all that the task of the model gives: [B, T, Z] by token, or [B, Z] by row."""
    x_BTD, task = model.read(batch), model.config.task
    outputs = {}
    if task in ("pretrain", "mlm"):
        everywhere_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        outputs["mlm"] = model.fill(x_BTD, everywhere_BT)
    if task == "pretrain":
        outputs["nsp"] = model.follows(x_BTD)
    if task == "encode":
        outputs |= {"hidden": x_BTD, "pooled": model.pooled(x_BTD)}
    if task in ("classify", "tag", "span"):
        outputs[task] = model.label(x_BTD, batch["segments"])
    return outputs


BERT = Family(
    name="bert",
    model_types=("bert",),
    read=_read,
    write=_write,
    rows=_rows,
    outputs=_outputs,
    prefix="bert.",
    bare=lambda config: config.task == "encode",
    unprefixed=("cls.", "classifier.", "qa_outputs."),
    old_names=((".gamma", ".weight"), (".beta", ".bias")),
    # The pooler is left out where the task has none: it is only a parameter where a row names it.
    buffers=(r"embeddings\.(position_ids|token_type_ids)", r"pooler\.dense\.(weight|bias)"),
    tied=(
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)
