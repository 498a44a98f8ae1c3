"""How the processes of one job find each other, before JAX touches a device."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from transformer_jax.errors import UserError
from transformer_jax.logs import say

PATIENCE = 30
"""Seconds between two lines that say what a process waits for."""


def initialize() -> None:
    """Join the job this process belongs to; alone, do nothing.

    On Cloud TPU, GKE and SLURM, JAX finds the others by itself. Elsewhere three variables name them: TJAX_COORDINATOR
    (host:port of process 0), TJAX_PROCESSES and TJAX_PROCESS (this one's number). TJAX_JOIN_TIMEOUT is the patience
    in seconds, 300 unless given.

    Raises:
        UserError: the variables contradict each other, or the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _explicit()
    if explicit is None and not _in_a_cluster():
        return
    timeout = int(os.environ.get("TJAX_JOIN_TIMEOUT", "300"))
    whom = f"{explicit[1]} processes at {explicit[0]}" if explicit else "the other hosts of this job"
    try:
        with _patience(whom):
            if explicit is None:
                jax.distributed.initialize(initialization_timeout=timeout)
            else:
                if not _on_accelerator():
                    jax.config.update("jax_cpu_collectives_implementation", "gloo")
                jax.distributed.initialize(*explicit, initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"process {explicit[2] if explicit else '?'} could not join {whom} within {timeout} s ({reason}); "
            "check that all were started, that the port is open, and TJAX_JOIN_TIMEOUT."
        ) from error


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
    if not host or not port.isdecimal():
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


@contextmanager
def _patience(whom: str) -> Iterator[None]:
    """Say every while whom this process waits for."""
    done = threading.Event()

    def remind() -> None:
        waited = PATIENCE
        while not done.wait(PATIENCE):
            say(f"waiting for {whom} ({waited} s)")
            waited += PATIENCE

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
