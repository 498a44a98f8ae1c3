"""What the data of all fine-tuning shares: where examples come from, and batches of as many rows at every length."""

from __future__ import annotations

from dataclasses import dataclass

from transformer_jax.config import DataConfig
from transformer_jax.data.holdout import Split
from transformer_jax.data.plan import Bucket, geometric_buckets
from transformer_jax.errors import UserError


@dataclass(frozen=True)
class TaskConfig(DataConfig):
    """Examples of a task from TFDS or from your own file."""

    dataset: str
    """TFDS name, or your file, also .gz or .xz."""
    train: str = ""
    """TFDS split expression, by default "train"; with your own file a file, by default what is not held out."""
    validation: str = ""
    """TFDS split expression, by default "validation" (glue/mnli: matched); or a file, by default 5 % held out."""
    test: str = ""
    """TFDS split, by default "test" (squad and glue/*: "validation", mnli: mismatched); or a file, or 5 %."""
    tokenizer: str = ""
    """Tokenizer to use (a file, a Hugging Face folder, a run); empty trains one on the training texts."""
    lowercase: bool = True
    """Whether a WordPiece that is trained here lower-cases; answers are cut out of the original text all the same."""
    max_length: int = 128
    """Most tokens of a row, special ones included."""
    batch_rows: int = 32
    """Rows of a batch."""
    rows_multiple: int = 8
    """Every batch has a multiple of this many rows, so that a mesh can divide it."""
    bucket_lengths: tuple[int, ...] = ()
    """Lengths to which batches are padded, each a shape to compile; empty doubles from a short one up to max_length."""
    data_dir: str = ""
    """Folder of prepared TFDS datasets; empty is TFDS's own ($TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    threads: int = 4
    """Threads that assemble batches ahead of the step; 0 assembles them when they are asked for."""

    def check_batches(self, least_length: int) -> None:
        """Raise `UserError` for values that contradict each other."""
        if not self.dataset:
            raise UserError("data.dataset is empty; name a TFDS dataset or your own file.")
        if self.max_length < least_length:
            raise UserError(f"data.max_length must be at least {least_length}, got {self.max_length}.")
        if self.threads < 0:
            raise UserError(f"data.threads must not be negative, got {self.threads}.")
        if self.rows_multiple < 1:
            raise UserError(f"data.rows_multiple must be at least 1, got {self.rows_multiple}.")
        if self.batch_rows < 1 or self.batch_rows % self.rows_multiple:
            raise UserError(
                f"data.batch_rows must be a positive multiple of data.rows_multiple = {self.rows_multiple}, "
                f"got {self.batch_rows}."
            )
        lengths = self.bucket_lengths
        if lengths and (list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or lengths[-1] != self.max_length):
            raise UserError(
                f"data.bucket_lengths must be positive, ascend and end with data.max_length = {self.max_length}, "
                f"got {lengths}."
            )

    def parts(self) -> dict[Split, str]:
        """Return what was said of each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def buckets(self, first: int = 16) -> tuple[Bucket, ...]:
        """Return the buckets, all with the same number of rows: every step averages over as many examples."""
        lengths = self.bucket_lengths or geometric_buckets(self.max_length, first)
        return tuple(Bucket(length, self.batch_rows) for length in lengths)
