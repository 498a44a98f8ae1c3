"""SLURM: one batch script, one process a GPU, requeued when its time is up.

The job runs the tree as it was when it was submitted, whatever happens to the checkout while it waits.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from transformer_jax.errors import UserError
from transformer_jax.launch.command import GONE, Command, ask
from transformer_jax.launch.job import Backend, Job, State
from transformer_jax.launch.secrets import read_env_file
from transformer_jax.launch.vendors import explain
from transformer_jax.launch.worker import TERMINATED, TIMED_OUT, exports, read_env

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SUSPENDED")


@dataclass(frozen=True)
class Slurm(Backend):
    """Nodes of a SLURM cluster; launched from a login node, in a folder that the nodes share."""

    nodes: int = 1
    gpus_per_node: int = 8
    """0: one process a node, on its CPU."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    """Time limit, as 24:00:00; that of the partition unless given."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as cpus-per-task=12 or mem=0."""
    grace: int = 300
    """Seconds before the limit at which the processes are told to save."""
    retries: int = 10

    @property
    def chips(self) -> int:
        """GPUs, or nodes where there are none."""
        return self.nodes * (self.gpus_per_node or 1)

    @property
    def workers(self) -> int:
        """One a GPU."""
        return self.chips

    @property
    def hosts(self) -> int:
        """Nodes."""
        return self.nodes

    @property
    def devices(self) -> int | None:
        """One a process."""
        return self.chips

    @property
    def where(self) -> str:
        """Nodes and partition."""
        gpus = f" x {self.gpus_per_node} GPUs" if self.gpus_per_node else ""
        return f"{self.nodes} nodes{gpus}{f' in {self.partition}' if self.partition else ''} (SLURM)"

    def check(self, job: Job) -> None:
        """Raise `UserError` for what SLURM would refuse."""
        if self.nodes < 1 or self.gpus_per_node < 0:
            raise UserError("--nodes must be at least 1, and --gpus-per-node at least 0.")
        if self.time and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise UserError(f"--time {self.time}: a time limit looks like 24:00:00 or 2-12:00:00.")
        if not 0 < self.grace <= 65535:
            raise UserError(f"--grace must lie in [1, 65535] seconds, got {self.grace}.")
        for option in self.sbatch:
            name = option.partition("=")[0]
            if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", option):
                raise UserError(f"--sbatch {option}: an option is given as NAME=VALUE or NAME, without its hyphens.")
            if name in self._options(job) or name == "requeue":
                raise UserError(f"--sbatch {option}: `tjax launch` sets {name} itself.")
        if job.secrets:
            raise UserError("SLURM keeps no secrets: put them into a file that only you can read, for --env-file.")
        if job.env_file:
            read_env_file(job.env_file)

    def commands(self, job: Job) -> list[Command]:
        """Pack, unpack beside the job, submit."""
        assert job.source is not None
        code = f"{job.folder}/code"
        unpack = 'rm -rf "$0" && mkdir -p "$0" && tar -xzf "$1" -C "$0"'
        script = f"{job.folder}/job.sh"
        return [
            *job.source.pack(job.folder),
            Command("unpack it where the nodes see it", ("sh", "-c", unpack, code, f"{job.folder}/code.tar.gz")),
            Command(
                "forget how an earlier job of this name ended",
                ("rm", "-f", *(f"{job.folder}/{name}" for name in ("exit", "stop", "spent"))),
            ),
            Command("submit the job", ("sbatch", "--parsable", script), {script: self.script(job)}),
        ]

    def notes(self, job: Job) -> list[str]:
        """What the batch script takes from the shell that submits it."""
        return ["The job runs in the Python environment that is active when it is submitted."]

    def handle_of(self, printed: str) -> str:
        """Return the number of the job; --parsable prints it, on some clusters with the name of the cluster."""
        return printed.strip().partition(";")[0]

    def _options(self, job: Job) -> dict[str, str | int]:
        """Return the options of sbatch that a launch sets, those left to the cluster as empty."""
        return {
            "job-name": job.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus_per_node or 1,
            "gpus-per-node": self.gpus_per_node,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "signal": f"TERM@{self.grace}",
            "output": f"{job.folder}/log",
            "open-mode": "append",
        }

    def script(self, job: Job) -> str:
        """Return the batch script."""
        folder = shlex.quote(job.folder)
        options = [f"{name}={value}" for name, value in self._options(job).items() if value] + [*self.sbatch, "requeue"]
        header = "".join(f"#SBATCH --{option}\n" for option in options)
        own = read_env(str(Path(job.env_file).resolve())) if job.env_file else ""
        clock, limit, account = "", "", ""
        if job.seconds:
            clock = (
                "# The cap is that of the job, whatever turns it takes: what they took is noted every minute.\n"
                f"spent=$(cat {folder}/spent 2> /dev/null || echo 0)\n"
                f"while sleep 60; do echo $((spent + SECONDS)) > {folder}/spent; done &\n"
                f"clock=$! left=$(({job.seconds} - spent - SECONDS))\n"
            )
            # Every process has its own: srun itself answers SIGTERM by killing them.
            limit = f"timeout --signal=TERM --kill-after={self.grace} $((left > 0 ? left : 1)) "
            account = f"kill $clock\necho $((spent + SECONDS)) > {folder}/spent\n"
        setup = f"{job.setup}\n" if job.setup else ""
        return (
            f"#!/bin/bash\n{header}\n"
            f"trap 'echo $? > {folder}/exit' EXIT\ncd {folder}/code || exit\n{exports(job)}{own}"
            "# The packed tree comes before the one that is installed.\n"
            f"export PYTHONPATH={folder}/code${{PYTHONPATH:+:$PYTHONPATH}}\n"
            "# srun takes this number from here, not from sbatch (since SLURM 22.05).\n"
            '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n'
            # Without B: the signal goes to the processes, not to this script. jax.distributed finds its peers itself.
            # Every node must be there and have the same versions, or the job ends here with a line that names it.
            f"{setup}srun --ntasks={self.nodes} --ntasks-per-node=1 "
            "python -m transformer_jax.launch.probe --agree || exit\n"
            f"{clock}srun --label --kill-on-bad-exit=1 {limit}{shlex.join(job.command)}\n"
            f"code=$?\n{account}"
            "# Told to save because the time was up: go on with a new turn, unless `tjax stop` asked for the end.\n"
            "turns=${SLURM_RESTART_COUNT:-0}\n"
            f"if [ $code = {TERMINATED} ] && [ ! -e {folder}/stop ] && [ $turns -lt {self.retries} ]; then\n"
            '    scontrol requeue "$SLURM_JOB_ID" && trap - EXIT\n'
            "fi\nexit $code\n"
        )

    def state(self, job: Job, handle: str) -> State:
        """Ask the queue; a job that left it wrote its exit code."""
        argv = ("squeue", f"--jobs={handle}", "--noheader", "--format=%T %R")
        answer = ask(argv)
        if answer.code and "Invalid job id" not in answer.err:
            raise explain(argv, answer.code, answer.err)
        state, _, reason = answer.out.strip().partition(" ")
        if not answer.code and state in WAITING:
            return State("queued", f"{state.lower()} {reason}")
        if not answer.code and state in ("RUNNING", "COMPLETING", "STOPPED"):
            return State("running", reason)
        written = Path(job.folder, "exit")
        if not written.is_file():
            return State("failed", f"it left the queue{f' ({state})' if state else ''} without an exit code", 1)
        code = int(written.read_text(encoding="utf-8"))
        if code == 0:
            return State("done")
        if code == TIMED_OUT:
            return State("stopped", "the spend cap is reached", code)
        if code == TERMINATED or Path(job.folder, "stop").exists():
            return State("stopped", "told to stop", code)
        return State("failed", f"a process ended with exit code {code}", code)

    def logs(self, job: Job, handle: str, worker: str, lines: int, follow: bool, *, over: bool = False) -> Command:
        """Read the log, where srun has put the number of the process before each line."""
        tail = ["tail", f"--lines={lines}", *(["-F"] if follow else []), f"{job.folder}/log"]
        if worker == "all":
            return Command("read the log", tuple(tail))
        chosen = f"{shlex.join(tail)} | grep --line-buffered '^ *{int(worker)}: '"
        return Command("read the log of one process", ("sh", "-c", chosen))

    def ssh(self, job: Job, handle: str, worker: str) -> Command:
        """Open a shell on the node of a process."""
        node = int(worker) // (self.gpus_per_node or 1)
        argv = (
            "srun",
            f"--jobid={handle}",
            "--overlap",
            "--nodes=1",
            "--ntasks=1",
            f"--relative={node}",
            "--pty",
            "bash",
            "-l",
        )
        return Command("open a shell", argv)

    def stop(self, job: Job, handle: str) -> list[Command]:
        """Tell every process to save and end; the script then ends by itself."""
        return [
            Command("ask for no further turn", ("touch", f"{job.folder}/stop")),
            Command("let every process save", ("scancel", "--signal=TERM", handle), lenient=GONE),
            # A job that still waits has no process to tell.
            Command("cancel it if it waits", ("scancel", "--state=PENDING", handle), lenient=GONE),
        ]

    def probe(self, job: Job, handle: str) -> Command | None:
        """Ask every node about itself, beside the training."""
        argv = (
            "srun",
            f"--jobid={handle}",
            "--overlap",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            "python",
            "-m",
        )
        return Command("ask every node", (*argv, "transformer_jax.launch.probe"))
