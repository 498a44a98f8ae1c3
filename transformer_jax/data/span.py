"""`SpanQA`: the data of span question answering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformer_jax.data.span_data import SpanData, SpanEncoder
from transformer_jax.data.span_rows import Misplaced, QuestionTable, open_questions
from transformer_jax.data.span_windows import Shape
from transformer_jax.data.task_config import TaskConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokenizer_choice import choose_tokenizer, kept
from transformer_jax.errors import UserError


@dataclass(frozen=True)
class SpanQA(TaskConfig):
    """Questions whose answer is a span of a context, or that have none (Rajpurkar 2016 and 2018).

    From TFDS (squad, squad/v2.0, tjax_tasks/wordnet_qa) or your file: squad.json or flat.jsonl, also .gz or .xz.

    A batch is {"tokens", "types" (1 in the context), "segments" (1 real, 0 padding): int32 [B, T]; "start", "end":
    int32 [B], the first and the last token of the answer; "example": int64 [B], the window}. A window is [CLS] question
    [SEP] context [SEP]. Start and end are 0, [CLS], if the answer is not (all) in it or there is none, and -1 in a row
    of padding.
    """

    max_length: int = 384
    """Most tokens of a window, special ones included."""
    misplaced: Misplaced = "error"
    """What to do about an answer that is not at its offset in the context: an error, or leave the question out."""
    doc_stride: int = 128
    """Context tokens from the beginning of one window to that of the next."""
    max_query_length: int = 64
    """Most tokens of a question; the rest is cut."""

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        for name in ("doc_stride", "max_query_length"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}.")
        self.check_batches(least_length=self.max_query_length + 4)

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> SpanData:
        """Read, check and tokenize all splits; what was tokenized before comes from the cache.

        Args:
            vocab_size: rows of the model's embedding; a trained tokenizer gets at most as many tokens.
            tokenizer_json: the tokenizer saved with a run, which then is used whatever `self.tokenizer` says.

        Raises `UserError` for absent or malformed data, an answer not at its offset, or a tokenizer that does not fit.

        """
        self.check()
        tables = open_questions(self.dataset, self.parts(), self.data_dir)
        train = tables["train"]

        def trained() -> Tokenizer:
            return Tokenizer.train_wordpiece(_texts(train), vocab_size, self.lowercase)

        made_from = (train.digest, vocab_size, self.lowercase)
        tokenizer, where = choose_tokenizer(
            tokenizer_json, self.tokenizer, vocab_size, lambda: kept(trained, *made_from)
        )
        return SpanData(tables, self.encoder(tokenizer, where), self.misplaced, self.threads)

    def encoder(self, tokenizer: Tokenizer, where: str = "the tokenizer") -> SpanEncoder:
        """Return what cuts new questions and contexts as in training, without opening the data.

        Raises `UserError` if the tokenizer has no [CLS] or [SEP].
        """
        tokenizer.require_roles(("cls", "sep"), where)
        shape = Shape(self.max_length, self.doc_stride, self.max_query_length)
        return SpanEncoder(tokenizer, shape, self.buckets(first=64))

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of the batches of the longest bucket, over all processes."""
        rows, cells = (self.batch_rows,), (self.batch_rows, self.max_length)
        tokens = dict.fromkeys(("tokens", "types", "segments"), (cells, "int32"))
        return {**tokens, "start": (rows, "int32"), "end": (rows, "int32"), "example": (rows, "int64")}


def _texts(table: QuestionTable) -> Iterator[str]:
    yield from dict.fromkeys(question.context for question in table.questions)
    for question in table.questions:
        yield question.question
