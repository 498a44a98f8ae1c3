"""Bytes that a compiled step moves between a device's memory and its arithmetic units."""

from __future__ import annotations

from collections.abc import Iterable

from transformer_jax.planning.hlo import Array, Instruction, Program

NOTHING = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota"),
        *("after-all", "partition-id", "replica-id", "optimization-barrier", "copy-done", "slice-done", "async-done"),
        *("async-update", "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done"),
        "rng-get-and-update-state",
    )
)
"""Instructions that move no data themselves."""


def memory_traffic(program: Program) -> int:
    """Sum the bytes that one device reads from and writes to main memory in a step.

    Kernels read their operands and write their results; of an array that is only sliced or updated in place, the
    slice. What a TPU keeps in its fast memory costs nothing.
    """
    total = 0
    for name, instruction, times in program.walk():
        if name not in program.fused and instruction.opcode not in NOTHING:
            total += times * _moved(program, program.computations[name], instruction)
    return total


def _moved(program: Program, computation: dict[str, Instruction], instruction: Instruction) -> int:
    operands = [computation[name] for name in instruction.operands if name in computation]
    match instruction.opcode:
        case "custom-call" if "AllocateBuffer" in instruction.attributes:
            return 0
        case "copy-start" | "slice-start":
            to = instruction.arrays[0]
            return _main(operands[0].arrays, to.bytes) + _main([to])
        case "send" | "recv":  # the operand or the result, once
            return _main(instruction.arrays)
        case "dynamic-slice" | "slice" | "gather":
            return 2 * _main(instruction.arrays)
        case "dynamic-update-slice" | "scatter":
            return 2 * _main(operands[-1 if instruction.opcode == "scatter" else 1].arrays)
        case "fusion":
            kernel = instruction.attribute("calls")
            return _read(program, kernel, operands) + _written(program.computations[kernel], instruction)
    return sum(_main(operand.arrays) for operand in operands) + _main(instruction.arrays)


def _main(arrays: Iterable[Array], most: int | None = None) -> int:
    """Bytes that lie in main memory, of at most `most`."""
    found = sum(array.bytes for array in arrays if array.in_memory)
    return found if most is None else min(found, most)


def _read(program: Program, kernel: str, operands: list[Instruction]) -> int:
    """Bytes that a kernel reads of its operands."""
    total = 0
    for number, operand in enumerate(operands):
        parts = _parts(program, kernel, _parameter(program, kernel, number))
        total += _main(operand.arrays, parts)
    return total


def _parameter(program: Program, kernel: str, number: int) -> str:
    found = (i for i in program.computations[kernel].values() if i.opcode == "parameter")
    return next(i.name for i in found if i.operands == (str(number),))


def _parts(program: Program, kernel: str, name: str) -> int | None:
    """Bytes read of the value `name`, if nothing but slices of it is read (or it is updated in place); else None."""
    total = 0
    for user in program.computations[kernel].values():
        for place, operand in enumerate(user.operands):
            if operand != name or user.opcode == "parameter":
                continue
            part: int | None
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                part = _size(user)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                part = 0
            elif user.opcode == "bitcast" and not user.root:
                part = _parts(program, kernel, user.name)
            elif user.opcode == "fusion":
                inner = user.attribute("calls")
                part = _parts(program, inner, _parameter(program, inner, place))
            else:
                part = None
            if part is None:
                return None
            total += part
    return total


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays)


def _written(inner: dict[str, Instruction], instruction: Instruction) -> int:
    root = next(i for i in inner.values() if i.root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for array, shown in zip(instruction.arrays, results, strict=False):
        result = shown
        while result.opcode == "bitcast" and result.operands[0] in inner:
            result = inner[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            total += _main([array], _size(inner[result.operands[1]]))
        else:
            total += _main([array])
    return total
