"""The same training step here and in PyTorch: same run, same device, turn by turn, ratios of minima and medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from transformer_jax.bench.batches import Batch, length_of, random_batch, rows_of, shapes_of
from transformer_jax.bench.ceilings import busy
from transformer_jax.bench.compare import ratio
from transformer_jax.bench.compiled import compile_step
from transformer_jax.bench.timing import Timing
from transformer_jax.bench.train import Watch, checked
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import parameter_count
from transformer_jax.provenance import provenance

SCRIPT = Path(__file__).parent / "pytorch" / "peer.py"
TURN = 3
"""Steps of a turn; the first one of each does not count: the other side has just emptied the caches."""
APART = 0.01
"""Share by which parameter counts may differ; more is another model."""


@dataclass(frozen=True)
class Contender:
    """One side: takes steps when asked."""

    name: str
    take: Callable[[int], dict[str, Any]]
    """N -> {"seconds", "cpu": of each step, "loss"}."""
    facts: dict[str, Any]


def bench_peers(
    experiment: Experiment, variants: Sequence[str], python: str = "", budget: float = 60.0
) -> dict[str, Any]:
    """Time our step and PyTorch's by turns, on the same random batch.

    Args:
        experiment: a GPT-2 or a BERT that is pre-trained.
        variants: of PyTorch: "eager", "compile", "compile-cudnn" (its attention; GPUs).
        python: interpreter that has torch; "" is this one.
        budget: seconds of all turns together, compiling not counted.

    Raises:
        UserError: a model for which there is no peer, no PyTorch, or a peer that is another model.
    """
    # Both sides live on one device: JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if disturbed := busy():
        say(f"warning: {disturbed}, PyTorch's the more, whose idle threads spin")
    batch = random_batch(experiment)
    spec, python = specification(experiment, batch), python or sys.executable
    _require(python, spec["kind"])
    ours = _ours(experiment, batch)
    children: list[subprocess.Popen[str]] = []
    contenders, failed = [ours], {}
    with tempfile.TemporaryFile("w+") as log:
        try:
            for variant in variants:
                say(f"starting PyTorch, {variant}")
                child = _start(python, spec | {"variant": variant}, log)
                children.append(child)
                contender = _contender(f"PyTorch {variant}", child)
                if contender is None:
                    failed[variant] = _last_line(log)
                    say(f"PyTorch {variant} failed: {failed[variant]}")
                    continue
                _same_model(ours, contender)
                contenders.append(contender)
            if len(contenders) == 1:
                raise UserError(f"no peer could be run: {'; '.join(failed.values())}.")
            times, cpu = _by_turns(contenders, budget)
        finally:
            for child in children:
                child.kill()
                child.communicate()  # closes its pipes
    return _result(experiment, contenders, times, cpu, failed) | {"disturbed": disturbed}


def _by_turns(contenders: list[Contender], budget: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    began, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - began < budget:
        # Each turn begins with another one, so that none always follows the same.
        for i in range(len(contenders)):
            contender = contenders[(i + turns) % len(contenders)]
            taken = contender.take(TURN)
            times[contender.name] += taken["seconds"][1:]
            cpu[contender.name] += taken["cpu"][1:]
        turns += 1
    return times, cpu


def _result(
    experiment: Experiment,
    contenders: list[Contender],
    times: dict[str, list[float]],
    cpu: dict[str, list[float]],
    failed: dict[str, str],
) -> dict[str, Any]:
    shapes = shapes_of(experiment)
    tokens = rows_of(shapes) * length_of(shapes)
    ours, *peers = [contender.name for contender in contenders]
    return {
        "what": "peers",
        "experiment": experiment.name,
        "rows": rows_of(shapes),
        "length": length_of(shapes),
        "contenders": {
            contender.name: {
                "step_seconds": Timing(tuple(times[contender.name])).figures(),
                "cpu_seconds": Timing(tuple(cpu[contender.name])).figures(),
                "tokens_per_second": tokens / float(np.median(times[contender.name])),
                "best_tokens_per_second": tokens / min(times[contender.name]),
                **contender.facts,
            }
            for contender in contenders
        },
        # Above 1: we are faster.
        "ratios": {
            name: {
                "minima": min(times[name]) / min(times[ours]),
                "cpu_minima": min(cpu[name]) / min(cpu[ours]),
                **ratio(times[ours], times[name]),
            }
            for name in peers
        },
        "failed": failed,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "config": json.loads(experiment.to_json()),
        "provenance": provenance(),
    }


def specification(experiment: Experiment, batch: Batch) -> dict[str, Any]:
    """Say what PyTorch shall build; raises `UserError` for a model that the script does not know."""
    model, optim = experiment.model, experiment.optim
    names: tuple[str, ...]
    extra: dict[str, Any]
    match model:
        case GPTConfig() if (
            (model.positions, model.norm, model.activation, model.gated) == ("learned", "layernorm", "gelu_tanh", False)
            and model.pre_norm
            and model.tied
            and model.task == "lm"
            and not (model.qk_norm or model.windows or model.kv_heads or model.head_size)
        ):
            kind, names, extra = "gpt", ("tokens", "targets"), {"bias": model.bias}
        case BertConfig(task="pretrain", activation="gelu"):
            kind, names = "bert", ("tokens", "types", "positions_masked", "targets", "next")
            extra = {"types": model.types}
        case _:
            raise UserError(f"{experiment.name}: there are PyTorch peers of GPT-2 and of BERT's pre-training only.")
    if experiment.optim.kind != "adam":
        raise UserError(f"optim.kind={optim.kind}: the PyTorch peers train with AdamW; add --optim.kind adam.")
    return {
        "kind": kind,
        "vocab_size": model.vocab_size,
        "context": model.context,
        "width": model.width,
        "layers": model.layers,
        "heads": model.heads,
        "feedforward": model.block.feedforward,
        "dropout": model.dropout,
        **extra,
        "dtype": experiment.compute.dtype,
        "rate": 1e-4,
        "weight_decay": optim.weight_decay,
        "clip_norm": optim.clip_norm,
        "device": jax.default_backend(),
        "batch": {name: batch[name].tolist() for name in names},
    }


def _require(python: str, kind: str) -> None:
    needed = "torch" if kind == "gpt" else "torch, transformers"
    try:
        found = subprocess.run([python, "-c", f"import {needed}"], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}.") from error
    if not found:
        raise UserError(
            f"the peers need {needed.replace(',', ' and')}: pip install 'transformer_jax[peers]', or name another "
            "interpreter that has them by --python."
        )


def _ours(experiment: Experiment, batch: Batch) -> Contender:
    trainer = checked(experiment)
    compiled = compile_step(trainer, experiment.data.batch_shapes(), warm=False)
    state, placed = trainer.init(), trainer.put(batch)
    watch, losses = Watch(trainer, state), list[float]()

    def take(n: int) -> dict[str, Any]:
        nonlocal state
        seconds, cpu = [], []
        for _ in range(n):
            start, busy = time.perf_counter(), time.process_time()
            state, metrics = compiled.call(state, placed)
            jax.block_until_ready(state)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
            watch.see(metrics)
        watch.check(state)
        return {"seconds": seconds, "cpu": cpu, "loss": losses[-1]}

    start = time.perf_counter()
    take(TURN)
    first = compiled.trace_seconds + compiled.cold_seconds + time.perf_counter() - start
    facts = {"parameters": parameter_count(trainer.skeleton.abstract), "loss": losses[0], "first_seconds": first}
    return Contender(
        "transformer_jax", take, facts | {"setup": trainer.describe(), "compute": asdict(experiment.compute)}
    )


def _start(python: str, spec: dict[str, Any], log: IO[str]) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [python, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(spec) + "\n")
    child.stdin.flush()
    return child


def _contender(name: str, child: subprocess.Popen[str]) -> Contender | None:
    """Wait until a child is ready; None if it died."""
    ask, answer = child.stdin, child.stdout
    assert ask is not None
    assert answer is not None
    line = answer.readline()
    if not line:
        child.wait()
        return None

    def take(n: int) -> dict[str, Any]:
        ask.write(f"{n}\n")
        ask.flush()
        told = answer.readline()
        if not told:
            raise UserError(f"{name} ended in the middle of a run: out of memory?")
        found: dict[str, Any] = json.loads(told)
        return found

    take(TURN)
    return Contender(name, take, json.loads(line))


def _same_model(ours: Contender, peer: Contender) -> None:
    mine, theirs = (side.facts["parameters"] for side in (ours, peer))
    if abs(mine / theirs - 1) > APART:
        raise UserError(f"{peer.name} has {theirs:,} parameters, ours {mine:,}: this is not the same work.")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    log.seek(0, os.SEEK_END)
    return lines[-1][:300] if lines else "it said nothing"
