"""How the processes of one job find each other, before JAX touches a device."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import jax
from orbax.checkpoint import multihost

from transformer_jax import compilation_cache
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.pulse import IDLE, PATIENCE, STUCK, Pulse, end, who

SLACK = 60
"""Seconds that JAX waits longer than we do: it ends the process with a stack trace of its own."""

PARTING = 30
"""Seconds that a process with an error gives the others to come to the same."""

GONE = re.compile(r"Gloo|closed by peer|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
"""In an error of JAX outside of training: another process does not answer."""

_pulse: Pulse | None = None


def initialize() -> None:
    """Join the job this process belongs to; alone, do nothing.

    On Cloud TPU, GKE and SLURM, JAX finds the others by itself. Elsewhere three variables name them: TJAX_COORDINATOR
    (host:port of process 0), TJAX_PROCESSES and TJAX_PROCESS (this one's number). TJAX_JOIN_TIMEOUT is the patience
    in seconds, 300 unless given; TJAX_LOST_TIMEOUT (100) the silence after which another process is taken for lost, and
    TJAX_STUCK_TIMEOUT (1800) the time for which one that answers may stand still while the others wait for it.

    Raises:
        UserError: the variables contradict each other, or the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _explicit()
    if explicit is None and not _in_a_cluster():
        return
    timeout, silent = _seconds("TJAX_JOIN_TIMEOUT", 300), _seconds("TJAX_LOST_TIMEOUT", 100)
    stuck = _seconds("TJAX_STUCK_TIMEOUT", STUCK)
    join = partial(
        jax.distributed.initialize,
        initialization_timeout=timeout + SLACK,
        heartbeat_timeout_seconds=silent + SLACK,
    )
    try:
        with _patience(explicit, timeout):
            if explicit is None:
                join()
            else:
                if not _on_accelerator():
                    jax.config.update("jax_cpu_collectives_implementation", "gloo")
                join(*explicit)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{_who(explicit)} could not join {_whom(explicit)} ({reason}).") from error
    if jax.process_count() > 1:
        compilation_cache.leave()
        global _pulse  # noqa: PLW0603 - a process belongs to one job
        _pulse = Pulse(silent, stuck)
        _pulse.start()
        sys.excepthook = _crashed


@contextmanager
def together(newest: Callable[[], str]) -> Iterator[None]:
    """End this process with one line if another process of the job is gone, or silent for TJAX_LOST_TIMEOUT seconds.

    Nothing that needs all of them, an orderly end included, can be done then. `newest` says from where a restart goes
    on.
    """
    if _pulse is not None:
        _pulse.newest = newest
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _pulse is None or "RESOURCE_EXHAUSTED" in str(error):
            raise
        _pulse.lose(_lost(error), newest)
    finally:
        if _pulse is not None:
            _pulse.newest = None


def part(code: int) -> None:
    """Meet the others before this process ends with an error; where they do not come to an end too, end at once.

    JAX's own way out waits five minutes for processes that wait for this one.
    """
    if _pulse is None:
        return
    try:
        multihost.get_barrier_sync_fn()(key="tjax_part", timeout_ms=PARTING * 1000)
    except jax.errors.JaxRuntimeError:
        end(code)


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _pulse is not None and issubclass(kind, jax.errors.JaxRuntimeError) and GONE.search(str(error)):
        _pulse.lose(_lost(error), _pulse.newest or (lambda: IDLE))
    sys.__excepthook__(kind, error, trace)
    part(1)


def _lost(error: BaseException) -> str:
    return f"{who()} has lost the others ({' '.join(str(error).split())[:200]})"


def advance() -> None:
    """Note that the main thread has come to the next program that all processes run together."""
    if _pulse is not None:
        _pulse.place += 1


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) == 0:
        raise UserError(f"{name}={value} is not a number of seconds.")
    return int(value)


def _explicit() -> tuple[str, int, int] | None:
    names = ("TJAX_COORDINATOR", "TJAX_PROCESSES", "TJAX_PROCESS")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        return None
    if not all(values):
        missing = [name for name, value in zip(names, values, strict=True) if not value]
        raise UserError(f"{' and '.join(missing)} not set: a job of several processes needs {', '.join(names)}.")
    address, count, number = values
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"TJAX_COORDINATOR={address} is not host:port.")
    if not count.isdecimal() or not number.isdecimal() or not int(number) < int(count):
        raise UserError(f"TJAX_PROCESS={number} must be a number below TJAX_PROCESSES={count}.")
    return address, int(count), int(number)


def _in_a_cluster() -> bool:
    """Tell a job of several hosts that JAX can find its way in."""
    slurm = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return slurm or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ or _on_tpu_vm()


def _on_tpu_vm() -> bool:
    # Several hosts, or one: on a TPU VM initialising is right in either case.
    return os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and (
        Path("/dev/accel0").exists() or "TPU_WORKER_HOSTNAMES" in os.environ
    )


def _on_accelerator() -> bool:
    return os.environ.get("JAX_PLATFORMS", "") != "cpu" and (_on_tpu_vm() or Path("/dev/nvidia0").exists())


def _who(explicit: tuple[str, int, int] | None) -> str:
    return f"process {explicit[2]} of {explicit[1]}" if explicit else "this process"


def _whom(explicit: tuple[str, int, int] | None) -> str:
    """Say for whom a process waits, as far as it can know."""
    if explicit is None:
        return "the other hosts of this job"
    address, count, number = explicit
    if number == 0:
        return f"process{'es' if count > 2 else ''} {', '.join(map(str, range(1, count)))} to come to {address}"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"process 0, which does not answer at {address} ({error.strerror or error})"
    return f"the others; process 0 answers at {address}"


@contextmanager
def _patience(explicit: tuple[str, int, int] | None, timeout: int) -> Iterator[None]:
    """Say every while for whom this process waits, and end it with one line when that takes too long."""
    done, began = threading.Event(), time.monotonic()

    def remind() -> None:
        while not done.wait(min(PATIENCE, max(began + timeout - time.monotonic(), 0))):
            waited = round(time.monotonic() - began)
            if waited < timeout:
                say(f"{_who(explicit)} has waited {waited} s for {_whom(explicit)}")
                continue
            say(
                f"tjax: {_who(explicit)} gave up after {timeout} s of waiting for {_whom(explicit)}; see that all are "
                "started, that the port is open between the hosts, or give them longer (TJAX_JOIN_TIMEOUT)."
            )
            end(2)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
