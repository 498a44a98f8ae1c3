"""N processes on this machine that form one job, as the hosts of a pod do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from transformer_jax.errors import UserError
from transformer_jax.launch.command import GONE, Command
from transformer_jax.launch.job import Backend, Job, State
from transformer_jax.launch.secrets import read_env_file


@dataclass(frozen=True)
class Local(Backend):
    """Processes beside each other; the launch stays with them and ends with them."""

    processes: int = 2
    devices_per_process: int = 0
    """Simulated CPU devices of each; 0 leaves the devices to what the machine has."""
    port: int = 0
    """Of the coordinator; a free one unless given."""
    grace: float = 60.0
    """Seconds that the others get to save when one has failed or all are told to stop."""
    gpus: tuple[str, ...] = ()
    """GPUs of this machine, divided among the processes."""

    @property
    def chips(self) -> int:
        """Processes."""
        return self.processes

    @property
    def workers(self) -> int:
        """As many."""
        return self.processes

    @property
    def devices(self) -> int | None:
        """Known for simulated devices and GPUs."""
        return self.processes * self.devices_per_process or len(self.gpus) or None

    @property
    def where(self) -> str:
        """Number of processes."""
        return f"{self.processes} process{'es' if self.processes > 1 else ''} on this machine"

    def check(self, job: Job) -> None:
        """Raise `UserError` for numbers that cannot be."""
        if self.processes < 1 or self.devices_per_process < 0:
            raise UserError("--processes must be at least 1, and --devices-per-process at least 0.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be a number up to 65535, got {self.port}.")
        if self.gpus and not self.devices_per_process and len(self.gpus) % self.processes:
            raise UserError(f"--processes {self.processes} does not divide the {len(self.gpus)} GPUs of this machine.")
        if job.secrets:
            raise UserError("--secret needs a secret store, and this machine has none: use --env-file.")
        if job.env_file:
            read_env_file(job.env_file)

    def environment(self, process: int, port: int) -> dict[str, str]:
        """Return what tells a process who it is."""
        own = {
            "TJAX_COORDINATOR": f"127.0.0.1:{port}",
            "TJAX_PROCESSES": str(self.processes),
            "TJAX_PROCESS": str(process),
        }
        if self.devices_per_process:
            own["JAX_PLATFORMS"] = "cpu"
            own["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.devices_per_process}"
        elif self.gpus:
            share = len(self.gpus) // self.processes
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[process * share : (process + 1) * share])
        return own

    def commands(self, job: Job) -> list[Command]:
        """Start every process; in a shell the last one would stay in front."""
        port = self.port or 12345
        steps = []
        for process in (*range(1, self.processes), 0):
            own = self.environment(process, port) | dict(job.env)
            argv = ("env", *(f"{name}={value}" for name, value in own.items()), *job.command)
            steps.append(Command(f"process {process} of {self.processes}", argv, background=process > 0))
        return steps

    def notes(self, job: Job) -> list[str]:
        """What a pasted script would not do."""
        return [
            "`tjax launch` takes a free port, puts the number of the process before each line, passes SIGTERM and "
            "Ctrl-C on to all, and ends with the first exit code that is not 0."
        ]

    def state(self, job: Job, handle: str) -> State:
        """Look whether the launching process is there."""
        written = Path(job.folder, "exit")
        if written.is_file():
            code = int(written.read_text(encoding="utf-8"))
            stopped = code == 128 + signal.SIGTERM
            return State("stopped" if stopped else "failed", f"exit code {code}", code) if code else State("done")
        return State("running") if handle and _alive(int(handle)) else State("failed", "the launch was killed", 137)

    def logs(self, job: Job, handle: str, worker: str, lines: int, follow: bool, *, over: bool = False) -> Command:
        """Read the log files."""
        numbers = range(self.processes) if worker == "all" else [int(worker)]
        files = [f"{job.folder}/worker-{number}.log" for number in numbers]
        return Command("read the log", ("tail", f"--lines={lines}", *(["-F"] if follow else []), *files))

    def ssh(self, job: Job, handle: str, worker: str) -> Command:
        """Open a shell here."""
        return Command("open a shell", (os.environ.get("SHELL", "sh"),))

    def stop(self, job: Job, handle: str) -> list[Command]:
        """Tell the launching process, which tells all others."""
        return [Command("let every process save", ("kill", "-TERM", handle), lenient=GONE)]


def machine_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, by number or name."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name for name in visible.split(",") if name)
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return tuple(str(number) for number in range(listed.stdout.count("GPU ")))


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_here(job: Job, where: Local) -> int:
    """Run the processes of a job, stream what they write, and return the exit code of the first that failed.

    SIGTERM and Ctrl-C reach every process, which may save within `where.grace` seconds; when one fails, the others
    are told to end too. Lines are prefixed with the number of their process, and kept in `worker-N.log`.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exit").unlink(missing_ok=True)
    port = where.port or free_port()
    extra = dict(job.env) | (dict(read_env_file(job.env_file)) if job.env_file else {})
    group = Group(where.grace)
    with group:
        for process in range(where.processes):
            own = os.environ | where.environment(process, port) | extra
            if where.devices_per_process and (flags := os.environ.get("XLA_FLAGS")):
                own["XLA_FLAGS"] = f"{flags} {own['XLA_FLAGS']}"  # of the same flag the last one counts
            group.start(process, _resolved(job.command), own, folder / f"worker-{process}.log")
        code = group.wait()
    (folder / "exit").write_text(f"{code}\n", encoding="utf-8")
    return code


