"""What all pre-training on documents shares: where they come from, and the batches made of rows."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import DataConfig
from transformer_jax.data.cache import fingerprint
from transformer_jax.data.corpus import Corpus, Units
from transformer_jax.data.document_files import Boundary
from transformer_jax.data.documents import Part, Source, open_documents
from transformer_jax.data.holdout import Split
from transformer_jax.data.loader import Batch, read_ahead, rows_of_process
from transformer_jax.data.plan import EMPTY
from transformer_jax.data.row_plan import RowPlan, check_rows
from transformer_jax.data.tokenizer import Role, Tokenizer
from transformer_jax.data.tokenizer_choice import choose_tokenizer
from transformer_jax.errors import UserError

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class DocumentConfig(DataConfig):
    """Documents from TFDS or from your own files."""

    dataset: str
    """TFDS name (lm1b, c4/en), files (a.txt, 'books/*.txt', b.jsonl), several by commas, or weighted: a:0.7,b:0.3."""
    field: str = "text"
    """Where the text is, in TFDS and in JSON lines."""
    boundary: Boundary = "file"
    """What a document of plain text is: a file, or what stands between blank lines."""
    train: str = ""
    """TFDS split expression, by default "train"."""
    validation: str = ""
    """TFDS split expression or files; by default the split of that name, or a part held out of the training text."""
    test: str = ""
    """TFDS split expression or files; by default the split of that name, or (own files) a part held out."""
    tokenizer: str = ""
    """Tokenizer to use (a file, a Hugging Face folder, a run); empty trains one on the training documents."""
    batch_rows: int = 64
    """Rows of a batch, over all hosts."""
    rows_multiple: int = 8
    """Every batch has a multiple of this many rows, so that a mesh can divide it."""
    validation_rows: int = 0
    """Most rows of the validation documents that are scored, evenly spaced; 0 is all."""
    data_dir: str = ""
    """Folder of prepared TFDS datasets; empty is TFDS's own ($TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    threads: int = 4
    """Threads that assemble batches ahead of the step; 0 assembles them when they are asked for."""

    roles: ClassVar[tuple[Role, ...]]
    """Special tokens that the tokenizer must have."""

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        if not self.dataset:
            raise UserError("data.dataset is empty; name a TFDS dataset or your own files.")
        for name, least in (("rows_multiple", 1), ("validation_rows", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} must be at least {least}, got {getattr(self, name)}.")
        check_rows("data.batch_rows", self.batch_rows, self.rows_multiple)

    def tokenizer_path(self) -> str:
        """Return the tokenizer that was named, if it is one to be read; empty trains one."""
        return self.tokenizer

    @abc.abstractmethod
    def train_tokenizer(self, parts: Sequence[Part], vocab_size: int) -> Tokenizer:
        """Train the tokenizer of a new run on `parts`."""

    def read(self, vocab_size: int, saved: str | None, units: Units, mode: str) -> Corpora:
        """Read and tokenize all documents; what was tokenized before in this `mode` comes from the cache.

        Raises `UserError` for absent or malformed data, a tokenizer that does not fit, or no text.
        """
        self.check()
        expressions: dict[Split, str] = {"train": self.train, "validation": self.validation, "test": self.test}
        splits = open_documents(self.dataset, self.field, self.boundary, expressions, self.data_dir)
        parts = [part for source in splits.train for part in source.parts]
        tokenizer, where = choose_tokenizer(
            saved, self.tokenizer_path(), vocab_size, lambda: self.train_tokenizer(parts, vocab_size)
        )
        tokenizer.require_roles(self.roles, where)

        def corpus(parts: Sequence[Part], split: str) -> Corpus:
            made = Corpus.of(parts, tokenizer, units, mode) if parts else None
            if not made or not len(made):
                raise UserError(f"{self.dataset}: no {split} documents with text; name others in data.{split}.")
            return made

        return Corpora(
            tokenizer,
            splits.train,
            [corpus(source.parts, "train") for source in splits.train],
            corpus(splits.validation, "validation"),
            corpus(splits.test, "test") if splits.test else None,
            splits.held_out,
        )


@dataclass(frozen=True)
class Corpora:
    """The tokenized documents of an experiment."""

    tokenizer: Tokenizer
    sources: Sequence[Source]
    train: Sequence[Corpus]
    """One for each source."""
    validation: Corpus
    test: Corpus | None
    held_out: str
    """How validation and test were cut off, in words; empty if the dataset has splits of its own."""


class Rows(Protocol):
    """Rows made of the documents of one corpus, endlessly."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""

    def batch(self, rows_B: NDArray[np.int64]) -> Batch:
        """Return these rows; -1 is a row of padding."""


class DocumentData(abc.ABC):
    """The part of `transformer_jax.data.loader.OpenData` that does not depend on what a row is."""

    def __init__(self, config: DocumentConfig, corpora: Corpora, ramp: Sequence[tuple[int, int]] = ()) -> None:
        """Join tokenized documents with the settings they were read by."""
        self.tokenizer = corpora.tokenizer
        self._config, self._corpora = config, corpora
        self._plan = RowPlan([source.weight for source in corpora.sources], config.batch_rows, ramp)
        self._bases = np.cumsum([0, *map(len, corpora.train)])

    @abc.abstractmethod
    def rows_of(self, corpus: Corpus, seed: int | None, number: int = 0) -> Rows:
        """Return the rows of a corpus, shuffled by (seed, number), or in its own order if `seed` is None."""

    def summary(self) -> dict[str, Any]:
        """Return JSON-able facts; the ends of documents are not counted among the tokens."""
        corpora = self._corpora
        held: dict[Split, Sequence[Corpus]] = {
            "train": corpora.train,
            "validation": [corpora.validation],
            "test": [corpora.test] if corpora.test else [],
        }
        seen = np.concatenate([corpus.hashes_N for corpus in corpora.train])
        return {
            "data": self._config.dataset,
            "held_out": corpora.held_out,
            "documents": {split: sum(map(len, parts)) for split, parts in held.items()},
            "tokens": {split: sum(int(c.length_N.sum()) for c in parts) for split, parts in held.items()},
            "bytes": {split: sum(int(c.bytes_N.sum()) for c in parts) for split, parts in held.items()},
            "empty": {split: sum(c.empty for c in parts) for split, parts in held.items()},
            "overlap": {
                split: sum(int(np.isin(c.hashes_N, seen).sum()) for c in parts)
                for split, parts in held.items()
                if split != "train"
            },
            "mixture": [
                {
                    "name": source.name,
                    "weight": float(source.weight),
                    "documents": len(corpus),
                    "rows_per_epoch": self.rows_of(corpus, 0, number).rows,
                }
                for number, (source, corpus) in enumerate(zip(corpora.sources, corpora.train, strict=True))
            ],
            "vocabulary": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": fingerprint([key for parts in held.values() for corpus in parts for key in corpus.keys]),
        }

    def describe(self) -> str:
        """Return one line for the log."""
        facts = self.summary()
        documents, members = facts["documents"], facts["mixture"]
        held = f" ({facts['held_out']})" if facts["held_out"] else ""
        mixture = "; mixture " + ", ".join(f"{m['weight']:.3g} {m['name']}" for m in members) if members[1:] else ""
        overlap = sum(facts["overlap"].values())
        return (
            f"data: {documents['train']:,} documents, {facts['tokens']['train']:,} tokens, "
            f"{sum(m['rows_per_epoch'] for m in members):,} rows an epoch; "
            f"{documents['validation']:,} validation and {documents['test']:,} test documents{held}; "
            f"vocabulary {facts['vocabulary']:,}{mixture}"
            + (f"; {overlap:,} held-out documents are also in training" if overlap else "")
        )

    def train_iterator(self, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
        """Return the endless batches of training; see `OpenData.train_iterator`."""
        sources = [self.rows_of(corpus, seed, number) for number, corpus in enumerate(self._corpora.train)]

        def assemble(entry: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Batch:
            source_B, row_B = (rows_of_process(values_B, process_index, process_count) for values_B in entry)
            parts = []
            for source in np.unique(source_B):
                part = sources[source].batch(row_B[source_B == source])
                part["example"] += self._bases[source]
                parts.append(part)
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        return read_ahead(self._plan, assemble, self._config.threads)

    def validation_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the rows of the validation documents in their order, each once."""
        return self._in_order(self._corpora.validation, self._config.validation_rows, process_index, process_count)

    def test_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the rows of the test documents in their order, each once. Raises `UserError` if there are none."""
        if self._corpora.test is None:
            raise UserError(f"{self._config.dataset} has no test split; name one in data.test.")
        return self._in_order(self._corpora.test, 0, process_index, process_count)

    def _in_order(self, corpus: Corpus, most: int, process: int, processes: int) -> Iterator[Batch]:
        source = self.rows_of(corpus, None)
        chosen = np.linspace(0, source.rows - 1, min(most or source.rows, source.rows)).astype(np.int64)
        multiple = self._config.rows_multiple
        size = min(self._config.batch_rows, -(-len(chosen) // multiple) * multiple)
        padded = np.pad(chosen, (0, -len(chosen) % size), constant_values=EMPTY)
        for begin in range(0, len(padded), size):
            yield source.batch(rows_of_process(padded[begin : begin + size], process, processes))

    def text(self, example: int) -> str:
        """Return the text of a training document, as its tokens spell it."""
        source = int(np.searchsorted(self._bases, example, "right")) - 1
        return self.tokenizer.decode(self._corpora.train[source].tokens(example - int(self._bases[source])))
