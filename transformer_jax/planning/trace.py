"""A traced step as a list of operations, with the part of each value that one device holds.

The step is traced on the rows of one device, so that the batch axes need no thought. The other axes start at the
parameters and spread from there: what a product or a sum keeps of its inputs' dimensions keeps their axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from jax.extend import core

Layout = frozenset[tuple[int, str]]
"""(dimension, mesh axis) of every dimension that is divided."""

WHOLE: Layout = frozenset()

MATERIAL = frozenset(
    (
        *("dot_general", "conv_general_dilated", "scan", "while", "cond", "gather", "scatter", "scatter-add"),
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"),
        *("sort", "top_k", "cumsum", "dynamic_update_slice"),
    )
)
"""Operations whose results go to memory; all others are computed inside of those that use them."""

_NUMBER = count()


@dataclass(eq=False)
class Value:
    """An array of the program."""

    shape: tuple[int, ...]
    itemsize: int
    layout: Layout = WHOLE
    roots: frozenset[Value] = frozenset()
    """Arrays in memory from which it is computed; for one in memory, itself."""
    backward: bool = False
    """Made by the backward pass."""
    saved: bool = False
    """Stacked by a loop of the forward pass, for the backward pass."""
    number: int = field(default_factory=lambda: next(_NUMBER))

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that one device holds, on a mesh of these sizes."""
        parts = math.prod(sizes[axis] for axis in {axis for _, axis in self.layout})
        return math.prod(self.shape) * self.itemsize // parts

    def in_memory(self) -> Value:
        """Make this value one that lies in memory."""
        self.roots = frozenset({self})
        return self


@dataclass(eq=False)
class Operation:
    """One primitive, or a loop with its body."""

    name: str
    inputs: list[Value]
    outputs: list[Value]
    parameters: dict[str, Any]
    body: Trace | None = None
    turns: int = 1
    carried: int = 0
    """Outputs of a loop that are carried from turn to turn; the others are stacked."""


@dataclass
class Trace:
    """Operations in order."""

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def trace(
    closed: core.ClosedJaxpr,
    layouts: Sequence[Layout],
    known: Mapping[tuple[int, ...], Layout],
    gathered: frozenset[str],
) -> Trace:
    """List the operations of a traced function.

    Args:
        closed: what `jax.make_jaxpr` returned.
        layouts: of its inputs.
        known: layouts that arrays of these shapes (the gradients) get where a loop hands them out.
        gathered: axes that are given up where a value is used for anything but an update in place.
    """
    inputs = [_value(v.aval, layout).in_memory() for v, layout in zip(closed.jaxpr.invars, layouts, strict=True)]
    constants = [_value(v.aval).in_memory() for v in closed.jaxpr.constvars]
    found = _Tracer(known, gathered).run(closed.jaxpr, constants, inputs, backward=False)
    return Trace(inputs, found.operations, found.outputs)


def _value(aval: Any, layout: Layout = WHOLE, **more: Any) -> Value:
    return Value(tuple(aval.shape), getattr(aval.dtype, "itemsize", 4), layout, **more)


