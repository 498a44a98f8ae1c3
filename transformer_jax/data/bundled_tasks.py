"""The labelled texts this library ships, as the TFDS dataset `tjax_tasks`: prepared offline, without TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import tensorflow_datasets as tfds

from transformer_jax.data.bundled_dataset import Bundled, read_bundled
from transformer_jax.data.holdout import Split, hold_out


@dataclass
class TaskConfig(tfds.core.BuilderConfig):
    """One bundled file: what an example of it is, and what is held out together."""

    file: str = ""
    """Name under `bundled/`."""
    example: Callable[[str], dict[str, Any]] = json.loads
    """Makes an example of a line."""
    group: str = ""
    """Feature whose equal values, whatever their case, stay in one split."""
    features: Callable[[], dict[str, Any]] = dict
    """The TFDS features of an example."""


def _sentiment(line: str) -> dict[str, Any]:
    label, text = line.split("\t")
    return {"text": text, "label": int(label)}


def _answerable(line: str) -> dict[str, Any]:
    return {"title": "", **json.loads(line)}


def _spans() -> dict[str, Any]:
    text = tfds.features.Text()
    # The features of the TFDS dataset `squad`.
    answers = tfds.features.Sequence({"text": text, "answer_start": np.int32})
    return {"id": text, "title": text, "context": text, "question": text, "answers": answers}


class TjaxTasks(Bundled):
    """Film-review sentiment, questions on word senses, titles of help pages; see `bundled/ATTRIBUTION.md`."""

    BUILDER_CONFIGS: ClassVar = [
        TaskConfig(
            name="sentiment",
            file="sentiment.tsv.xz",
            example=_sentiment,
            group="text",
            features=lambda: {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            },
            description="Quotations of film reviews; Hutto and Gilbert, VADER (ICWSM 2014), MIT.",
        ),
        TaskConfig(
            name="wordnet_qa",
            file="wordnet_qa.jsonl.xz",
            example=_answerable,
            group="question",
            features=_spans,
            description="Questions on WordNet 3.0 glosses, WordNet licence; tests span heads, too easy for a claim.",
        ),
        TaskConfig(
            name="titles",
            file="titles.jsonl.xz",
            group="title",
            features=lambda: {"text": tfds.features.Text(), "title": tfds.features.Text()},
            description="Pages of LibreOffice Help and their titles, MPL-2.0.",
        ),
    ]

    def features(self) -> dict[str, Any]:
        """Return those of the file."""
        return self.builder_config.features()

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        rows = [config.example(line) for line in read_bundled(config.file).split("\n")[:-1]]
        groups = [" ".join(row[config.group].casefold().split()) for row in rows]
        for number, held in enumerate(hold_out(groups, where=config.file)):
            if held == split:
                yield number, rows[number]


NAME: Final = TjaxTasks.name
