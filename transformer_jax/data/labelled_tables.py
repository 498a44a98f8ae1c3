"""The splits of a labelled dataset, read by position: TFDS (GLUE by name alone), or the user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from transformer_jax.data.files import plain_suffix
from transformer_jax.data.holdout import SPLITS, Split, hold_out
from transformer_jax.data.labelled_rows import (
    FORMS,
    SUFFIXES,
    Columns,
    Example,
    Kind,
    RawRows,
    named_columns,
    parse,
    read_rows,
    resolve,
)
from transformer_jax.data.progress import shown
from transformer_jax.errors import UserError

_PROBES: Final = 64
_CHUNK: Final = 10_000


class Known(NamedTuple):
    """What is known of a task by its name."""

    columns: Columns
    kind: Kind = "classes"
    validation: str = "validation"
    test: str = "validation"
    """The labels of GLUE's test splits are not public: its papers report the validation split."""


_SENTENCES: Final = Columns("sentence1", "sentence2", "label")
GLUE: Final[dict[str, Known]] = {
    "cola": Known(Columns("sentence", "", "label")),
    "sst2": Known(Columns("sentence", "", "label")),
    "mrpc": Known(_SENTENCES),
    "qqp": Known(Columns("question1", "question2", "label")),
    "stsb": Known(_SENTENCES, "number"),
    "mnli": Known(Columns("premise", "hypothesis", "label"), "classes", "validation_matched", "validation_mismatched"),
    "qnli": Known(Columns("question", "sentence", "label")),
    "rte": Known(_SENTENCES),
    "wnli": Known(_SENTENCES),
}
"""The tasks of GLUE (Wang 2019) as TFDS has them."""


def known(dataset: str) -> Known | None:
    """Return what is known of a TFDS dataset by its name: the tasks of GLUE."""
    suite, _, task = dataset.partition(":")[0].partition("/")
    return GLUE.get(task) if suite == "glue" else None


class Table(Protocol):
    """The labelled texts of one split, read by position."""

    @property
    def name(self) -> str:
        """What to call the split in messages."""

    @property
    def digest(self) -> str:
        """Hash that differs where the content differs."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Example]:
        """Return the examples `start` to `stop` (exclusive). Raises `UserError` for a row that is malformed."""

    def where(self, row: int) -> str:
        """Say where a row stands: "x.tsv:7"."""


@dataclass(frozen=True)
class Tables:
    """A dataset that has been opened."""

    splits: dict[Split, Table]
    columns: Columns
    named: bool
    """Whether the columns have names of their own."""
    classes: tuple[str, ...] = ()
    """The classes (or tags) that the dataset itself declares; none where they are to be learnt."""

    @property
    def paired(self) -> bool:
        """Whether there are two texts in each example."""
        return bool(self.columns.pair)


def is_labelled_file(dataset: str) -> bool:
    """Tell the user's own file from the name of a TFDS dataset."""
    return plain_suffix(Path(dataset)) in SUFFIXES or Path(dataset).expanduser().is_file()


def open_tables(dataset: str, given: Columns, kind: Kind, parts: dict[Split, str], data_dir: str) -> Tables:
    """Open train, validation and test.

    Args:
        dataset: a TFDS name or a file.
        given: the columns that were named; the others are known, found or guessed.
        kind: what the labels are.
        parts: for each split a TFDS split expression or a file; "" is the split of that name, or for a file what is
            held out of it: whole groups where a column names them, else rows, duplicates of a text together.
        data_dir: where TFDS keeps prepared datasets; "" is its own default.

    Raises `UserError` for whatever is absent or malformed.

    """
    if is_labelled_file(dataset):
        return _files(dataset, given, kind, parts)
    return _tfds(dataset, given, kind, parts, data_dir)


class FileTable:
    """Rows of a file, in memory."""

    def __init__(self, name: str, examples: list[Example], wheres: list[str], digest: str) -> None:
        self.name, self.digest = name, digest
        self._examples, self._wheres = examples, wheres

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, start: int, stop: int) -> list[Example]:
        """Return the examples `start` to `stop` (exclusive)."""
        return self._examples[start:stop]

    def where(self, row: int) -> str:
        """Say where a row stands."""
        return self._wheres[row]


def _files(dataset: str, given: Columns, kind: Kind, parts: dict[Split, str]) -> Tables:
    raw = read_rows(Path(dataset).expanduser(), given)
    columns = resolve(raw, given, kind)
    whole = _whole(dataset, raw, columns, kind)
    held: list[Split] = ["train"] * len(whole)
    if not (parts["validation"] and parts["test"]):
        if columns.group:
            keys = [str(row[columns.group]) for _, row in raw.rows]
        else:
            keys = ["\0".join(sorted(map(_bare, (e.text, e.pair)))) for e in whole.read(0, len(whole))]
        held = [split if not parts[split] else "train" for split in hold_out(keys, where=dataset)]
    splits: dict[Split, Table] = {}
    for split in SPLITS:
        if not parts[split]:
            splits[split] = _share(whole, f"{dataset} ({split})", [i for i, owner in enumerate(held) if owner == split])
            continue
        if not is_labelled_file(parts[split]):
            raise UserError(
                f"data.{split} = '{parts[split]}' is no file. For your own files it is a path; "
                "split expressions such as train[99%:] are for TFDS datasets."
            )
        own = read_rows(Path(parts[split]).expanduser(), columns)
        splits[split] = _whole(parts[split], own, resolve(own, columns, kind), kind)
    return Tables(splits, columns, raw.named)


