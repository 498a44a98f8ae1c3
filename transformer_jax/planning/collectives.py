"""The collectives of a compiled step: kind, bytes, how often, along which axes of the mesh, hidden or waited for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from transformer_jax.planning.hlo import Instruction, Program

Groups = np.ndarray[Any, np.dtype[np.int64]]
"""[groups, devices of each]: numbers of devices in the order of the mesh."""

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

SENT = {"one-to-one": "collective-permute"}
"""What libtpu calls the exchanges of slices, where the name differs."""

WORK = frozenset(("fusion", "dot", "convolution", "while", "call", "custom-call", "sort", "scatter"))
"""What a device can do while it waits for a collective."""


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    bytes: int
    """Of the whole array on one device: what a gather gives, what a reduction takes."""
    times: int
    """How often it runs in a step."""
    groups: Groups
    overlapped: bool
    """Whether the device computes meanwhile, as far as the schedule shows."""
    source: str
    """The JAX operation it comes from."""

    def parts(self, slices: int) -> Iterator[Collective]:
        """Split a reduction that spans slices, as it is done: within them, between them, and within them again."""
        members = self.groups.shape[1] // slices
        if self.kind != "all-reduce" or slices == 1 or members == 1:
            yield self
            return
        apart = self.groups.reshape(-1, slices, members)
        within, between = apart.reshape(-1, members), apart.transpose(0, 2, 1).reshape(-1, slices)
        yield replace(self, kind="reduce-scatter", groups=within)
        yield replace(self, bytes=self.bytes // members, groups=between)
        yield replace(self, kind="all-gather", groups=within)

    def axes(self, mesh: Mesh) -> str:
        """Name the axes of the mesh along which devices differ: "fsdp", "data+fsdp"."""
        sizes = list(mesh.shape.values())
        places = np.stack(np.unravel_index(self.groups, sizes))
        moving = (places != places[..., :1]).any(axis=(1, 2))
        return "+".join(axis for axis, moves in zip(mesh.shape, moving, strict=True) if moves)


def collectives(program: Program, devices: int, slices: int = 1) -> list[Collective]:
    """List the collectives of a program for so many devices in all; those among one device only are none.

    A program is that of one slice; what slices send each other goes through the hosts.
    """
    found = []
    seen: set[tuple[str, str]] = set()
    hidden = _asynchronous(program)
    devices //= slices
    for name, instruction, times in program.walk():
        if instruction.opcode == "send" and "megascale" in instruction.attributes:
            found.append(_between(program, name, instruction, times, np.arange(slices * devices).reshape(slices, -1).T))
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            # A TPU spreads one collective over several fusions; each of them shows it, with the same channel.
            channel = instruction.attribute("channel_id"), chain[1]
            if channel in seen:
                continue
            seen.add(channel)
        groups = replica_groups(instruction.attributes, devices)
        if groups.size == 0 or groups.shape[1] == 1:
            continue
        if name.startswith("all-reduce-scatter"):  # how a TPU writes a reduce-scatter
            kind = "reduce-scatter"
        found.append(
            Collective(
                kind=kind,
                bytes=_bytes(program, name, instruction, kind, groups.shape[1]),
                times=times,
                groups=groups,
                overlapped=bool(chain) or name in hidden or _covered(program, name, instruction, instruction.name),
                source=instruction.source,
            )
        )
    return found


def _between(program: Program, computation: str, send: Instruction, times: int, groups: Groups) -> Collective:
    """Read what slices send each other; the answer comes with the same word."""
    told = dict(re.findall(r'\b_xla_(\w+)="([^"]*)"', send.attributes))
    word, kind = told["host_transfer_rendezvous"], told["megascale_transfer_type"].lower().replace("_", "-")
    kind = SENT.get(kind, kind)
    answers = (i for i in program.computations[computation].values() if i.opcode == "recv")
    answer = next((i.name for i in answers if f'"{word}"' in i.attributes), send.name)
    size = send.arrays[0].bytes * (groups.shape[1] if kind == "all-gather" else 1)
    return Collective(kind, size, times, groups, _covered(program, computation, send, answer), word)


def _bytes(program: Program, computation: str, instruction: Instruction, kind: str, size: int) -> int:
    operands = [program.computations[computation].get(name) for name in instruction.operands]
    taken = sum(array.bytes for operand in operands if operand is not None for array in operand.arrays)
    return taken * size if kind == "all-gather" else taken


def _asynchronous(program: Program) -> frozenset[str]:
    """Computations that run beside others (`async-start`)."""
    started = (i for _, i, _ in program.walk() if i.opcode == "async-start")
    return frozenset(i.attribute("calls") for i in started)


def _covered(program: Program, computation: str, start: Instruction, awaited: str) -> bool:
    """Tell whether there is work between the start of a collective and the end of what is awaited."""
    if start.opcode != "send" and not start.opcode.endswith("-start"):
        return False
    inside = False
    for instruction in program.computations[computation].values():
        if instruction is start:
            inside = True
        elif inside and awaited in instruction.operands and instruction.opcode.endswith("-done"):
            return False
        elif inside and instruction.opcode in WORK:
            return True
    return False


def replica_groups(attributes: str, devices: int) -> Groups:
    """Read which devices talk to each other, in any of XLA's notations.

    {{0,2},{1,3}} lists them; [2,4]<=[4,2]T(1,0) is 0 ... n - 1 reshaped, transposed and reshaped again; and
    mesh['a'=4,'b'=2] {'a'} names axes of a mesh. A permutation lists pairs; what stays on its device is none.
    """
    if pairs := re.search(r"source_target_pairs=\{([^=]*)\}", attributes):
        sent = _listed(pairs[1]).reshape(-1, 2)
        return sent[sent[:, 0] != sent[:, 1]]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        sizes = [int(size) for size in axes.values()]
        ids = _iota(named[2], devices) if named[2] else np.arange(devices)
        chosen = [list(axes).index(axis) for axis in re.findall(r"'(\w+)'", named[3])]
        moved = np.moveaxis(ids.reshape(sizes), chosen, range(-len(chosen), 0))
        return moved.reshape(-1, math.prod(sizes[i] for i in chosen))
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]*\](?:T\([\d,]*\))?)", attributes):
        return _iota(short[3], devices).reshape(int(short[1]), int(short[2]))
    listed = re.search(r"replica_groups=\{(.*?)\}(?:,|$|\s)(?!\{)", attributes)
    groups = _listed(listed[1]) if listed and "{" in listed[1] else np.zeros((0, 0), np.int64)
    return groups if groups.size else np.arange(devices)[None]


def _iota(text: str, devices: int) -> Groups:
    """[4,2]T(1,0): the numbers 0 ... devices - 1 in this shape, transposed."""
    shape, _, order = text.partition("T")
    ids = np.arange(devices).reshape([int(n) for n in re.findall(r"\d+", shape)])
    return ids.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else ids


def _listed(text: str) -> Groups:
    groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.asarray(groups, np.int64)
