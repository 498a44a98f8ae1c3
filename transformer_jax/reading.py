"""A trained encoder (or classifier), opened: text in; gaps filled, labels, vectors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.checkpoint import load_labels, load_meta, load_params
from transformer_jax.config import Experiment, MeshConfig
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.labelled_encoded import TextEncoder
from transformer_jax.data.loader import Batch
from transformer_jax.data.span import SpanQA
from transformer_jax.data.span_decode import SpanAnswer, decode_spans
from transformer_jax.data.span_windows import SpanWindows
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.objectives import label_scores
from transformer_jax.sharding import batch_sharding, batch_shards, make_mesh
from transformer_jax.storage import run_path

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Filled:
    """One gap of a text, and the best tokens for it."""

    tokens: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Labelled:
    """What a model says of one text."""

    label: str | float | list[str]
    """A class, a number, or a tag for each word."""
    probabilities: dict[str, float]
    """Of each class; empty for numbers and tags."""


@dataclass(frozen=True)
class Reader:
    """A run's model on the devices at hand."""

    run: Path
    experiment: Experiment
    tokenizer: Tokenizer
    labels: list[str]
    skeleton: Skeleton
    params: Params
    mesh: jax.sharding.Mesh

    @staticmethod
    def open(run: str | Path) -> Reader:
        """Load the newest checkpoint.

        Raises:
            UserError: the folder holds no readable checkpoint, or a model that does not read (a translator).
        """
        run = run_path(run)
        experiment, tokenizer_json = load_meta(run)
        if not isinstance(experiment.model, BertConfig | GPTConfig):
            kind = type(experiment.model).__name__
            raise UserError(f"{run} holds a {kind}, which writes; use `tjax translate` or `tjax generate`.")
        skeleton = Skeleton.of(experiment.model, replace(experiment.compute, attention="xla", remat="none"))
        mesh = make_mesh(MeshConfig())
        params, _ = load_params(run, skeleton, mesh)
        tokenizer = Tokenizer.from_json(tokenizer_json, where=f"the tokenizer of {run}")
        return Reader(run, experiment, tokenizer, load_labels(run), skeleton, params, mesh)

    def fill(self, texts: Sequence[str], best: int = 5) -> list[list[Filled]]:
        """Say what may stand at each [MASK] (or what the tokenizer calls it) of each text, the most probable first.

        Raises:
            UserError: the model was not pre-trained to, a text has no gap or is too long, or `best` is below 1.
        """
        self._require_gaps()
        if not 1 <= best <= self.experiment.model.vocab_size:
            raise UserError(f"best must lie between 1 and the vocabulary, got {best}.")
        (mask,) = self.tokenizer.require_roles(("mask",), f"the tokenizer of {self.run}")
        rows = [self._marked(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if mask not in row:
                raise UserError(f"there is no {self.tokenizer.tokens([mask])[0]} in “{text}”.")
        probabilities_BTV = self._gaps(rows)
        results = []
        for row, probabilities_TV in zip(rows, probabilities_BTV, strict=True):
            gaps = []
            for position in np.flatnonzero(np.asarray(row) == mask):
                order = np.argsort(-probabilities_TV[position], kind="stable")[:best]
                tokens = [self.tokenizer.decode([int(i)], stop=False) for i in order]
                gaps.append(Filled(tokens, [float(probabilities_TV[position, i]) for i in order]))
            results.append(gaps)
        return results

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Iterator[Labelled]:
        """Yield what the model says of each text (or pair of texts), in order: a class, a number, tags of its words.

        Raises:
            UserError: the model was not trained to, or a text is empty.
        """
        encoder, data = self._encoder()
        scored = self._scored(encoder.batches(texts, pairs))
        outputs = {i: self._said(data.kind, logits, label) for i, logits, label in scored}
        yield from (outputs[i] for i in range(len(texts)))

    def predictions(self, batches: Iterable[Batch]) -> list[Any]:
        """Predict the examples of batches of the data itself, in order: class numbers, numbers, or lists of tags."""
        _, data = self._encoder()
        outputs = {
            i: int(logits.argmax()) if data.kind == "classes" else self._said(data.kind, logits, label).label
            for i, logits, label in self._scored(batches)
        }
        return [outputs[i] for i in range(len(outputs))]

    def answer(
        self,
        context: str,
        questions: Sequence[str],
        *,
        max_answer_length: int = 30,
        null_threshold: float | None = None,
    ) -> list[SpanAnswer]:
        """Find the answer to each question in a context, however long: it is cut out by character.

        Args:
            context: the text.
            questions: what is asked of it.
            max_answer_length: in tokens.
            null_threshold: say that there is none ("") where "no answer" outscores the best span by more than this;
                None always answers.

        Raises:
            UserError: the model was not trained to, or the context or a question is empty.
        """
        data = self.experiment.data
        if not isinstance(data, SpanQA):
            raise UserError(f"{self.run} was not trained to answer, but on {type(data).__name__}.")
        encoder = data.encoder(self.tokenizer, f"the tokenizer of {self.run}")
        windows = encoder.windows([(question, context) for question in questions])
        return self.spans(windows, encoder.batches(windows), max_answer_length, null_threshold)

    def spans(
        self,
        windows: SpanWindows,
        batches: Iterable[Batch],
        max_answer_length: int = 30,
        null_threshold: float | None = None,
    ) -> list[SpanAnswer]:
        """Answer the questions of windows, given their batches."""
        found = {i: logits_T2 for i, logits_T2, _ in self._scored(batches)}
        starts, ends = ([found[i][:, side] for i in range(len(windows))] for side in (0, 1))
        return decode_spans(starts, ends, windows, max_answer_length=max_answer_length, null_threshold=null_threshold)

    def embed(self, texts: Sequence[str], pooling: Pooling = "mean", rows: int = 32) -> np.ndarray:
        """Return a vector of length 1 for each text: float32 [N, D].

        The mean over its tokens, [CLS] and [SEP] included (as sentence-transformers do), or the vector of [CLS].
        """
        if not isinstance(self.experiment.model, BertConfig):
            raise UserError(f"{self.run} is no encoder; only a BERT gives vectors.")
        vectors = np.zeros((len(texts), self.experiment.model.width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = self._padded([self._ids(texts[i]) for i in chosen], rows)
            pooled = self._pooled(self.params, self._put(batch), pooling)
            vectors[chosen] = np.asarray(pooled)[: len(chosen)]
        return vectors

    def _scored(self, batches: Iterable[Batch]) -> Iterator[tuple[int, np.ndarray, Any]]:
        """Yield number, logits and label (of a window: None) of every example of the batches."""
        for batch in batches:
            logits = np.asarray(self._label(self.params, self._put(batch)))
            for row, example in enumerate(batch["example"].tolist()):
                if example >= 0:
                    yield example, logits[row], batch["label"][row] if "label" in batch else None

    def _said(self, kind: str, logits: np.ndarray, label: np.ndarray) -> Labelled:
        if kind == "number":
            return Labelled(float(logits[0]), {})
        if kind == "tags":
            return Labelled([self.labels[i] for i in logits[label >= 0].argmax(-1)], {})
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        named = dict(zip(self.labels, shares.tolist(), strict=True))
        return Labelled(self.labels[int(logits.argmax())], named)

    def _encoder(self) -> tuple[TextEncoder, LabelledText]:
        data = self.experiment.data
        if not isinstance(data, LabelledText):
            raise UserError(f"{self.run} was not trained to label texts, but on {type(data).__name__}.")
        return data.encoder(self.tokenizer, f"the tokenizer of {self.run}"), data

    def _require_gaps(self) -> None:
        model = self.experiment.model
        if not isinstance(model, BertConfig) or model.task not in ("pretrain", "mlm"):
            raise UserError(f"{self.run} holds no BERT that fills gaps (model.task=pretrain or mlm).")

    def _ids(self, text: str) -> list[int]:
        return self._wrapped(self.tokenizer.encode_batch([text])[0], text)

    def _marked(self, text: str) -> list[int]:
        return self._wrapped(self.tokenizer.encode_marked(text), text)

    def _wrapped(self, ids: list[int], text: str) -> list[int]:
        cls, sep = self.tokenizer.require_roles(("cls", "sep"), f"the tokenizer of {self.run}")
        context = self._context
        if len(ids) + 2 > context:
            raise UserError(f"“{text[:40]}...” has {len(ids)} tokens; the model reads {context - 2} at once.")
        return [cls, *ids, sep]

    @property
    def _context(self) -> int:
        model = self.experiment.model
        assert isinstance(model, BertConfig | GPTConfig)
        return model.context

    def _padded(self, rows: Sequence[Sequence[int]], least_rows: int) -> Batch:
        shards = batch_shards(self.mesh)
        count = -(-max(len(rows), least_rows) // shards) * shards
        length = min(max(8, 1 << (max(map(len, rows)) - 1).bit_length()), self._context)
        tokens_BT = np.zeros((count, length), np.int32)
        segments_BT = np.zeros((count, length), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
            segments_BT[i, : len(row)] = 1
        return {"tokens": tokens_BT, "types": np.zeros_like(tokens_BT), "segments": segments_BT}

    def _gaps(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        return np.asarray(self._filled(self.params, self._put(self._padded(rows, 1))))[: len(rows)]

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        return jax.device_put({k: v for k, v in batch.items() if k != "example"}, batch_sharding(self.mesh))

    @cached_property
    def _filled(self) -> Any:
        def fill(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            model = self.skeleton.bind(params)
            tokens_BT = batch["tokens"]
            everywhere_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            return jax.nn.softmax(model.fill(model.read(batch), everywhere_BT))

        return jax.jit(fill)

    @cached_property
    def _label(self) -> Any:
        def label(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            model = self.skeleton.bind(params)
            return label_scores(model, model.read(batch), batch)

        return jax.jit(label)

    @cached_property
    def _pooled(self) -> Any:
        def pool(params: Params, batch: dict[str, jax.Array], pooling: Pooling) -> jax.Array:
            x_BTD = self.skeleton.bind(params).read(batch).astype(jnp.float32)
            real_BT1 = (batch["segments"] != 0)[..., None]
            mean_BD = (x_BTD * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1)
            chosen_BD = mean_BD if pooling == "mean" else x_BTD[:, 0]
            return chosen_BD / jnp.maximum(jnp.linalg.norm(chosen_BD, axis=-1, keepdims=True), 1e-12)

        return jax.jit(pool, static_argnums=2)
