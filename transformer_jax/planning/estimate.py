"""What a step takes, estimated from its trace, where no compiler is at hand.

Memory: what is alive at each operation, in the order of the program, with everything fused that is not a product, a
sum, a gather or a loop. The compiler orders and fuses better or worse; `docs/plan.md` says how far the two lie apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

from transformer_jax.planning.trace import Operation, Trace, Value
from transformer_jax.sharding import EXPERT


@dataclass(frozen=True)
class Exchange:
    """A collective that the layout of parameters asks for."""

    kind: str
    axis: str
    bytes: int
    """Of the whole array on one device."""
    times: int


@dataclass
class Estimate:
    """Of one device and one step."""

    flops: int = 0
    """Of the matrix products that are computed, recomputation included."""
    traffic: int = 0
    """Bytes between memory and arithmetic units."""
    peak: list[tuple[Value, int]] = field(default_factory=list)
    """Arrays alive where most is taken, with their bytes; arguments are not among them."""
    exchanges: list[Exchange] = field(default_factory=list)
    looked_up: Counter[int] = field(default_factory=Counter)
    """Arguments of the step of which single rows are read, and how often."""
    multiplied: set[int] = field(default_factory=set)
    """Arguments of the step that are factors of products."""
    chunked: set[int] = field(default_factory=set)
    """Arguments of both kinds, multiplied in a loop within what looks their rows up."""

    @property
    def bytes(self) -> int:
        """Bytes at the peak."""
        return sum(size for _, size in self.peak)


def estimate(program: Trace, sizes: Mapping[str, int], gathered: frozenset[str], *, tpu: bool = True) -> Estimate:
    """Add up a traced step on a mesh of these sizes.

    Args:
        program: the step on the rows of one device.
        sizes: of the axes of the mesh.
        gathered: axes over which parameters are put together before they are used.
        tpu: whether sums are taken while their summands are computed; a GPU's kernels read them from memory.
    """
    return _Reader(sizes, gathered, tpu).read(program, set(), top=True)


@dataclass
class _Reader:
    sizes: Mapping[str, int]
    gathered: frozenset[str]
    tpu: bool

    def read(self, program: Trace, free: set[Value], *, top: bool) -> Estimate:
        """Walk once; `free` are values that take no memory of their own."""
        result = Estimate()
        free = free | set(program.inputs)
        last: dict[Value, int] = {}
        for at, operation in enumerate(program.operations):
            for value in operation.inputs:
                last |= dict.fromkeys(value.roots, at)
        for value in program.outputs:
            last |= dict.fromkeys(value.roots, len(program.operations))
        alive: dict[Value, int] = {}
        together: Counter[tuple[frozenset[Value], str, bool]] = Counter()
        most = -1
        for at, operation in enumerate(program.operations):
            inside: list[tuple[Value, int]] = []
            if operation.body is not None:
                inside = self._loop(operation, result)
            else:
                if operation.name == "gather":
                    result.looked_up.update(operation.inputs[0].made_of())
                elif operation.name == "dot_general":
                    result.multiplied |= frozenset[int]().union(*(value.made_of() for value in operation.inputs))
                result.flops += self._products(operation)
                result.traffic += self._moved(operation)
                inside = self._exchanged(operation, result, together)
            for value in operation.outputs:
                if value not in free and last.get(value, -1) > at:
                    alive[value] = value.bytes(self.sizes)
                elif value not in free:
                    inside.append((value, value.bytes(self.sizes)))
            now = sum(alive.values()) + sum(size for _, size in inside)
            if now > most:
                most, result.peak = now, [*alive.items(), *inside]
            for value in [v for v in alive if last[v] <= at]:
                del alive[value]
        if top:
            for value in program.outputs:
                result.traffic += value.bytes(self.sizes) + sum(root.bytes(self.sizes) for root in value.roots)
        return result

    def _loop(self, operation: Operation, result: Estimate) -> list[tuple[Value, int]]:
        assert operation.body is not None
        # What a turn stacks is written into its place at once.
        stacked = {value for value in operation.body.outputs[operation.carried :] if value.roots == {value}}
        one = self.read(operation.body, stacked, top=False)
        result.flops += operation.turns * one.flops
        result.traffic += operation.turns * one.traffic
        result.exchanges += [Exchange(e.kind, e.axis, e.bytes, e.times * operation.turns) for e in one.exchanges]
        result.chunked |= one.chunked | (one.multiplied & result.looked_up.keys())
        result.looked_up += one.looked_up
        result.multiplied |= one.multiplied
        return one.peak

    def _products(self, operation: Operation) -> int:
        if operation.name == "pallas_call":
            if cost := operation.parameters["cost_estimate"]:  # the kernel says it itself
                return int(cost.flops) // self._parts(operation)
            # With the blocks that it leaves out, as plain attention is computed.
            turns = math.prod(operation.parameters["grid_mapping"].grid)
            return turns * _inside(operation.parameters["jaxpr"]) // self._parts(operation)
        if operation.name == "cond":
            most = max(_inside(branch.jaxpr) for branch in operation.parameters["branches"])
            return most // self._parts(operation)
        if operation.name == "ragged_dot_general":  # each row of the first meets the matrix of its run
            first, made = operation.inputs[0], operation.outputs[0]
            return 2 * math.prod(first.shape) * made.shape[-1] // self._parts(operation)
        if operation.name != "dot_general":
            return 0
        (summed, _), _ = operation.parameters["dimension_numbers"]
        summands = math.prod(operation.inputs[0].shape[d] for d in summed)
        return 2 * math.prod(operation.outputs[0].shape) * summands // self._parts(operation)

    def _parts(self, operation: Operation) -> int:
        """Return among how many devices an operation is divided by the layout of what it takes."""
        axes = {axis for value in operation.inputs for _, axis in value.layout if axis not in self.gathered}
        return math.prod(self.sizes[axis] for axis in axes)

    def _moved(self, operation: Operation) -> int:
        """Bytes that an operation reads and writes: of an array that is only sliced or updated in place, the slice."""
        taken, made = operation.inputs, sum(value.bytes(self.sizes) for value in operation.outputs)
        if operation.name == "psum":
            return 0
        if operation.name == "gather":
            return 2 * made
        if self.tpu and operation.name.startswith("reduce_"):
            return made
        if operation.name == "dynamic_update_slice":
            taken, made = taken[1:2], taken[1].bytes(self.sizes)
        read: dict[Value, int] = {}
        for value in taken:
            for root in value.roots:
                part = value.bytes(self.sizes) * root.itemsize // value.itemsize
                read[root] = max(read.get(root, 0), min(part, root.bytes(self.sizes)))
        return made + sum(read.values())

    def _exchanged(
        self, operation: Operation, result: Estimate, together: Counter[tuple[frozenset[Value], str, bool]]
    ) -> list[tuple[Value, int]]:
        """Record the collectives that an operation needs; return what they put together, which takes memory.

        What a pass has put `together` (elements of which arrays) serves all its products, those of the recomputation
        among them.
        """
        whole: list[tuple[Value, int]] = []
        size = sum(value.bytes(self.sizes) for value in operation.inputs)
        if operation.name == "ppermute":
            axis = operation.parameters["axis_name"]  # one, in a tuple or not
            axis = axis if isinstance(axis, str) else axis[0]
            result.exchanges.append(Exchange("collective-permute", axis, size, 1))
        if operation.name == "psum":
            axes = (axis for axis in operation.parameters["axes"] if self.sizes[axis] > 1)
            result.exchanges += [Exchange("all-reduce", axis, size, 1) for axis in axes]
        if operation.name == "dot_general":
            for value in operation.inputs:
                for _, axis in value.layout:
                    if axis == EXPERT:
                        continue  # tokens travel, experts stay: as many products, and nothing is put together
                    if axis in self.gathered and self.sizes[axis] > 1:
                        size = value.bytes(self.sizes) * self.sizes[axis]
                        whole.append((value, size))
                        gathered = value.roots, axis, operation.outputs[0].backward
                        if together[gathered] < sum(math.prod(root.shape) for root in value.roots):
                            together[gathered] += math.prod(value.shape)
                            result.exchanges.append(Exchange("all-gather", axis, size, 1))
        for axis in _summed(operation):
            if axis not in self.gathered and self.sizes[axis] > 1:
                size = sum(value.bytes(self.sizes) for value in operation.outputs)
                result.exchanges.append(Exchange("all-reduce", axis, size, 1))
        return whole


def _inside(jaxpr: core.Jaxpr) -> int:
    """Count the FLOPs of the products in the body of a kernel or a branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            made: Any = equation.outvars[0].aval
            total += 2 * math.prod(made.shape) * math.prod(left.shape[d] for d in summed)
        elif equation.primitive.name == "cond":
            total += max(_inside(branch.jaxpr) for branch in equation.params["branches"])
        elif inner := equation.params.get("jaxpr"):
            total += equation.params.get("length", 1) * _inside(getattr(inner, "jaxpr", inner))
    return total


def _summed(operation: Operation) -> set[str]:
    """Axes over which an operation adds up (or compares) parts of different devices."""
    if operation.name.startswith(("reduce_", "arg")):
        over = [(operation.inputs[0], operation.parameters.get("axes", ()))]
    else:
        return set()
    return {axis for value, dims in over for d, axis in value.layout if d in dims}
