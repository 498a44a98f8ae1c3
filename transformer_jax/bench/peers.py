"""The same work here and in PyTorch: same run, same device, turn by turn, ratios of minima and medians.

The work is a training step, or reading prompts and writing after them. Both sides have the same parameters, and before
any time is taken they must agree on the loss, or have written the same tokens where they compute in float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from transformer_jax.bench import peer_ours as ours_side
from transformer_jax.bench.batches import length_of, random_batch, rows_of, shapes_of
from transformer_jax.bench.ceilings import busy
from transformer_jax.bench.compare import ratio
from transformer_jax.bench.decode import Prompted
from transformer_jax.bench.peer_ours import TURN, Contender
from transformer_jax.bench.peer_spec import NEEDED, Variant, training, variants_of, writing
from transformer_jax.bench.run import exhausted
from transformer_jax.bench.timing import Timing
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.provenance import provenance

SCRIPT = Path(__file__).parent / "pytorch" / "peer.py"
APART = {"float32": 1e-4, "bfloat16": 5e-3}
"""Share by which the losses of equal parameters may differ."""
ALIKE = 0.95
"""Least share of equal tokens in float32: after one that is a matter of rounding, a row goes its own way."""


def bench_peers(
    experiment: Experiment,
    variants: Sequence[Variant] = (),
    python: str = "",
    budget: float = 60.0,
    prompted: Prompted | None = None,
) -> dict[str, Any]:
    """Time us and PyTorch by turns, on the same random batch or prompts.

    Args:
        experiment: a GPT-2, a BERT that is pre-trained, or a Transformer that translates.
        variants: ways that PyTorch does it (`peer_spec.VARIANTS`); by default all that this device can.
        python: interpreter that has torch; "" is this one.
        budget: seconds of all turns together, compiling not counted.
        prompted: what to write; None trains.

    Raises:
        UserError: a model for which there is no peer, no PyTorch, or a peer that does other work.
    """
    # Both sides live on one device: JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    variants, python = variants_of("decode" if prompted else "train", variants), python or sys.executable
    rows = rows_of(shapes_of(experiment))
    if prompted:
        spec = writing(experiment, rows, prompted)
        ours = partial(ours_side.writer, experiment, rows, prompted)
    else:
        batch = random_batch(experiment, padded=True)
        spec, ours = training(experiment, batch), partial(ours_side.trainer, experiment, batch)
    _require(python, spec["kind"])
    if disturbed := busy():
        say(f"warning: {disturbed}, PyTorch's the more, whose idle threads spin")
    children: list[subprocess.Popen[str]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tjax-peers-") as folder, tempfile.TemporaryFile("w+") as log:
        weights = Path(folder) / "weights.safetensors"
        try:
            contenders = [ours(weights)]
            for variant in variants:
                say(f"starting PyTorch, {variant}")
                child = _start(python, spec | {"variant": variant, "weights": str(weights)}, log)
                children.append(child)
                contender = _contender(f"PyTorch {variant}", child)
                if contender is None:
                    failed[variant] = _last_line(log)
                    say(f"PyTorch {variant} failed: {failed[variant]}")
                    continue
                _same_work(contenders[0], contender, experiment.compute.dtype)
                contenders.append(contender)
            if len(contenders) == 1:
                raise UserError(f"no peer could be run: {'; '.join(failed.values())}.")
            times, cpu = _by_turns(contenders, budget)
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            beside = " beside PyTorch" if children else ""
            raise UserError(f"{rows} rows do not fit in memory{beside}; give a smaller --batch.") from error
        finally:
            for child in children:
                child.kill()
                child.communicate()  # closes its pipes
    return {
        "what": "peers",
        "work": "decode" if prompted else "train",
        "experiment": experiment.name,
        "rows": rows,
        "length": prompted.prompt if prompted else length_of(shapes_of(experiment)),
        "new": prompted.new if prompted else None,
        **_result(contenders, times, cpu),
        "failed": failed,
        "disturbed": disturbed,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "config": json.loads(experiment.to_json()),
        "provenance": provenance(),
    }


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


def _result(contenders: list[Contender], times: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    ours, *peers = [contender.name for contender in contenders]
    tokens = contenders[0].facts["tokens"]
    # Above 1: we are faster.
    ratios = {
        name: {
            "minima": min(times[name]) / min(times[ours]),
            "cpu_minima": min(cpu[name]) / min(cpu[ours]),
            **ratio(times[ours], times[name]),
        }
        for name in peers
    }
    return {
        "contenders": {
            contender.name: {
                "step_seconds": Timing(tuple(times[contender.name])).figures(),
                "cpu_seconds": Timing(tuple(cpu[contender.name])).figures(),
                "tokens_per_second": tokens / float(np.median(times[contender.name])),
                "best_tokens_per_second": tokens / min(times[contender.name]),
                **{name: fact for name, fact in contender.facts.items() if name != "written"},
            }
            for contender in contenders
        },
        "ratios": ratios,
        "best": {by: min(peers, key=lambda name: ratios[name][by]) for by in ("minima", "medians", "cpu_minima")},
    }


def _require(python: str, kind: str) -> None:
    needed = NEEDED[kind]
    try:
        done = subprocess.run([python, "-c", f"import {', '.join(needed)}"], capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}.") from error
    if done.returncode:
        raise UserError(
            f"the peers need {' and '.join(needed)}: pip install 'transformer_jax[peers]', or name another interpreter "
            "that has them by --python."
        )


def _start(python: str, spec: dict[str, Any], log: IO[str]) -> subprocess.Popen[str]:
    # PyTorch's compiler begins without a cache of its own, as ours does.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(spec["weights"]).parent / spec["variant"])}
    child = subprocess.Popen(
        [python, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has died; the answer that does not come will tell
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
        told = ""
        with contextlib.suppress(BrokenPipeError):
            ask.write(f"{n}\n")
            ask.flush()
            told = answer.readline()
        if not told:
            raise UserError(f"{name} ended in the middle of a run: out of memory?")
        found: dict[str, Any] = json.loads(told)
        return found

    facts = json.loads(line)
    try:
        take(TURN)
    except UserError:
        child.wait()
        return None
    return Contender(name, take, facts)


def _same_work(ours: Contender, peer: Contender, dtype: str) -> None:
    """Raise `UserError` where the two do not compute the same, and note in the peer's facts how alike they are."""
    mine, theirs = (side.facts["parameters"] for side in (ours, peer))
    if mine != theirs:
        raise UserError(f"{peer.name} has {theirs:,} parameters, ours {mine:,}: this is not the same work.")
    if "written" in peer.facts:
        same = float(np.mean(np.asarray(peer.facts["written"]) == np.asarray(ours.facts["written"])))
        peer.facts["same_tokens"] = same
        if dtype == "float32" and same < ALIKE:
            raise UserError(f"{peer.name} writes {same:.0%} of our tokens only: this is not the same work.")
        return
    mine, theirs = (side.facts["loss"] for side in (ours, peer))
    if not abs(mine / theirs - 1) < APART[dtype]:
        raise UserError(
            f"with equal parameters, {peer.name} has a loss of {theirs:.5f}, ours is {mine:.5f}: this is not the same "
            "work."
        )


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    log.seek(0, os.SEEK_END)
    return lines[-1][:300] if lines else "it said nothing"