def _resolved(command: Sequence[str]) -> list[str]:
    """Take the `tjax` of this environment, whatever PATH says."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside), *command[1:]] if beside.is_file() else list(command)


class Group:
    """Processes that live and die together."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.readers: list[threading.Thread] = []
        self.files = contextlib.ExitStack()
        self.told = 0.0
        """When the processes were told to end, on the monotonic clock; 0 before."""

    def __enter__(self) -> Group:
        self.before = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
        for process in self.running.values():
            process.wait()
        for reader in self.readers:
            reader.join(timeout=5)  # a process of a process may hold the pipe open
        self.files.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def start(self, number: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start one process, in a session of its own: Ctrl-C then reaches it once, through us."""
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise UserError(f"there is no program '{command[0]}' to launch.") from error
        self.running[number] = process
        file = self.files.enter_context(log.open("w", encoding="utf-8"))
        for stream, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert stream is not None
            reader = threading.Thread(target=_copy, args=(stream, to, file, number), daemon=True)
            reader.start()
            self.readers.append(reader)

    def wait(self) -> int:
        """Wait for all; return the exit code of the first that failed, 128 + signal for one that was killed."""
        first = 0
        left = dict(self.running)
        while left:
            for number, process in list(left.items()):
                code = process.poll()
                if code is None:
                    continue
                del left[number]
                code = 128 - code if code < 0 else code
                if code and not first:
                    first = code
                    if left and not self.told:
                        sys.stderr.write(f"process {number} ended with exit code {code}; telling the others to end\n")
                if code:
                    self.tell()
            if self.told and time.monotonic() - self.told > self.grace:
                for process in left.values():
                    process.kill()
            time.sleep(0.05)
        return first

    def tell(self) -> None:
        """Tell every process to end, once."""
        if self.told:
            return
        self.told = time.monotonic()
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self.told and number == signal.SIGINT:  # asked twice: do not wait for anybody
            self.told = time.monotonic() - self.grace - 1
        self.tell()


_WRITING = threading.Lock()


def _copy(stream: IO[str], to: IO[str], file: IO[str], number: int) -> None:
    """Copy lines as they come, each whole."""
    with stream:
        for line in stream:
            whole = line if line.endswith("\n") else line + "\n"
            with _WRITING:
                to.write(f"[{number}] {whole}")
                to.flush()
                file.write(whole)
                file.flush()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
