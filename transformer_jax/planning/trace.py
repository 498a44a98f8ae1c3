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

from transformer_jax.planning.layouts import WHOLE, Layout, spread

MATERIAL = frozenset(
    (
        *("dot_general", "conv_general_dilated", "scan", "while", "cond", "gather", "scatter", "scatter-add"),
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"),
        *("sort", "top_k", "cumsum", "dynamic_update_slice", "ragged_dot_general", "pallas_call", "ffi_call"),
        "ppermute",
    )
)
"""Operations whose results go to memory; all others are computed inside of those that use them."""

LINEAR = ("add", "add_any", "reshape", "transpose", "squeeze")
"""Operations that may come before summands of several devices are added up, if all that they take are such."""

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
    partial: frozenset[str] = frozenset()
    """Axes along which each device has one summand of this array."""
    arguments: frozenset[int] = frozenset()
    """Numbers of the arguments of the step that this array is, or is made of before it enters a loop."""
    number: int = field(default_factory=lambda: next(_NUMBER))

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that one device holds, on a mesh of these sizes."""
        parts = math.prod(sizes[axis] for axis in {axis for _, axis in self.layout})
        return math.prod(self.shape) * self.itemsize // parts

    def made_of(self) -> frozenset[int]:
        """Return the arguments among the arrays from which it is computed."""
        return frozenset[int]().union(*(root.arguments for root in self.roots))

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
    product: int,
) -> Trace:
    """List the operations of a traced function.

    Args:
        closed: what `jax.make_jaxpr` returned.
        layouts: of its inputs.
        known: layouts that arrays of these shapes (the gradients) get where a loop of the backward pass hands them out.
        gathered: axes that are given up where a value is used for anything but an update in place.
        product: bytes to which the device rounds an input of a matrix product, at most.
    """
    inputs = [
        _value(v.aval, layout, arguments=frozenset({i})).in_memory()
        for i, (v, layout) in enumerate(zip(closed.jaxpr.invars, layouts, strict=True))
    ]
    found = _Tracer(known, gathered, product).run(closed.jaxpr, inputs, backward=False)
    return Trace(inputs, found.operations, found.outputs)


def _value(aval: Any, layout: Layout = WHOLE, **more: Any) -> Value:
    return Value(tuple(aval.shape), getattr(aval.dtype, "itemsize", 4), layout, **more)


@dataclass
class _Tracer:
    known: Mapping[tuple[int, ...], Layout]
    gathered: frozenset[str]
    product: int
    loops: int = 0
    """Around what is being read."""

    def run(self, jaxpr: core.Jaxpr, inputs: list[Value], *, backward: bool) -> Trace:
        values: dict[Any, Value] = {v: _value(v.aval).in_memory() for v in jaxpr.constvars}
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
            if not _adds(name, taken):
                operations += _summed(taken)
            if name == "scan":
                operation = self._scan(equation, taken, backward=back)
                operations.append(operation)
                made = operation.outputs
            elif inner := _inner(equation):
                part = self.run(inner, taken, backward=back)
                operations += part.operations
                made = [_handed_out(v.aval, o) for v, o in zip(equation.outvars, part.outputs, strict=True)]
            else:
                made = self._simple(equation, taken, uses, backward=back)
                if made and made[0].roots == {made[0]}:
                    operations.append(Operation(name, taken, made, equation.params))
            values |= zip(equation.outvars, made, strict=True)
        outputs = [read(v) for v in jaxpr.outvars]
        return Trace(inputs, [*operations, *_summed(outputs)], outputs)

    def _simple(self, equation: Any, taken: list[Value], uses: dict[Any, int], *, backward: bool) -> list[Value]:
        if equation.primitive.name == "cond":
            longest = max(equation.params["branches"], key=lambda branch: len(branch.jaxpr.eqns))
            layouts = [v.layout for v in self.run(longest.jaxpr, taken[1:], backward=backward).outputs]
        else:
            layouts = spread(equation, [self._whole(v, equation.primitive.name) for v in taken])
        roots = frozenset[Value]().union(*(v.roots for v in taken))
        made = [
            _value(v.aval, layout, roots=roots, backward=backward)
            for v, layout in zip(equation.outvars, layouts, strict=True)
        ]
        for value in made:
            value.partial = self._partial(equation, taken)
        sizes = sum(math.prod(root.shape) * root.itemsize for root in roots)
        for v, value in zip(equation.outvars, made, strict=True):
            # What several operations use is kept rather than computed anew from many others.
            kept = uses.get(v, 0) > 1 and sizes > 2 * math.prod(value.shape) * value.itemsize > 0
            if backward and not self.loops:
                value.layout |= self.known.get(value.shape, WHOLE)  # a gradient
            if equation.primitive.name in MATERIAL or (kept and len(roots) > 1):
                value.in_memory()
        return made

    def _partial(self, equation: Any, taken: list[Value]) -> frozenset[str]:
        """Return the axes along which the result is yet to be summed: a sum of summands is one."""
        if equation.primitive.name in ("dot_general", "gather"):
            numbers = equation.params["dimension_numbers"]
            # Of a table that is divided, one device has the row that is looked up, and the others zeros.
            summed = numbers[0] if equation.primitive.name == "dot_general" else [numbers.start_index_map]
            axes = {axis for v, dims in zip(taken, summed, strict=False) for d, axis in v.layout if d in dims}
            return frozenset(axes - self.gathered)
        return taken[0].partial if _adds(equation.primitive.name, taken) else frozenset()

    def _whole(self, value: Value, name: str) -> Value:
        """Give up the gathered axes before a use that needs the whole array."""
        if name not in ("dot_general", "broadcast_in_dim", "gather"):
            return value
        layout = frozenset((d, axis) for d, axis in value.layout if axis not in self.gathered)
        return value if layout == value.layout else Value(value.shape, value.itemsize, layout, value.roots)

    def _needed(self, jaxpr: core.Jaxpr, variable: Any, itemsize: int) -> int:
        """Bytes of an element that all uses of a variable together need."""
        needed = 0
        for equation in jaxpr.eqns:
            for place, v in enumerate(equation.invars):
                if v is not variable:
                    continue
                if equation.primitive.name == "dot_general":
                    part = min(self.product, itemsize)
                elif equation.primitive.name == "convert_element_type":
                    part = min(equation.params["new_dtype"].itemsize, itemsize)
                elif equation.primitive.name in ("transpose", "reshape", "squeeze"):
                    part = self._needed(jaxpr, equation.outvars[0], itemsize)
                elif inner := _inner(equation):
                    part = self._needed(inner, inner.invars[place], itemsize)
                else:
                    part = itemsize
                needed = max(needed, part)
        return needed if all(v is not variable for v in jaxpr.outvars) else itemsize

    def _gradient(self, shape: tuple[int, ...]) -> Layout:
        """Return the layout of a stacked parameter whose gradient comes with its layers in groups: [L / 2, 2, ...]."""
        for known, layout in self.known.items():
            more = len(shape) - len(known)
            if more > 0 and shape[more + 1 :] == known[1:] and math.prod(shape[: more + 1]) == known[0]:
                return frozenset((d + more, axis) for d, axis in layout)
        return WHOLE

    def _scan(self, equation: Any, taken: list[Value], *, backward: bool) -> Operation:
        closed = equation.params["jaxpr"]
        # Told by shapes, since JAX names the counts differently from version to version: what is scanned has a rank
        # more outside than inside, what is carried or constant has not.
        scanned = sum(v.aval.ndim < len(value.shape) for v, value in zip(closed.jaxpr.invars, taken, strict=True))
        carried = sum(
            inner.aval.ndim == outer.aval.ndim
            for inner, outer in zip(closed.jaxpr.outvars, equation.outvars, strict=True)
        )
        constants = len(taken) - carried - scanned
        for v, value in zip(closed.jaxpr.invars[constants + carried :], taken[constants + carried :], strict=True):
            if value.saved:  # what is rounded before it is used is kept rounded
                value.itemsize = self._needed(closed.jaxpr, v, value.itemsize)
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
            for inner, value in zip(inputs[:constants], taken, strict=False):
                inner.arguments = value.made_of()
            self.loops += 1
            body = self.run(closed.jaxpr, inputs, backward=backward)
            self.loops -= 1
            after = [value.layout for value in body.outputs[:carried]]
            before = layouts[constants : constants + carried]
            if all(a <= b for a, b in zip(after, before, strict=True)):
                break
            layouts[constants : constants + carried] = [a | b for a, b in zip(after, before, strict=True)]
        made = []
        for i, (v, inner) in enumerate(zip(equation.outvars, body.outputs, strict=True)):
            layout = before[i] if i < carried else frozenset((d + 1, axis) for d, axis in inner.layout)
            shape = tuple(v.aval.shape)
            if backward and i >= carried:
                layout |= self.known.get(shape, WHOLE) | self._gradient(shape)
            made.append(_value(v.aval, layout, backward=backward, saved=i >= carried and not backward).in_memory())
        return Operation("scan", taken, made, {}, body, equation.params["length"], carried)


def _adds(name: str, taken: Sequence[Value]) -> bool:
    """Tell whether summands may be added up before all devices exchange them."""
    adding = name in LINEAR and all(v.partial == taken[0].partial for v in taken)
    return adding and bool(taken[0].partial)


def _summed(taken: Sequence[Value]) -> list[Operation]:
    """Exchange the summands among these values, once."""
    operations = []
    for value in dict.fromkeys(taken):
        if value.partial:
            operations.append(Operation("psum", [value], [], {"axes": value.partial}))
            value.partial = frozenset()
    return operations


def _handed_out(aval: Any, value: Value) -> Value:
    """Return what a call hands out; one for each device (shard_map) hands out an array of another shape."""
    return value if value.shape == tuple(aval.shape) else _value(aval, value.layout).in_memory()


def _inner(equation: Any) -> core.Jaxpr | None:
    """Return the function that a call (jit, checkpoint, custom derivative, shard_map) stands for; kernels are none."""
    if equation.primitive.name in MATERIAL:
        return None
    found = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
    inner = getattr(found, "jaxpr", found)
    return inner if inner is not None and len(inner.invars) == len(equation.invars) else None
