"""Reading what XLA compiled: instructions, how often each computation runs in a step, bytes in memory.

XLA's own cost analysis counts the body of a loop once, so loops are followed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4} | {
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
"""Bytes of an element; 8-bit floats have names of their own (f8e4m3fn) and take one."""

_ARRAY = re.compile(r"\b(pred|[sufbc]\w*\d\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_TABLE = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str
    """As printed: "1,0:T(8,128)S(1)"."""

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * SIZES.get(self.dtype, 1)

    @property
    def in_memory(self) -> bool:
        """Whether it lies in the device's main memory, not in a TPU's faster memories (S(1) and on)."""
        return "S(" not in self.layout

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: a TPU fills the last dimensions up to tiles."""
        minor_to_major, _, tiles = self.layout.partition(":")
        order = [int(d) for d in minor_to_major.split(",") if d]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile or len(order) != len(self.shape):
            return self.bytes
        sizes = [self.shape[d] for d in order]
        for i, t in enumerate(reversed([int(t) for t in tile[1].split(",")])):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // t) * t
        return math.prod(sizes) * SIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the result; several for a tuple."""
        found = _ARRAY.findall(self.type)
        return tuple(Array(d, tuple(int(n) for n in dims.split(",") if n), layout) for d, dims, layout in found)

    def attribute(self, name: str) -> str:
        """Return the word after `name=`, without a leading %, or nothing."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def source(self) -> str:
        """Where it comes from in JAX: "jit(train_step)/jvp()/while/body/dot_general"."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Frame:
    """One function on the way to the line of Python that an instruction comes from."""

    function: str
    """As in Python: "Attention.__call__", "train_step.<locals>.loss"."""
    file: str
    line: int


@dataclass(frozen=True)
class Program:
    """A compiled module."""

    computations: dict[str, dict[str, Instruction]]
    """Instructions by name, in the order of the schedule."""
    entry: str
    tables: dict[str, dict[int, str]]
    """Where instructions come from: FileNames, FunctionNames, FileLocations and StackFrames by number, as printed."""

    def stack(self, instruction: Instruction) -> list[Frame]:
        """Return the functions that an instruction comes from, the innermost last; none if XLA does not say."""
        frames, number = [], int(instruction.attribute("stack_frame_id") or 0)
        while number:
            frame = _numbers(self.tables["StackFrames"][number])
            place = _numbers(self.tables["FileLocations"][frame["file_location_id"]])
            function = self.tables["FunctionNames"][place["function_name_id"]]
            frames.append(Frame(function, self.tables["FileNames"][place["file_name_id"]], place["line"]))
            number = frame["parent_frame_id"] - 1  # 1 is: none
        return frames[::-1]

    @cached_property
    def times(self) -> dict[str, int]:
        """How often a computation runs in one call: those in loops as often as the loops turn."""
        times = dict.fromkeys(self.computations, 0)

        def visit(name: str, n: int) -> None:
            times[name] += n
            for instruction in self.computations[name].values():
                turns = self.turns(instruction) if instruction.opcode == "while" else 1
                for called in _called(instruction):
                    if called in self.computations:
                        visit(called, n * turns)

        visit(self.entry, 1)
        return times

    @cached_property
    def fused(self) -> frozenset[str]:
        """Computations that are part of one kernel (fusions, reducers): nothing in them passes through memory."""
        inner = set()
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.opcode in _KERNELS:
                    inner.update(_called(instruction))
        return frozenset(inner)

    def turns(self, loop: Instruction) -> int:
        """Return how often a `while` turns: as XLA says, or the constant that its condition compares with.

        A loop whose condition has no constant (it depends on data) counts once.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        inner = [self.computations[name] for i in condition.values() for name in _called(i)]
        constants = [
            int(match[1])
            for computation in (condition, *inner)
            for i in computation.values()
            if i.opcode == "constant" and (match := re.match(r"(\d+)\)", i.attributes))
        ]
        return max(constants, default=1)

    def walk(self) -> Iterator[tuple[str, Instruction, int]]:
        """Yield (computation, instruction, how often it runs) of everything that runs."""
        for name, computation in self.computations.items():
            if n := self.times[name]:
                for instruction in computation.values():
                    yield name, instruction, n


_KERNELS = frozenset(
    (
        *("fusion", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter"),
        *("all-reduce", "all-reduce-start", "reduce-scatter"),
    )
)


def _called(instruction: Instruction) -> list[str]:
    names = _CALLED.findall(instruction.attributes)
    if branches := _BRANCHES.search(instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def parse(text: str) -> Program:
    """Read the text of a compiled module (`compiled.as_text()`)."""
    computations: dict[str, dict[str, Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables[line] = {}
        elif current is None and (match := _TABLE.match(line)):
            table[int(match[1])] = match[2] or match[3] or ""
        if not line.startswith(" "):
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current is not None:
            type_, rest = _after_type(match[3])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _until_closed(rest)
            if opcode == "constant":  # its value stands where operands do
                operands, attributes = "", f"{operands}){attributes}"
            names = tuple(part.split()[-1].lstrip("%") for part in _split(operands))
            current[match[2]] = Instruction(match[2], type_, opcode, names, attributes, bool(match[1]))
    return Program(computations, entry, tables)


def _numbers(fields: str) -> dict[str, int]:
    """Read "file_location_id=2 parent_frame_id=1"."""
    return {name: int(number) for name, number in (field.split("=") for field in fields.split())}


def _after_type(text: str) -> tuple[str, str]:
    """Split "(f32[2]{0}, s32[]) while(...)" into the type and what follows."""
    if text.startswith("("):
        inside, rest = _until_closed(text[1:])
        return f"({inside})", rest.lstrip()
    type_, _, rest = text.partition(" ")
    return type_, rest


def _until_closed(text: str) -> tuple[str, str]:
    """Split after an opening parenthesis into what stands before the one that closes it, and the rest."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    return text, ""


def _split(operands: str) -> list[str]:
    """Split at the commas that are in no bracket, and leave out comments."""
    operands = re.sub(r"/\*.*?\*/", "", operands)
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += c in "([{"
        depth -= c in ")]}"
        if c == "," and not depth:
            parts.append(operands[start:i])
            start = i + 1
    return [part for part in (*parts, operands[start:]) if part.strip()]
