"""`MaskedText`: documents for BERT, as masked pairs of segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from transformer_jax.data.corpus import Corpus, trained
from transformer_jax.data.document_files import Boundary
from transformer_jax.data.documents import Part
from transformer_jax.data.holdout import Split
from transformer_jax.data.loader import Batch
from transformer_jax.data.masked_rows import ROLES, MaskedRows
from transformer_jax.data.pretraining import Corpora, DocumentConfig, DocumentData
from transformer_jax.data.sentences import SentenceEnds, sentences
from transformer_jax.data.tokenizer import Role, Tokenizer
from transformer_jax.errors import UserError


@dataclass(frozen=True)
class MaskedText(DocumentConfig):
    """Documents from TFDS or from your own files, cut into sentences, joined to [CLS] A [SEP] B [SEP], and masked.

    A batch is {"tokens", "types", "segments": int32 [B, T]; "positions_masked", "targets": int32 [B, M]; "next": int32
    [B]; "example": int64 [B]}. Types are 0 in A and 1 in B; segments are 1, and 0 is padding; targets are -1 where
    fewer than M tokens are masked; next is 1 where B follows A, 0 where it is from another document, -1 where there is
    nothing to say; example is the training document of A. Masks are drawn anew in every epoch.
    """

    boundary: Boundary = "blank_line"
    """What a document of plain text is: a file, or what stands between blank lines."""
    sentences: SentenceEnds = "punctuation"
    """What ends a sentence: only the end of a line, or also . ! ? and their like."""
    lowercase: bool = True
    """Whether a WordPiece that is trained here reads capitals as small letters."""
    length: int = 128
    """Most tokens of a row. The paper's second phase is a run with 512 that is initialised from one with 128."""
    next_sentence: bool = True
    """Pairs for next-sentence prediction; False gives full sentences of one document (RoBERTa's DOC-SENTENCES)."""
    short: float = 0.1
    """Share of the rows that are made shorter on purpose, by a random amount."""
    masked: float = 0.15
    """Share of the tokens that are masked."""
    max_predictions: int = 20
    """Most masked tokens of a row (M)."""
    whole_words: bool = False
    """Mask all pieces of a word or none."""

    roles: ClassVar[tuple[Role, ...]] = ROLES

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        super().check()
        if self.length < 8:
            raise UserError(f"data.length must be at least 8, got {self.length}.")
        if not 1 <= self.max_predictions <= self.length:
            raise UserError(f"data.max_predictions must lie in 1 to {self.length}, got {self.max_predictions}.")
        if not 0 <= self.short <= 1:
            raise UserError(f"data.short must lie in [0, 1], got {self.short}.")
        if not 0 < self.masked < 1:
            raise UserError(f"data.masked must lie in (0, 1), got {self.masked}.")

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of a batch, over all processes."""
        rows, long, few = self.batch_rows, ("tokens", "types", "segments"), ("positions_masked", "targets")
        return {
            **{name: ((rows, self.length), "int32") for name in long},  # noqa: C420 - fromkeys loses the types
            **{name: ((rows, self.max_predictions), "int32") for name in few},  # noqa: C420
            "next": ((rows,), "int32"),
            "example": ((rows,), "int64"),
        }

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> MaskedData:
        """Read, cut and tokenize all documents; what was tokenized before comes from the cache.

        Raises `UserError` for absent or malformed data, a tokenizer that does not fit, or too little text for pairs.
        """
        units = partial(sentences, ends=self.sentences)
        corpora = self.read(vocab_size, tokenizer_json, units, f"sentences {self.sentences}")
        for corpus in corpora.train:
            self.require_pairs(corpus, "train")
        self.require_pairs(corpora.validation, "validation")
        return MaskedData(self, corpora)

    def require_pairs(self, corpus: Corpus, split: Split) -> None:
        """Raise `UserError` if sentence pairs are wanted and the documents of a split have none."""
        if self.next_sentence and (len(corpus) < 2 or (corpus.last_N - corpus.first_N).max() < 2):
            raise UserError(
                f"{self.dataset}: pairs of sentences need two {split} documents, one of them with two sentences, but "
                f"there are {len(corpus)} documents; see data.boundary, or set data.next_sentence to False."
            )

    def train_tokenizer(self, parts: Sequence[Part], vocab_size: int) -> Tokenizer:
        """Train WordPiece on `parts`."""
        kind = f"wordpiece {vocab_size} {'lower' if self.lowercase else 'cased'}"
        train = partial(Tokenizer.train_wordpiece, vocab_size=vocab_size, lowercase=self.lowercase)
        return trained(parts, kind, train)


class MaskedData(DocumentData):
    """Implements `transformer_jax.data.loader.OpenData` for masked pairs of segments."""

    def __init__(self, config: MaskedText, corpora: Corpora) -> None:
        """Join tokenized documents with the settings they were read by."""
        super().__init__(config, corpora)
        self._masked = config

    @property
    def training(self) -> Sequence[Corpus]:
        """The training documents of each source."""
        return self._corpora.train

    def rows_of(self, corpus: Corpus, seed: int | None, number: int = 0) -> MaskedRows:
        """Return the rows of a corpus, shuffled by (seed, number), or in its own order if `seed` is None."""
        return MaskedRows(corpus, self._masked, self.tokenizer, seed, number)

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts."""
        facts = super().summary()
        counts = [corpus.last_N - corpus.first_N for corpus in self._corpora.train]
        return facts | {
            "length": self._masked.length,
            "sentences": sum(int(count.sum()) for count in counts),
            "single_sentences": sum(int((count == 1).sum()) for count in counts),
        }

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the rows of the test documents, each once. Raises `UserError` if there are none, or no pairs."""
        if self._corpora.test:
            self._masked.require_pairs(self._corpora.test, "test")
        return super().test_batches(process_index, process_count)
