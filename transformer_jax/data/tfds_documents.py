"""Documents from TFDS by random access: any dataset with a text feature."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from transformer_jax.data.document_files import FORMS
from transformer_jax.data.documents import Part
from transformer_jax.data.holdout import Split
from transformer_jax.data.tfds_source import open_tfds
from transformer_jax.errors import UserError, closest

_CHUNK: Final = 1000
_PROBES: Final = 64


class TfdsDocuments:
    """The documents of one split of a prepared TFDS dataset."""

    def __init__(self, name: str, examples: Sequence[dict[str, Any]], field: str) -> None:
        """Raise `UserError` if `field` is no text feature of the examples."""
        self.name = name
        self._examples, self._field = examples, field
        first = examples[0] if len(examples) else {field: b""}
        texts = sorted(key for key, value in first.items() if isinstance(value, bytes | str))
        if field not in texts:
            raise UserError(
                f"{name} has no text feature '{field}', only {', '.join(texts) or 'features that are no text'}."
                f"{closest(field, texts)} Set data.field."
            )
        # Reading all of a large set only to hash it would take minutes.
        probes = range(0, len(examples), max(1, len(examples) // _PROBES))
        content = [name, len(examples), field, [self._text(examples[i]) for i in probes]]
        self.digest = hashlib.sha256(repr(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(self)))
            yield from map(self._text, self._examples.__getitems__(rows))  # type: ignore[attr-defined]

    def _text(self, example: dict[str, Any]) -> str:
        value = example[self._field]
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def tfds_parts(
    dataset: str, field: str, expressions: dict[Split, str], given: set[Split], data_dir: str
) -> tuple[dict[Split, Part], str]:
    """Open the splits of a TFDS dataset that are not `given` otherwise, and say how validation was cut off.

    Where it has no validation split, that is the last hundredth of the training split. Raises what `open_tfds` does.
    """
    info, _ = open_tfds(dataset, {}, data_dir, FORMS)
    wanted: dict[Split, str] = {"train": expressions["train"] or "train"}
    how = ""
    if "validation" not in given:
        wanted["validation"] = expressions["validation"] or "validation"
        if (
            not expressions["validation"]
            and not expressions["train"]
            and info.splits
            and "validation" not in info.splits
        ):
            wanted |= {"train": "train[:99%]", "validation": "train[99%:]"}
            how = "the last 1 % of train held out"
    if "test" not in given and (expressions["test"] or "test" in info.splits):
        wanted["test"] = expressions["test"] or "test"
    _, opened = open_tfds(dataset, wanted, data_dir, FORMS)
    parts = {
        split: Part.whole(TfdsDocuments(f"{info.full_name}:{wanted[split]}", examples, field))
        for split, examples in opened.items()
    }
    return parts, how
