"""`ParallelText`: the data of a translation experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from transformer_jax.config import DataConfig
from transformer_jax.data.examples import Filters, tokenized, usable_texts
from transformer_jax.data.holdout import SPLITS
from transformer_jax.data.parallel import ParallelData
from transformer_jax.data.plan import geometric_buckets, make_buckets
from transformer_jax.data.sources import Pairs, open_splits
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokenizer_choice import choose_tokenizer, kept
from transformer_jax.errors import UserError

_TOKENIZER_PAIRS: Final = 1_000_000  # bounds time and memory; of a larger set evenly spaced chunks are read


@dataclass(frozen=True)
class ParallelText(DataConfig):
    """Pairs of sentences in two languages, from TFDS or from your own files."""

    dataset: str
    """TFDS name (wmt14_translate/de-en, tjax_parallel/help_en_ko) or your files: x.tsv, x.jsonl, two as a.de,a.en."""
    source: str = "en"
    """Language code of the source side."""
    target: str = "ko"
    """Language code of the target side."""
    train: str = ""
    """TFDS split expression, by default "train"; with your own files a file, by default what is not held out."""
    validation: str = ""
    """TFDS split expression, by default "validation"; with your own files a file, by default 5 % held out by group."""
    test: str = ""
    """TFDS split expression, by default "test"; with your own files a file, by default 5 % held out by group."""
    tokenizer: str = ""
    """Tokenizer to use (a file, a Hugging Face folder, a run); empty trains byte-level BPE on the training pairs."""
    min_words: int = 0
    """Fewest whitespace words on either side of a pair, in every split; 0 is no limit."""
    max_words: int = 0
    """Most whitespace words on either side of a pair, in every split; 0 is no limit."""
    max_length: int = 256
    """Most tokens on either side, end of sentence included; longer training and validation pairs are dropped."""
    batch_tokens: int = 25_000
    """Tokens on each side of a batch, padding included."""
    rows_multiple: int = 8
    """Every batch has a multiple of this many rows, so that a mesh can divide it."""
    bucket_lengths: tuple[int, ...] = ()
    """Lengths to which batches are padded, each a shape to compile; empty doubles from 16 up to max_length."""
    data_dir: str = ""
    """Folder of prepared TFDS datasets; empty is TFDS's own ($TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    threads: int = 4
    """Threads that assemble batches ahead of the step; 0 assembles them when they are asked for."""

    def check(self) -> None:
        """Raise `UserError` for values that contradict each other; looks at no data."""
        if not self.dataset:
            raise UserError("data.dataset is empty; name a TFDS dataset or your own files.")
        if self.source == self.target:
            raise UserError(f"data.source and data.target are both '{self.source}'.")
        for name in ("min_words", "max_words", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} must not be negative, got {getattr(self, name)}.")
        for name in ("batch_tokens", "rows_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_length < 2:
            raise UserError(f"data.max_length must be at least 2 (a token and <eos>), got {self.max_length}.")
        if self.max_words and self.max_words < self.min_words:
            raise UserError(f"data.max_words = {self.max_words} is less than data.min_words = {self.min_words}.")
        if self.batch_tokens < self.max_length * self.rows_multiple:
            raise UserError(
                f"data.batch_tokens = {self.batch_tokens} has no room for data.rows_multiple = {self.rows_multiple} "
                f"rows of data.max_length = {self.max_length}: that takes {self.max_length * self.rows_multiple}."
            )
        self._check_buckets()

    def _check_buckets(self) -> None:
        lengths = self.bucket_lengths
        if not lengths:
            return
        if list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
            raise UserError(f"data.bucket_lengths must be positive and ascend, got {lengths}.")
        if lengths[-1] != self.max_length:
            raise UserError(
                f"data.bucket_lengths must end with data.max_length = {self.max_length}, but the last is {lengths[-1]}."
            )

    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> ParallelData:
        """Read, filter and tokenize all splits; what was tokenized before comes from the cache.

        Args:
            vocab_size: rows of the model's embedding; a trained tokenizer gets at most as many tokens.
            tokenizer_json: the tokenizer saved with a run, which then is used whatever `self.tokenizer` says.

        Raises `UserError` for absent or malformed data, a tokenizer that does not fit, or no usable pairs.

        """
        self.check()
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        pairs = open_splits(self.dataset, self.source, self.target, {s: parts[s] for s in SPLITS}, self.data_dir)
        words = Filters(self.min_words, self.max_words)
        limited = Filters(self.min_words, self.max_words, self.max_length)
        tokenizer = self._tokenizer(vocab_size, tokenizer_json, pairs["train"], words)
        # Test pairs are all scored, however long: a score over chosen sentences is not comparable.
        examples = {s: tokenized(pairs[s], tokenizer, words if s == "test" else limited) for s in SPLITS}
        for split in SPLITS:
            if not len(examples[split]):
                raise UserError(
                    f"{pairs[split].name}: no usable {split} pairs out of {len(pairs[split])} "
                    f"(dropped: {examples[split].dropped}); loosen the filters of the data or name another file."
                )
        lengths = self.bucket_lengths or geometric_buckets(self.max_length)
        buckets = make_buckets(lengths, self.batch_tokens, self.rows_multiple)
        return ParallelData(tokenizer, pairs, examples, buckets, self.rows_multiple, self.threads)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of the batches of the longest bucket, over all processes."""
        (longest,) = make_buckets((self.max_length,), self.batch_tokens, self.rows_multiple)
        rows, length = longest.rows, longest.length
        return {
            "source": ((rows, length), "int32"),
            "target": ((rows, length + 1), "int32"),
            "example": ((rows,), "int64"),
        }

    def _tokenizer(self, vocab_size: int, saved: str | None, train: Pairs, filters: Filters) -> Tokenizer:
        def trained() -> Tokenizer:
            stride = -(-len(train) // _TOKENIZER_PAIRS)
            return Tokenizer.train(usable_texts(train, filters, stride), vocab_size)

        made_from = (train.digest, vocab_size, vars(filters))
        tokenizer, where = choose_tokenizer(saved, self.tokenizer, vocab_size, lambda: kept(trained, *made_from))
        pad, *_ = tokenizer.require_roles(("pad", "bos", "eos"), where)
        if pad:
            raise UserError(f"{where} pads with id {pad}, but batches of parallel text are padded with 0.")
        return tokenizer
