"""One table a family says which tensor of Hugging Face is which parameter of ours; it is read in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import ModelConfig
from transformer_jax.interop.fields import Fields
from transformer_jax.nn.module import Params, Skeleton

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """A parameter of ours, and how their tensor lays its axes out: "NH D" has two, the first of all heads' channels."""

    ours: str
    """Its path in the stacked tree, "encoder.layers.attention.q.weight"."""
    layout: str


@dataclass(frozen=True)
class Row:
    """A tensor of theirs, and the parameters of ours that it holds, one after the other along its last axis."""

    theirs: str
    """Its name; "{layer}" stands for the number of the layer, if our parameter has an axis L, and "{expert}" for that
    of the expert, if it then has an axis E."""
    parts: tuple[Part, ...]


def row(theirs: str, *parts: tuple[str, str]) -> Row:
    """Write a row as `row("pooler.dense.weight", ("pooler.weight", "F D"))`."""
    return Row(theirs, tuple(Part(*part) for part in parts))


@dataclass(frozen=True)
class Family:
    """What the exchange knows of one family."""

    name: str
    model_types: tuple[str, ...]
    """Values of "model_type" in config.json that are read."""
    read: Callable[[Fields, frozenset[str]], ModelConfig]
    """The configuration of the model that config.json and the names of the tensors describe."""
    write: Callable[[Any], dict[str, Any]]
    """The config.json of a configuration; raises `UserError` for what it cannot say."""
    rows: Callable[[Any], tuple[Row, ...]]
    """The table; rows of parameters that a model does not have are passed over."""
    outputs: Callable[[Any, Any], dict[str, Any]]
    """(model, batch) -> what the certificate compares, by the names of `reference.py`."""
    prefix: str
    """What their names begin with; a body saved without its head lacks it."""
    unprefixed: tuple[str, ...]
    """Heads, which never have it."""
    bare: Callable[[Any], bool] = lambda _: False
    """Whether the model of a configuration is a body without a head, which is written without prefix."""
    old_names: tuple[tuple[str, str], ...] = ()
    """Endings of names in old checkpoints, and those of today."""
    buffers: tuple[str, ...] = ()
    """Patterns of tensors that are left out where no row names them."""
    tied: tuple[tuple[str, str], ...] = ()
    """Tensors that may appear a second time under another name: (other name, name)."""

    def canonical(self, name: str) -> str:
        """Return the name without prefix, as today's checkpoints have it."""
        name = name.removeprefix(self.prefix)
        for old, new in self.old_names:
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def full(self, name: str, config: Any) -> str:
        """Return the name with the prefix it has in a model of this configuration."""
        return name if name.startswith(self.unprefixed) or self.bare(config) else self.prefix + name

    def is_buffer(self, name: str) -> bool:
        """Tell whether a canonical name is no parameter."""
        return any(re.fullmatch(pattern, name) for pattern in self.buffers)


@dataclass(frozen=True)
class Slot:
    """One parameter of ours in its stacked form."""

    letters: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> int:
        """How many of its first axes they store apart: none, layers, or layers and experts."""
        return len(self.letters) - len(self.letters.removeprefix("L").removeprefix("E"))

    def one(self) -> tuple[str, tuple[int, ...]]:
        """Return letters and shape of the share of one layer, and of one expert."""
        return self.letters[self.stacked :], self.shape[self.stacked :]

    def their_shape(self, layout: str) -> tuple[int, ...]:
        """Return the shape that the layout gives it in their checkpoint."""
        size = dict(zip(*self.one(), strict=True))
        return tuple(math.prod(size[letter] for letter in axis) for axis in layout.split())

    def from_theirs(self, array: Array, layout: str) -> Array:
        """Give their array our axes; a view where it can be."""
        letters, shape = self.one()
        size, given = dict(zip(letters, shape, strict=True)), layout.replace(" ", "")
        return array.reshape([size[letter] for letter in given]).transpose([given.index(letter) for letter in letters])

    def to_theirs(self, array: Array, layout: str) -> Array:
        """Undo `from_theirs`."""
        letters, _ = self.one()
        axes = [letters.index(letter) for letter in layout.replace(" ", "")]
        return array.transpose(axes).reshape(self.their_shape(layout))


def slots(skeleton: Skeleton) -> dict[str, Slot]:
    """Return the parameters of a model by path, stacked; the skeleton must be one that scans."""
    found: dict[str, Slot] = {}

    def walk(abstract: Params, letters: Params, path: str) -> None:
        for key, leaf in abstract.items():
            where = f"{path}.{key}" if path else str(key)
            if isinstance(leaf, dict):
                walk(leaf, letters[key], where)
            else:
                found[where] = Slot(letters[key], tuple(leaf.shape))

    walk(skeleton.abstract, skeleton.letters, "")
    return found


def used(rows: Iterable[Row], slots: Mapping[str, Slot]) -> list[Row]:
    """Keep the rows whose parameters this model has.

    Raises:
        TypeError: the table does not name every parameter exactly once.
    """
    kept = [row for row in rows if all(part.ours in slots for part in row.parts)]
    named = [part.ours for row in kept for part in row.parts]
    if sorted(named) != sorted(slots):
        wrong = sorted(set(slots) ^ set(named)) or sorted({name for name in named if named.count(name) > 1})
        raise TypeError(f"the table does not name exactly once: {', '.join(wrong)}")
    return kept


def names(row: Row, slots: Mapping[str, Slot]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the names of a row's tensors with the place of each in our parameter: (), (layer,), (layer, expert)."""
    slot = slots[row.parts[0].ours]
    for place in np.ndindex(slot.shape[: slot.stacked]):
        yield row.theirs.format(**dict(zip(("layer", "expert"), place, strict=False))), place


def shape_of(row: Row, slots: Mapping[str, Slot]) -> tuple[int, ...]:
    """Return the shape of a row's tensors."""
    shapes = [slots[part.ours].their_shape(part.layout) for part in row.parts]
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def import_row(row: Row, slots: Mapping[str, Slot], read: Callable[[str], Array]) -> dict[str, Array]:
    """Read a row's tensors, all layers of them, one at a time: our parameters by path, float32."""
    arrays = {part.ours: np.empty(slots[part.ours].shape, np.float32) for part in row.parts}
    widths = [slots[part.ours].their_shape(part.layout)[-1] for part in row.parts]
    for name, place in names(row, slots):
        pieces = np.split(read(name), np.cumsum(widths)[:-1], axis=-1)
        for part, piece in zip(row.parts, pieces, strict=True):
            arrays[part.ours][*place, ...] = slots[part.ours].from_theirs(piece, part.layout)
    return arrays


def export_row(row: Row, slots: Mapping[str, Slot], take: Callable[[str], Array]) -> Iterator[tuple[str, Array]]:
    """Yield a row's tensors by name; each of our parameters is taken once."""
    arrays = {part.ours: take(part.ours) for part in row.parts}
    for name, place in names(row, slots):
        pieces = [slots[part.ours].to_theirs(arrays[part.ours][*place, ...], part.layout) for part in row.parts]
        yield name, np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1))


def tree_of(arrays: Mapping[str, Any]) -> Params:
    """Return a tree of parameters from their paths."""
    tree: Params = {}
    for path, array in arrays.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = array
    return tree
