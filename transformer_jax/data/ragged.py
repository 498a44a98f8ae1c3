"""Token sequences of different length as flat arrays on disk: written as a stream, read through a memory map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Token sequences of different length, one after the other."""

    flat: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    """Where each begins in `flat`, and at last its end: one more than there are sequences."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    def padded(self, examples_B: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """Return the sequences `examples_B` as int32 [B, length], padded with 0; -1 is a row of padding."""
        real_B = examples_B >= 0
        begin_B = self.offsets[np.where(real_B, examples_B, 0)]
        length_B = np.where(real_B, self.offsets[np.where(real_B, examples_B, 0) + 1] - begin_B, 0)
        position_T = np.arange(length)
        inside_BT = position_T < length_B[:, None]
        tokens_BT = np.zeros(inside_BT.shape, np.int32)
        tokens_BT[inside_BT] = self.flat[(begin_B[:, None] + position_T)[inside_BT]]
        return tokens_BT


class RaggedWriter:
    """Writes sequences to `FOLDER/NAME.*` as they come; memory holds the lengths and one chunk of tokens."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._folder, self._name = folder, name
        self._lengths: list[NDArray[np.int64]] = []
        self._flat = (folder / f"{name}.flat").open("wb")

    def __enter__(self) -> RaggedWriter:
        return self

    def add(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.unsignedinteger]:
        """Append a chunk of sequences, and return their tokens one after the other."""
        self._lengths.append(np.fromiter(map(len, sequences), np.int64, len(sequences)))
        tokens = np.concatenate([np.zeros(0, self._dtype), *(np.asarray(ids, self._dtype) for ids in sequences)])
        self._flat.write(tokens.tobytes())
        return tokens

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flat.close()
        if error is None:
            offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))
            np.save(self._folder / f"{self._name}.offsets.npy", offsets)
            (self._folder / f"{self._name}.json").write_text(json.dumps({"dtype": self._dtype.name}), encoding="utf-8")


def load_ragged(folder: Path, name: str) -> Ragged:
    """Read what a `RaggedWriter` wrote; the tokens stay on disk."""
    dtype = np.dtype(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["dtype"])
    offsets = np.load(folder / f"{name}.offsets.npy")
    if not offsets[-1]:
        return Ragged(np.zeros(0, dtype), offsets)  # an empty file cannot be mapped
    return Ragged(np.memmap(folder / f"{name}.flat", dtype, "r"), offsets)
