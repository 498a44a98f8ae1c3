"""Where the time of a step goes: a trace for xprof or TensorBoard, and the operations that take longest."""

from __future__ import annotations

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
from transformer_jax.planning.hlo import Instruction, parse
from transformer_jax.provenance import provenance

CALLS = ("while", "call", "conditional")
"""What only runs others, whose time is theirs."""


def profile(experiment: Experiment, folder: Path, steps: int = 5) -> dict[str, Any]:
    """Trace some steps on a random batch, and add up the time of every operation of the compiled program.

    Args:
        experiment: what to run.
        folder: where the trace goes (`plugins/profile/...`, as xprof and TensorBoard look for it).
        steps: traced, after two that are not.

    Returns:
        JSON-able: operations with milliseconds and calls a step, longest first; where they come from in JAX.

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
        "operations": [
            {
                "name": name,
                "source": _short(known[name].source),
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


def _short(source: str) -> str:
    """Leave out what every name begins with."""
    return source.removeprefix("jit(train_step)/")
