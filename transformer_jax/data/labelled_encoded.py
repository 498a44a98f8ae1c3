"""Labelled texts as token arrays, cached on disk, and the batches made of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.cache import cached, fingerprint
from transformer_jax.data.examples import normalise
from transformer_jax.data.labelled_layout import Layout, Sequenced
from transformer_jax.data.labelled_rows import Example, Kind
from transformer_jax.data.labelled_tables import Table, chunks
from transformer_jax.data.loader import Batch, rows_of_process
from transformer_jax.data.plan import Bucket, EpochPlan
from transformer_jax.data.ragged import Ragged, RaggedWriter, load_ragged
from transformer_jax.errors import UserError, closest

_FORMAT: Final = 1  # of the cached arrays; a change makes old caches unused


@dataclass(frozen=True)
class Encoded:
    """The sequences of one split and their labels."""

    key: str
    """Stands for the texts, the labels and the tokenizer they were made with."""
    tokens: Ragged
    first: NDArray[np.int32]
    """[N]: tokens up to the second text."""
    label: NDArray[Any]
    """[N]: the class, -1 without one; or the number, NaN without one."""
    tags: Ragged | None
    """One more than the tag at the first token of each word, 0 elsewhere."""
    truncated: int
    """Examples that lost tokens."""

    def __len__(self) -> int:
        return len(self.tokens)


class TextEncoder:
    """Lays texts out in batches: all that prediction on new text needs of the data."""

    def __init__(self, layout: Layout, kind: Kind, buckets: Sequence[Bucket]) -> None:
        self.layout, self.kind, self.buckets = layout, kind, tuple(buckets)

    def batches(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield batches of `texts`, or of texts and their `pairs`; "example" is the position in `texts`.

        There are no labels: "label" is -1 (a number: 0). Words to be tagged are separated by blanks; "label" is 0 at
        the first token of each word that was not cut, in their order, and -1 elsewhere.

        Raises `UserError` for an empty text, or texts and pairs of different number.
        """
        if pairs is None and self.layout.name == "gpt_both":
            raise UserError("this model compares two texts; give a second one for each.")
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"{len(texts)} texts but {len(pairs)} second texts.")
        examples = [
            Example(normalise(text), normalise(pair), tuple(normalise(text).split()), None)
            for text, pair in zip(texts, pairs if pairs is not None else [""] * len(texts), strict=True)
        ]
        for number, example in enumerate(examples, start=1):
            if not example.text or (pairs is not None and not example.pair):
                raise UserError(f"text {number} is empty.")
        sequences = self.sequences(examples, paired=pairs is not None)
        labels = np.full(len(examples), -1 if self.kind == "classes" else np.nan)
        encoded = Encoded(
            "",
            _ragged([sequence.ids for sequence in sequences]),
            np.asarray([sequence.first for sequence in sequences], np.int32),
            labels.astype(np.int32 if self.kind == "classes" else np.float32),
            _ragged([_spread(sequence, [0] * len(sequence.words)) for sequence in sequences]),
            sum(sequence.cut for sequence in sequences),
        )
        yield from self.one_pass(encoded)

    def sequences(self, examples: Sequence[Example], paired: bool) -> list[Sequenced]:
        """Tokenize and lay out."""
        if self.kind == "tags":
            return self.layout.words([example.words for example in examples])
        pairs = [example.pair for example in examples] if paired else None
        return self.layout.texts([example.text for example in examples], pairs)

    def one_pass(self, encoded: Encoded, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield every example once, shortest batches first."""
        plan = EpochPlan(encoded.tokens.lengths, self.buckets, seed=None)
        for i in range(plan.batches_per_epoch):
            yield self.assemble(encoded, plan[i], process_index, process_count)

    def assemble(
        self, encoded: Encoded, entry: tuple[Bucket, NDArray[np.int64]], process_index: int, process_count: int
    ) -> Batch:
        """Return this process's rows of one batch of an `EpochPlan`."""
        bucket, global_B = entry
        chosen_B = rows_of_process(global_B, process_index, process_count)
        return _batch(encoded, self.layout, self.kind, bucket.length, chosen_B)


def encode_table(table: Table, encoder: TextEncoder, labels: tuple[str, ...], paired: bool) -> Encoded:
    """Return the sequences of a split, from the cache where the same have been made before.

    Raises `UserError` naming the row of a label that is not among `labels`.
    """
    layout, kind = encoder.layout, encoder.kind
    parts = (layout.name, layout.max_length, layout.tokenizer.fingerprint, kind, paired, labels)
    key = fingerprint(_FORMAT, table.digest, *parts)
    folder = cached(f"labelled-{key}", lambda folder: _save(folder, table, encoder, labels, paired))
    return Encoded(
        key,
        load_ragged(folder, "tokens"),
        np.load(folder / "first.npy"),
        np.load(folder / "label.npy"),
        load_ragged(folder, "tags") if kind == "tags" else None,
        json.loads((folder / "facts.json").read_text(encoding="utf-8"))["truncated"],
    )


def _save(folder: Path, table: Table, encoder: TextEncoder, labels: tuple[str, ...], paired: bool) -> None:
    number_of = {name: i for i, name in enumerate(labels)}
    first: list[int] = []
    numbers: list[float] = []
    cut = row = 0
    size = encoder.layout.tokenizer.vocab_size
    with RaggedWriter(folder, "tokens", size) as tokens, RaggedWriter(folder, "tags", len(labels) + 1) as tags:
        for examples in chunks(table):
            sequences = encoder.sequences(examples, paired)
            tokens.add([sequence.ids for sequence in sequences])
            first += [sequence.first for sequence in sequences]
            cut += sum(sequence.cut for sequence in sequences)
            for example, sequence in zip(examples, sequences, strict=True):
                names = example.label if isinstance(example.label, tuple) else (example.label,)
                if labels and (unknown := [str(name) for name in names if name is not None and name not in number_of]):
                    raise UserError(
                        f"{table.where(row)}: the label '{unknown[0]}' is not among the {len(labels)} {encoder.kind} "
                        f"{', '.join(labels[:20])}.{closest(unknown[0], labels)}"
                    )
                if encoder.kind == "tags":
                    tags.add([_spread(sequence, [number_of[str(name)] for name in names])])
                    numbers.append(0)
                elif encoder.kind == "number":
                    numbers.append(np.nan if example.label is None else float(str(example.label)))
                else:
                    numbers.append(-1 if example.label is None else number_of[str(example.label)])
                row += 1
    np.save(folder / "first.npy", np.asarray(first, np.int32))
    np.save(folder / "label.npy", np.asarray(numbers, np.int32 if encoder.kind == "classes" else np.float32))
    (folder / "facts.json").write_text(json.dumps({"truncated": cut}), encoding="utf-8")


def _spread(sequence: Sequenced, numbers: Sequence[int]) -> list[int]:
    """Put one more than the number of each word at its first token, and 0 elsewhere."""
    spread = [0] * len(sequence.ids)
    for position, number in zip(sequence.words, numbers, strict=False):  # words that were cut have no position
        spread[position] = number + 1
    return spread


def _ragged(sequences: Sequence[Sequence[int]]) -> Ragged:
    offsets = np.cumsum([0, *map(len, sequences)])
    return Ragged(np.fromiter(itertools.chain.from_iterable(sequences), np.uint32, int(offsets[-1])), offsets)


def _batch(encoded: Encoded, layout: Layout, kind: Kind, length: int, chosen_B: NDArray[np.int64]) -> Batch:
    """Assemble the rows `chosen_B` (-1: a row of padding), padded to `length`; see `LabelledText` for the arrays."""
    real_B = chosen_B >= 0
    row_B = np.where(real_B, chosen_B, 0)
    position_T = np.arange(length)
    length_B = encoded.tokens.offsets[row_B + 1] - encoded.tokens.offsets[row_B]
    inside_BT = position_T < np.where(real_B, length_B, 0)[:, None]
    pad = layout.tokenizer.pad or 0  # a tokenizer without padding: "segments" says what is none
    tokens_BT = np.where(inside_BT, encoded.tokens.padded(chosen_B, length), pad).astype(np.int32)
    if kind == "tags":
        assert encoded.tags is not None
        label = encoded.tags.padded(chosen_B, length) - 1
    elif kind == "number":
        label = np.nan_to_num(np.where(real_B, encoded.label[row_B], 0)).astype(np.float32)
    else:
        label = np.where(real_B, encoded.label[row_B], -1).astype(np.int32)
    arrays: Batch = {
        "tokens": tokens_BT,
        "types": (inside_BT & (position_T >= encoded.first[row_B][:, None])).astype(np.int32),
        "segments": inside_BT.astype(np.int32),
        "label": label,
        "example": chosen_B.astype(np.int64),
    }
    if layout.name == "gpt_both":
        order_BT = _other_order(encoded.first[row_B][:, None], length_B[:, None], position_T)
        arrays["swapped"] = np.where(inside_BT, np.take_along_axis(tokens_BT, order_BT % length, axis=1), tokens_BT)
    if layout.name != "bert":
        # Token t is predicted from those before it; what follows the last one is not.
        following_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
        arrays["targets"] = np.where(np.pad(inside_BT[:, 1:], ((0, 0), (0, 1))), following_BT, -1).astype(np.int32)
    return arrays


def _other_order(first_B1: NDArray[Any], length_B1: NDArray[np.int64], t_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the tokens of start b delimiter a extract stand in start a delimiter b extract: [B, T]."""
    second_B1 = length_B1 - first_B1 - 1
    last = t_T == length_B1 - 1
    behind = np.where(t_T == second_B1 + 1, first_B1 - 1, np.where(last, t_T, t_T - second_B1 - 1))
    return np.where(t_T == 0, 0, np.where(t_T <= second_B1, first_B1 + t_T - 1, behind))
