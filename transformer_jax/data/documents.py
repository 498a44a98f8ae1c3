"""From a dataset string to documents: TFDS, the user's own files, or a weighted mixture of both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.document_files import Boundary, FileDocuments, is_document_files
from transformer_jax.data.holdout import SPLITS, Split, hold_out
from transformer_jax.errors import UserError

_WEIGHT: Final = re.compile(r"(.+):(\d+(?:\.\d+)?)")  # the version of a TFDS dataset has two dots
_FEW: Final = 20  # with fewer documents, the last tenth of each is held out instead of whole ones
_ENDS: Final = (0.9, 0.95)


class Documents(Protocol):
    """Texts that are read from the first to the last, as often as needed, without being held in memory."""

    @property
    def name(self) -> str:
        """What to call the documents in messages."""

    @property
    def digest(self) -> str:
        """Hash that differs where the content differs."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Part:
    """Some documents of a collection."""

    documents: Documents
    rows: NDArray[np.int64]
    """Their positions in the collection, ascending."""

    @classmethod
    def whole(cls, documents: Documents) -> Part:
        """Return all documents of a collection."""
        return cls(documents, np.arange(len(documents)))

    @property
    def digest(self) -> str:
        """Hash that differs where the texts differ."""
        return hashlib.sha256(self.documents.digest.encode() + self.rows.tobytes()).hexdigest()

    def texts(self, stride: int = 1) -> Iterator[str]:
        """Yield every `stride`-th of the documents."""
        wanted = iter(self.rows[::stride].tolist())
        row = next(wanted, None)
        for position, text in enumerate(self.documents):
            if position == row:
                yield text
                if (row := next(wanted, None)) is None:
                    return


@dataclass(frozen=True)
class Source:
    """One member of a mixture."""

    name: str
    weight: Fraction
    parts: Sequence[Part]
    """Its training documents."""


@dataclass(frozen=True)
class Splits:
    """The documents of an experiment."""

    train: Sequence[Source]
    """Weights add up to 1; without a mixture it is one source with everything."""
    validation: Sequence[Part]
    test: Sequence[Part]
    """Empty where there is no test split."""
    held_out: str
    """How validation and test were cut off, in words; empty if the dataset has splits of its own."""


class CutDocuments:
    """Each document in three: the first nine tenths, and two equal ends, cut before a line."""

    def __init__(self, documents: Documents) -> None:
        self.name, self.digest = documents.name, f"cut {documents.digest}"
        self._documents = documents

    def __len__(self) -> int:
        return 3 * len(self._documents)

    def __iter__(self) -> Iterator[str]:
        for text in self._documents:
            a, b = (text.rfind("\n", 0, int(end * len(text))) + 1 or int(end * len(text)) for end in _ENDS)
            yield from (text[:a], text[a : max(a, b)], text[max(a, b) :])


def open_documents(
    dataset: str, field: str, boundary: Boundary, expressions: dict[Split, str], data_dir: str = ""
) -> Splits:
    """Open the documents of a dataset.

    Args:
        dataset: a TFDS name (`lm1b`, `c4/en`, `tjax_text/shakespeare`), files (`a.txt`, `books/*.txt`, `c.jsonl`, each
            also `.gz` or `.xz`), several of them with commas between, or a mixture of them: `a.jsonl:0.7,b/*.txt:0.3`.
        field: where the text is, in TFDS and in JSON lines.
        boundary: what a document of plain text is.
        expressions: for each split a TFDS split expression; for validation and test also files. "" is the split of that
            name, or what is held out of the training documents.
        data_dir: where TFDS keeps prepared datasets; "" is its own default.

    Raises `UserError` for whatever is absent or malformed.

    """
    members = _members(dataset)
    given = {
        split: [Part.whole(FileDocuments(name, field, boundary)) for name, _ in _members(expressions[split])]
        for split in SPLITS
        if expressions[split] and all(is_document_files(name) for name, _ in _members(expressions[split]))
    }
    if "train" in given:
        raise UserError(f"data.train = '{expressions['train']}' is a file; training files are named in data.dataset.")
    rest = {split: "" if split in given else expressions[split] for split in SPLITS}
    if all(is_document_files(name) for name, _ in members):
        for split, expression in rest.items():
            if expression:
                raise UserError(
                    f"data.{split} = '{expression}' is no file. For your own files it is a path; "
                    "split expressions such as train[99%:] are for TFDS datasets."
                )
    opened: list[dict[Split, Part]] = []
    ways = []
    for name, _ in members:
        if is_document_files(name):
            parts, how = _file_parts(FileDocuments(name, field, boundary), set(given))
        else:
            from transformer_jax.data.tfds_documents import tfds_parts  # noqa: PLC0415 - TFDS takes a second to import

            parts, how = tfds_parts(name, field, rest, set(given), data_dir)
        opened.append(parts)
        ways.append(how)
    if any(weight for _, weight in members):
        total = sum(weight for _, weight in members)
        train = [
            Source(name, weight / total, [parts["train"]])
            for (name, weight), parts in zip(members, opened, strict=True)
        ]
    else:
        train = [Source(dataset, Fraction(1), [parts["train"] for parts in opened])]
    held = {split: given.get(split) or [p[split] for p in opened if split in p] for split in SPLITS}
    return Splits(train, held["validation"], held["test"], "; ".join(dict.fromkeys(filter(None, ways))))


def _members(dataset: str) -> list[tuple[str, Fraction]]:
    """Split "a:0.7,b:0.3" into names and weights; 0 is no weight."""
    members = []
    # A comma inside a TFDS configuration (set/a=True,b=3) is followed by name=value.
    for text in re.split(r",(?!\w+=)", dataset):
        name = text.strip()
        weighted = _WEIGHT.fullmatch(name)
        members.append((weighted[1], Fraction(weighted[2])) if weighted else (name, Fraction(0)))
        if weighted and not members[-1][1]:
            raise UserError(f"'{name}' has the weight 0; leave it out.")
        if not name:
            raise UserError(f"'{dataset}': nothing between two commas.")
    if 0 < sum(weight > 0 for _, weight in members) < len(members):
        bare = next(name for name, weight in members if not weight)
        raise UserError(f"'{dataset}': '{bare}' has no weight and others have; give it to all (NAME:0.5) or to none.")
    return members


def _file_parts(documents: FileDocuments, given: set[Split]) -> tuple[dict[Split, Part], str]:
    held = [split for split in ("validation", "test") if split not in given]
    if not held:
        return {"train": Part.whole(documents)}, ""
    if len(documents) < _FEW:
        cut = CutDocuments(documents)
        owners: list[Split] = [split if split in held else "train" for split in SPLITS] * len(documents)
        return _owned(cut, owners), "the ends of the documents held out"
    owners = [split if split in held else "train" for split in hold_out(documents.groups(), where=documents.name)]
    return _owned(documents, owners), "whole documents held out"


def _owned(documents: Documents, owners: Sequence[Split]) -> dict[Split, Part]:
    owner_N = np.asarray(owners)
    return {split: Part(documents, np.flatnonzero(owner_N == split)) for split in SPLITS if (owner_N == split).any()}
