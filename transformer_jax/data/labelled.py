"""`LabelledText`: the data of classification, regression and tagging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformer_jax.data.labelled_data import LabelledData, learnt_labels
from transformer_jax.data.labelled_encoded import TextEncoder
from transformer_jax.data.labelled_layout import Layout, LayoutName
from transformer_jax.data.labelled_rows import Columns, Kind
from transformer_jax.data.labelled_tables import Table, examples_of, known, open_tables
from transformer_jax.data.task_config import TaskConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokenizer_choice import choose_tokenizer, kept
from transformer_jax.errors import UserError


@dataclass(frozen=True)
class LabelledText(TaskConfig):
    """Texts, or pairs of texts, each with a class or a number, or with a tag for every word.

    From TFDS (glue/sst2, tjax_tasks/sentiment) or your file: rows.tsv, .csv, .jsonl, .conll, also .gz or .xz.

    A batch is {"tokens", "types" (1 in the second text), "segments" (1 real, 0 padding): int32 [B, T]; "label": int32
    [B] (-1: none), float32 [B], or for tags int32 [B, T] (-1 but at the first token of each word); "example": int64
    [B]}, and for the layout "gpt" also "targets": int32 [B, T], the next token (-1: none), for the auxiliary loss of
    Radford 2018, section 3.2; for "gpt_both" also "swapped": int32 [B, T], the texts in the other order.
    """

    kind: Kind = "classes"
    """What a label is: a class, a number, or a tag for each word."""
    text: str = ""
    """Column of the text: a name, or without a header its number from 1; empty is known (GLUE), "text", or found."""
    text_pair: str = ""
    """Column of the second text; empty is known (GLUE), "text_pair" if there is one, or none."""
    label: str = ""
    """Column of the label; empty is "label", or found: the column with fewer distinct values."""
    group: str = ""
    """Column whose equal values are held out together; empty is "group" if there is one, or else equal texts are."""
    labels: tuple[str, ...] = ()
    """Names of the classes or tags in the order of their numbers; empty is those of TFDS, or of training, sorted."""
    layout: LayoutName = "bert"
    """[CLS] a [SEP] b [SEP] for an encoder, or start a delimiter b extract for a decoder (Radford 2018); gpt_both reads
    two texts in both orders and adds up what they say, for similarity (section 3.3)."""

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        self.check_batches(least_length=8)
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise UserError(f"data.labels must be at least two different names, got {self.labels}.")
        if self.labels and self.kind == "number":
            raise UserError("data.labels names classes, but data.kind = number has none.")
        if self.kind == "tags" and (self.text_pair or self.layout != "bert"):
            raise UserError("data.kind = tags takes one text in the layout bert, no data.text_pair.")
        task = known(self.dataset)
        if task and task.kind != self.kind:
            raise UserError(f"the labels of {self.dataset} are of kind '{task.kind}': set data.kind={task.kind}.")

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> LabelledData:
        """Read, check and tokenize all splits; what was tokenized before comes from the cache.

        Args:
            vocab_size: rows of the model's embedding; a trained tokenizer gets at most as many tokens.
            tokenizer_json: the tokenizer saved with a run, which then is used whatever `self.tokenizer` says.

        Raises `UserError` for absent or malformed data, a label outside the classes, or a tokenizer that does not fit.

        """
        self.check()
        given = Columns(self.text, self.text_pair, self.label, self.group)
        tables = open_tables(self.dataset, given, self.kind, self.parts(), self.data_dir)
        if self.layout == "gpt_both" and not tables.paired:
            raise UserError(f"data.layout=gpt_both reads pairs of texts, {self.dataset} has single ones; set gpt.")
        train = tables.splits["train"]
        labels = self.labels or tables.classes or (() if self.kind == "number" else learnt_labels(train, self.kind))

        def trained() -> Tokenizer:
            if self.layout == "bert":
                return Tokenizer.train_wordpiece(_texts(train), vocab_size, self.lowercase)
            return Tokenizer.train(_texts(train), vocab_size)

        made_from = (train.digest, vocab_size, self.layout, self.lowercase)
        tokenizer, where = choose_tokenizer(
            tokenizer_json, self.tokenizer, vocab_size, lambda: kept(trained, *made_from)
        )
        return LabelledData(tables, self.encoder(tokenizer, where), labels, self.threads)

    def encoder(self, tokenizer: Tokenizer, where: str = "the tokenizer") -> TextEncoder:
        """Return what lays out new texts as in training, without opening the data.

        Raises `UserError` if the tokenizer lacks a special token of the layout.
        """
        return TextEncoder(Layout(self.layout, tokenizer, self.max_length, where), self.kind, self.buckets())

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of the batches of the longest bucket, over all processes."""
        rows, cells = (self.batch_rows,), (self.batch_rows, self.max_length)
        label = {"classes": (rows, "int32"), "number": (rows, "float32"), "tags": (cells, "int32")}[self.kind]
        shapes = dict.fromkeys(("tokens", "types", "segments"), (cells, "int32"))
        more = {"bert": (), "gpt": ("targets",), "gpt_both": ("targets", "swapped")}[self.layout]
        return {**shapes, "label": label, "example": (rows, "int64"), **dict.fromkeys(more, (cells, "int32"))}


def _texts(table: Table) -> Iterator[str]:
    for example in examples_of(table):
        yield example.text
        if example.pair:
            yield example.pair