@dataclass
class _Tracer:
    known: Mapping[tuple[int, ...], Layout]
    gathered: frozenset[str]

    def run(self, jaxpr: core.Jaxpr, constants: list[Value], inputs: list[Value], *, backward: bool) -> Trace:
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)
        uses: dict[Any, int] = {}
        for equation in jaxpr.eqns:
            for v in equation.invars:
                if not isinstance(v, core.Literal):
                    uses[v] = uses.get(v, 0) + 1
        operations: list[Operation] = []

        def read(v: Any) -> Value:
            return _value(v.aval) if isinstance(v, core.Literal) else values[v]

        for equation in jaxpr.eqns:
            taken = [read(v) for v in equation.invars]
            back = backward or "transpose(" in str(equation.source_info.name_stack)
            name = equation.primitive.name
            if name == "scan":
                operation = self._scan(equation, taken, backward=back)
                operations.append(operation)
                made = operation.outputs
            elif inner := _inner(equation.params) if name not in ("while", "cond") else None:
                part = self.run(
                    inner[0], [_value(v.aval).in_memory() for v in inner[0].constvars], taken, backward=back
                )
                operations += part.operations
                made = part.outputs
            else:
                made = self._simple(equation, taken, uses, backward=back)
                if made and made[0].roots == {made[0]}:
                    operations.append(Operation(name, taken, made, equation.params))
            values |= zip(equation.outvars, made, strict=True)
        return Trace(inputs, operations, [read(v) for v in jaxpr.outvars])

    def _simple(self, equation: Any, taken: list[Value], uses: dict[Any, int], *, backward: bool) -> list[Value]:
        layouts = spread(equation, [self._whole(v, equation.primitive.name) for v in taken])
        roots = frozenset[Value]().union(*(v.roots for v in taken))
        made = [
            _value(v.aval, layout, roots=roots, backward=backward)
            for v, layout in zip(equation.outvars, layouts, strict=True)
        ]
        sizes = sum(math.prod(root.shape) * root.itemsize for root in roots)
        for v, value in zip(equation.outvars, made, strict=True):
            # What several operations use is kept rather than computed anew from many others.
            kept = uses.get(v, 0) > 1 and sizes > 2 * math.prod(value.shape) * value.itemsize > 0
            if (equation.primitive.name in MATERIAL and not _one_hot(equation)) or (kept and len(roots) > 1):
                value.in_memory()
        return made

    def _whole(self, value: Value, name: str) -> Value:
        """Give up the gathered axes before a use that needs the whole array."""
        if name not in ("dot_general", "broadcast_in_dim", "gather"):
            return value
        layout = frozenset((d, axis) for d, axis in value.layout if axis not in self.gathered)
        return value if layout == value.layout else Value(value.shape, value.itemsize, layout, value.roots)

    def _gradient(self, shape: tuple[int, ...]) -> Layout:
        """Return the layout of a stacked parameter whose gradient comes with its layers in groups: [L / 2, 2, ...]."""
        for known, layout in self.known.items():
            more = len(shape) - len(known)
            if more > 0 and shape[more + 1 :] == known[1:] and math.prod(shape[: more + 1]) == known[0]:
                return frozenset((d + more, axis) for d, axis in layout)
        return WHOLE

    def _scan(self, equation: Any, taken: list[Value], *, backward: bool) -> Operation:
        constants, carried = equation.params["num_consts"], equation.params["num_carry"]
        closed = equation.params["jaxpr"]
        layouts = []
        for i, value in enumerate(taken):
            if i < constants:
                layouts.append(value.layout)
            elif i < constants + carried:
                layouts.append(value.layout | self.known.get(value.shape, WHOLE))
            else:
                layouts.append(frozenset((d - 1, axis) for d, axis in value.layout if d))
        while True:
            inputs = [_value(v.aval, a).in_memory() for v, a in zip(closed.jaxpr.invars, layouts, strict=True)]
            body = self.run(closed.jaxpr, [], inputs, backward=backward)
            after = [value.layout for value in body.outputs[:carried]]
            before = layouts[constants : constants + carried]
            if all(a <= b for a, b in zip(after, before, strict=True)):
                break
            layouts[constants : constants + carried] = [a | b for a, b in zip(after, before, strict=True)]
        made = []
        for i, (v, inner) in enumerate(zip(equation.outvars, body.outputs, strict=True)):
            layout = before[i] if i < carried else frozenset((d + 1, axis) for d, axis in inner.layout)
            shape = tuple(v.aval.shape)
            layout |= self.known.get(shape, WHOLE)
            if backward and i >= carried:
                layout |= self._gradient(shape)
            made.append(_value(v.aval, layout, backward=backward, saved=i >= carried and not backward).in_memory())
        return Operation("scan", taken, made, {}, body, equation.params["length"], carried)


def _one_hot(equation: Any) -> bool:
    """Recognise a scatter of single elements, as the gradient of picking one of many: it becomes a comparison."""
    numbers = equation.params.get("dimension_numbers")
    return equation.primitive.name.startswith("scatter") and not numbers.update_window_dims


def _inner(parameters: dict[str, Any]) -> tuple[core.Jaxpr] | None:
    """Return the function that a call (jit, checkpoint, custom derivative) stands for."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in parameters:
            found = parameters[name]
            return (getattr(found, "jaxpr", found),)
    return None


def spread(equation: Any, taken: list[Value]) -> list[Layout]:
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


def _product(numbers: Any, left: Value, right: Value) -> Layout:
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


def _reshaped(value: Value, shape: tuple[int, ...]) -> Layout:
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
