"""`PackedText`: documents for causal language models, packed into rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from transformer_jax.data.corpus import Corpus, pieces, trained
from transformer_jax.data.documents import Part
from transformer_jax.data.packing import Stream
from transformer_jax.data.pretraining import Corpora, DocumentConfig, DocumentData
from transformer_jax.data.tokenizer import Role, Tokenizer
from transformer_jax.errors import UserError

CHARACTERS: Final = "characters"


@dataclass(frozen=True)
class PackedText(DocumentConfig):
    """Documents from TFDS or from your own files, joined and cut into rows of `context` tokens.

    A batch is {"tokens", "targets", "segments", "positions": int32 [B, T]; "bytes": float32 [B]; "example": int64 [B]}.
    Targets are -1 where there is none; segments count the documents of a row from 1, and 0 is padding; positions begin
    anew in each, and are absent where documents are not kept apart; bytes are those of UTF-8 that the targets of a row
    stand for; example is the training document a row begins in.
    """

    tokenizer: str = ""
    """Tokenizer to use (a file, a Hugging Face folder, a run), or "characters"; empty trains byte-level BPE."""
    context: int = 256
    """Tokens of a row."""
    ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches at first: (rows, steps) of each stage before batch_rows (Brown 2020, section 2.3)."""
    separate: bool = True
    """Documents of a row do not see each other; False makes a row one text, as GPT-3 was trained (Brown 2020, appendix
    B) and as in nanoGPT. cuDNN's attention is faster so."""

    roles: ClassVar[tuple[Role, ...]] = ("eos",)

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        super().check()
        if self.context < 1:
            raise UserError(f"data.context must be at least 1, got {self.context}.")
        for rows, steps in self.ramp:
            if rows < 1 or rows % self.rows_multiple:
                flags = " ".join(["--data.ramp", *(str(number) for stage in self.divisible_ramp() for number in stage)])
                raise UserError(
                    f"data.ramp = {rows} is no multiple of data.rows_multiple = {self.rows_multiple}; "
                    f"of as many tokens, and a multiple, is {flags}"
                )
            if steps < 1:
                raise UserError(f"data.ramp: {rows} rows for {steps} steps; give at least one step.")

    def divisible_ramp(self) -> list[tuple[int, int]]:
        """Return the ramp with rows rounded up to the multiple, and about as many rows in all as before."""
        seen: dict[int, int] = {}
        for rows, steps in self.ramp:
            divisible = max(-(-rows // self.rows_multiple), 1) * self.rows_multiple
            seen[divisible] = seen.get(divisible, 0) + max(rows, 0) * steps
        return [(rows, max(round(n / rows), 1)) for rows, n in seen.items() if rows < self.batch_rows]

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of the largest batch, over all processes."""
        rows = max([self.batch_rows, *(rows for rows, _ in self.ramp)])
        names = ("tokens", "targets", "segments", *(["positions"] if self.separate else []))
        return {
            **{name: ((rows, self.context), "int32") for name in names},  # noqa: C420 - fromkeys loses the types
            "bytes": ((rows,), "float32"),
            "example": ((rows,), "int64"),
        }

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> PackedData:
        """Read and tokenize all documents; what was tokenized before comes from the cache.

        Raises `UserError` for absent or malformed data, a tokenizer that does not fit, or no text.
        """
        return PackedData(self, self.read(vocab_size, tokenizer_json, pieces, "documents"))

    def tokenizer_path(self) -> str:
        """Return the tokenizer that was named, if it is one to be read."""
        return "" if self.tokenizer == CHARACTERS else self.tokenizer

    def train_tokenizer(self, parts: Sequence[Part], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE on `parts`, or collect their characters."""
        if self.tokenizer == CHARACTERS:
            return trained(parts, CHARACTERS, Tokenizer.characters)
        return trained(parts, f"bpe {vocab_size}", lambda texts: Tokenizer.train(texts, vocab_size))


class PackedData(DocumentData):
    """Implements `transformer_jax.data.loader.OpenData` for packed documents."""

    def __init__(self, config: PackedText, corpora: Corpora) -> None:
        """Join tokenized documents with the settings they were read by."""
        super().__init__(config, corpora, config.ramp)
        self._packed = config

    @property
    def training(self) -> Sequence[Corpus]:
        """The training documents of each source."""
        return self._corpora.train

    def rows_of(self, corpus: Corpus, seed: int | None, number: int = 0) -> Stream:
        """Return the rows of a corpus, shuffled by (seed, number), or in its own order if `seed` is None."""
        return Stream(corpus, self._packed.context, self.tokenizer, self._packed.separate, seed, number)

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts; the targets of an epoch are its tokens and the end of each document."""
        facts = super().summary()
        targets = {split: facts["tokens"][split] + facts["documents"][split] for split in facts["tokens"]}
        return facts | {"targets": targets, "context": self._packed.context}
