"""Where the time of a step goes: a trace for xprof or TensorBoard, and the operations that take longest."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from transformer_jax.bench.batches import length_of, random_batch, rows_of, shapes_of
from transformer_jax.bench.compiled import compile_step
from transformer_jax.bench.train import Watch, checked
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.planning.hlo import Frame, Instruction, Program, parse
from transformer_jax.provenance import provenance

CALLS = ("while", "call", "conditional")
"""What only runs others, whose time is theirs."""
CALLERS = ("Verb", "Trainer")
"""Classes that a step is called by."""


def profile(experiment: Experiment, folder: Path, steps: int = 5) -> dict[str, Any]:
    """Trace some steps on a random batch, and add up the time of every operation of the compiled program.

    Args:
        experiment: what to run.
        folder: where the trace goes (`plugins/profile/...`, as xprof and TensorBoard look for it).
        steps: traced, after two that are not.

    Returns:
        JSON-able, both longest first: parts of the model with milliseconds a step, forward and backward, and operations
        with milliseconds and calls a step; where they come from in JAX and in Python.

    Raises:
        UserError: bad input, or a trace that names no operation of the step.
    """
    if steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}.")
    trainer, shapes = checked(experiment), shapes_of(experiment)
    compiled = compile_step(trainer, experiment.data.batch_shapes(), warm=False)
    batch, state = trainer.put(random_batch(experiment)), trainer.init()
    watch, options = Watch(trainer, state), jax.profiler.ProfileOptions()
    options.python_tracer_level = 0

    def run(state: Any) -> Any:
        state, metrics = compiled.call(state, batch)
        watch.see(metrics)
        return jax.block_until_ready(state)

    for _ in range(2):
        state = run(state)
    with jax.profiler.trace(str(folder), profiler_options=options):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state = run(state)
    watch.check(state)
    file = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    program = parse(compiled.call.as_text() or "")
    known = {name: it for computation in program.computations.values() for name, it in computation.items()}
    nanoseconds, calls = _added_up(file, known)
    if not nanoseconds:
        raise UserError(f"the trace {file} names no operation of the step; open it with xprof.")
    total = sum(nanoseconds.values())
    return {
        "what": "profile",
        "experiment": experiment.name,
        "setup": trainer.describe(),
        "rows": rows_of(shapes),
        "length": length_of(shapes),
        "steps": steps,
        "trace": str(file),
        "busy_milliseconds": total / steps / 1e6,
        "parts": _parts({name: (known[name], spent / steps / 1e6) for name, spent in nanoseconds.items()}, program),
        "operations": [
            {
                "name": name,
                "source": _short(known[name].source),
                "where": _where(program.stack(known[name])),
                "milliseconds": spent / steps / 1e6,
                "share": spent / total,
                "calls": calls[name] / steps,
            }
            for name, spent in nanoseconds.most_common()
        ],
        "hlo": compiled.hlo,
        "provenance": provenance(),
    }


def _added_up(file: Path, known: dict[str, Instruction]) -> tuple[Counter[str], Counter[str]]:
    """Add up nanoseconds and calls of the instructions of a program, over all threads, streams and cores."""
    nanoseconds, calls = Counter[str](), Counter[str]()
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op", event.name if line.name == "XLA Ops" else "")
                name = str(name).lstrip("%").split(" ")[0]
                if name in known and known[name].opcode not in CALLS and not event.name.startswith("end: "):
                    nanoseconds[name] += int(event.duration_ns)
                    calls[name] += 1
    return nanoseconds, calls


def _parts(spent: dict[str, tuple[Instruction, float]], program: Program) -> list[dict[str, Any]]:
    """Add up milliseconds by the part of the model that they are for."""
    parts: dict[str, dict[str, Any]] = {}
    total = sum(milliseconds for _, milliseconds in spent.values())
    for instruction, milliseconds in spent.values():
        name = _part(program.stack(instruction))
        part = parts.setdefault(name, {"part": name, "milliseconds": 0.0, "forward": 0.0, "backward": 0.0})
        part["milliseconds"] += milliseconds
        part["backward" if "transpose(" in instruction.source else "forward"] += milliseconds
    found = sorted(parts.values(), key=lambda part: -part["milliseconds"])
    return [part | {"share": part["milliseconds"] / total} for part in found]


def _part(stack: list[Frame]) -> str:
    """Name what a line of Python is for: its module in the one around it ("FeedForward > Linear"), or its package."""
    if not stack:
        return "(XLA does not say)"
    _, installed, path = stack[-1].file.rpartition("site-packages/")
    if installed and not path.startswith("transformer_jax/"):
        return path.partition("/")[0]
    classes = [frame.function.split(".")[0] for frame in stack if frame.function[:1].isupper()]
    modules = [name for name, _ in itertools.groupby(classes) if name not in CALLERS]
    return " > ".join(modules[-2:]) or stack[-1].function


def _where(stack: list[Frame]) -> str:
    """Write the innermost function with its file and line."""
    if not stack:
        return ""
    file = Path(stack[-1].file)
    return f"{file.parent.name}/{file.name}:{stack[-1].line} {stack[-1].function.split('.<locals>')[0]}"


def _short(source: str) -> str:
    """Leave out what every name begins with."""
    return source.removeprefix("jit(train_step)/")
