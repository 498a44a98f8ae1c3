"""How the division of arrays over mesh axes spreads from the inputs of an operation to what it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Layout = frozenset[tuple[int, str]]
"""(dimension, mesh axis) of every dimension that is divided."""

WHOLE: Layout = frozenset()


class Divided(Protocol):
    """An array with its layout."""

    shape: tuple[int, ...]
    layout: Layout


def spread(equation: Any, taken: Sequence[Divided]) -> list[Layout]:
    """Return the layouts of what an operation makes."""
    parameters, shapes = equation.params, [tuple(v.aval.shape) for v in equation.outvars]
    match equation.primitive.name:
        case "dot_general":
            return [_product(parameters["dimension_numbers"], *taken)]
        case "transpose":
            order = parameters["permutation"]
            return [_moved(taken[0].layout, {d: i for i, d in enumerate(order)})]
        case "broadcast_in_dim":
            to = parameters["broadcast_dimensions"]
            same = {d: t for d, t in enumerate(to) if taken[0].shape[d] == shapes[0][t]}
            return [_moved(taken[0].layout, same)]
        case "reshape":
            return [_reshaped(taken[0], shapes[0])]
        case "squeeze":
            gone = {d % len(taken[0].shape) for d in parameters["dimensions"]}
            return [_moved(taken[0].layout, _left(len(taken[0].shape), gone))]
        case "gather":
            return [WHOLE]
        case "scatter" | "scatter-add":
            return [taken[0].layout]
        case name if name.startswith(("reduce_", "arg")) and "axes" in parameters:
            left = _left(len(taken[0].shape), set(parameters["axes"]))
            return [_moved(taken[0].layout, left)] * len(shapes)
    joined = []
    for shape in shapes:
        alike = [v for v in taken if len(v.shape) == len(shape)]
        joined.append(frozenset((d, a) for v in alike for d, a in v.layout if v.shape[d] == shape[d]))
    return joined


def _moved(layout: Layout, to: Mapping[int, int]) -> Layout:
    return frozenset((to[d], axis) for d, axis in layout if d in to)


def _left(rank: int, gone: set[int]) -> dict[int, int]:
    """Number the dimensions that are left anew."""
    return {d: i for i, d in enumerate(d for d in range(rank) if d not in gone)}


def _product(numbers: Any, left: Divided, right: Divided) -> Layout:
    (left_sum, right_sum), (left_batch, right_batch) = numbers
    layout: set[tuple[int, str]] = set()
    for i, (a, b) in enumerate(zip(left_batch, right_batch, strict=True)):
        layout |= {(i, axis) for d, axis in left.layout if d == a} | {(i, axis) for d, axis in right.layout if d == b}
    place = len(left_batch)
    for value, gone in ((left, {*left_sum, *left_batch}), (right, {*right_sum, *right_batch})):
        kept = _left(len(value.shape), gone)
        layout |= {(place + kept[d], axis) for d, axis in value.layout if d in kept}
        place += len(kept)
    return frozenset(layout)


def _reshaped(value: Divided, shape: tuple[int, ...]) -> Layout:
    """Follow the dimensions through groups of equal size: a divided one lives on in the first of its group."""
    layout: set[tuple[int, str]] = set()
    axes = dict(value.layout)
    old = [(d, n) for d, n in enumerate(value.shape) if n > 1]
    new = [(d, n) for d, n in enumerate(shape) if n > 1]
    while old and new:
        before, after = [old.pop(0)], [new.pop(0)]
        while (a := math.prod(n for _, n in before)) != (b := math.prod(n for _, n in after)):
            if a < b and old:
                before.append(old.pop(0))
            elif a > b and new:
                after.append(new.pop(0))
            else:
                return frozenset(layout)
        for place, (d, _) in enumerate(before):
            if d in axes:
                layout.add((after[0 if place == 0 else -1][0], axes[d]))
    return frozenset(layout)