def _whole(name: str, raw: RawRows, columns: Columns, kind: Kind) -> FileTable:
    wheres = [f"{raw.path}:{number}" for number, _ in raw.rows]
    examples = [parse(row, columns, kind, where) for (_, row), where in zip(raw.rows, wheres, strict=True)]
    return FileTable(name, examples, wheres, hashlib.sha256(f"{raw.digest} {columns}".encode()).hexdigest())


def _share(whole: FileTable, name: str, rows: list[int]) -> FileTable:
    examples = [example for row in rows for example in whole.read(row, row + 1)]
    digest = hashlib.sha256(f"{whole.digest} {rows}".encode()).hexdigest()
    return FileTable(name, examples, [whole.where(row) for row in rows], digest)


def _bare(text: str) -> str:
    return " ".join(text.casefold().split())


class TfdsTable:
    """The examples of one split of a prepared TFDS dataset."""

    def __init__(
        self,
        name: str,
        examples: Sequence[Mapping[str, Any]],
        columns: Columns,
        kind: Kind,
        classes: tuple[str, ...],
    ) -> None:
        self.name = name
        self._examples, self._columns, self._kind, self._classes = examples, columns, kind, classes
        # Reading all of a large set only to hash it would take minutes.
        probes = range(0, len(examples), max(1, len(examples) // _PROBES))
        content = [name, len(examples), columns, classes, [self.read(i, i + 1) for i in probes]]
        self.digest = hashlib.sha256(repr(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, start: int, stop: int) -> list[Example]:
        """Return the examples `start` to `stop` (exclusive)."""
        return [self._example(row, self._examples[row]) for row in range(start, stop)]

    def where(self, row: int) -> str:
        """Say where a row stands."""
        return f"{self.name} example {row}"

    def _example(self, row: int, features: Mapping[str, Any]) -> Example:
        fields = {key: _plain(value) for key, value in features.items()}
        label: Any = fields[self._columns.label]
        if isinstance(label, list):
            label = [self._classes[i] for i in label] if self._classes else label
        elif self._classes or self.name.startswith("glue/"):
            # TFDS numbers classes, and writes -1 where GLUE does not tell the label.
            label = None if label < 0 else self._classes[label] if self._classes else label
        fields[self._columns.label] = label
        # Published sets are taken as they are, with their few empty texts.
        return parse(fields, self._columns, self._kind, self.where(row), may_be_empty=True)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _tfds(dataset: str, given: Columns, kind: Kind, parts: dict[Split, str], data_dir: str) -> Tables:
    import tensorflow_datasets as tfds  # noqa: PLC0415 - takes a second to import

    from transformer_jax.data.tfds_source import open_tfds  # noqa: PLC0415

    task = known(dataset)
    defaults: dict[Split, str] = {
        "train": "train",
        "validation": task.validation if task else "validation",
        "test": task.test if task else "test",
    }
    info, opened = open_tfds(dataset, {split: parts[split] or defaults[split] for split in SPLITS}, data_dir, FORMS)
    if task:
        given = Columns(*(ours or theirs for ours, theirs in zip(given, task.columns, strict=True)))
    columns = named_columns(list(info.features), given, info.full_name)
    feature = info.features[columns.label]
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    classes = tuple(inner.names) if isinstance(inner, tfds.features.ClassLabel) else ()
    is_kind: Kind = "classes" if classes or isinstance(inner, tfds.features.Text) else "number"
    if inner is not feature:
        is_kind = "tags"
    # Whole numbers without names may count something, or be classes: as the user says.
    if is_kind != kind and not (is_kind == "number" and kind == "classes"):
        raise UserError(
            f"the labels of {info.full_name} ('{columns.label}') are of kind '{is_kind}': set data.kind={is_kind}."
        )
    splits: dict[Split, Table] = {
        split: TfdsTable(f"{info.full_name}:{parts[split] or defaults[split]}", examples, columns, kind, classes)
        for split, examples in opened.items()
    }
    return Tables(splits, columns, True, classes)


def chunks(table: Table) -> Iterator[list[Example]]:
    """Yield the examples of a split from beginning to end, with progress where there are many."""
    starts = range(0, len(table), _CHUNK)
    for start in shown(starts, f"Reading {table.name}, {_CHUNK:,} examples at a time", len(starts)):
        yield table.read(start, min(start + _CHUNK, len(table)))


def examples_of(table: Table) -> Iterator[Example]:
    """Yield the examples of a split one by one."""
    for chunk in chunks(table):
        yield from chunk
