"""jobs, logs, ssh, stop, cost: what was launched from this folder."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from transformer_jax.cli.verb import Verb, out
from transformer_jax.errors import UserError
from transformer_jax.launch import store, watch
from transformer_jax.launch.job import State
from transformer_jax.launch.store import Record
from transformer_jax.launch.vendors import explain
from transformer_jax.logs import print_json, say


@dataclass(frozen=True)
class JobsOptions:
    """List the jobs that were launched from this folder, and ask their backends how they do."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class LogsOptions:
    """Print what a worker of a job wrote."""

    worker: str = "0"
    """Number of the worker, or "all"."""
    lines: int = 100
    """Lines from the end."""
    follow: bool = False
    """Go on as more is written, until Ctrl-C."""


@dataclass(frozen=True)
class SshOptions:
    """Open a shell on a worker of a job."""

    worker: str = "0"
    """Number of the worker."""


@dataclass(frozen=True)
class StopOptions:
    """Let a job save, end it, and give its machines back. Launched again, it goes on from there."""


@dataclass(frozen=True)
class CostOptions:
    """Show what the jobs launched from this folder have cost: chips x hours x price."""

    price: float = 0.0
    """Price of one chip for an hour, for jobs launched without one."""
    json: bool = False
    """Print one JSON object."""


def _jobs(_: str, options: JobsOptions) -> int:
    rows = []
    for record in store.load_all():
        try:
            seen = watch.look(record)
        except UserError as error:
            seen = replace(record, phase="unknown", detail=str(error))
        rows.append(seen)
    if options.json:
        print_json({"jobs": [_summary(record) for record in rows]})
        return 0
    if not rows:
        say("no job was launched from this folder")
        return 0
    table = Table("job", "where", "state", box=None, pad_edge=False)
    table.add_column("hours", justify="right")
    table.add_column("restarts", justify="right")
    for record in rows:
        state = f"{record.phase}{f' ({record.detail})' if record.detail else ''}"
        hours = f"{record.seconds / 3600:.2f}"
        table.add_row(record.job.name, record.job.backend.where, state, hours, str(record.preemptions))
    out().print(table)
    return 0


def _summary(record: Record) -> dict[str, Any]:
    job = record.job
    return {
        "job": job.name,
        "where": job.backend.where,
        "state": record.phase,
        "detail": record.detail,
        "command": list(job.command),
        "commit": job.source.label if job.source else None,
        "chips": job.backend.chips,
        "hours": record.seconds / 3600,
        "preemptions": record.preemptions,
        "price": job.budget.price or None,
        "cost": record.cost if job.budget.price else None,
        "max_cost": job.budget.most or None,
    }


def _worker(record: Record, worker: str, *, every: bool = True) -> str:
    hosts = record.job.backend.workers
    if (every and worker == "all") or (worker.isdigit() and int(worker) < hosts):
        return worker
    one = "number from 0" if hosts == 1 else f"number from 0 to {hosts - 1}"
    raise UserError(
        f"--worker {worker}: {record.job.name} has {hosts} worker(s); a {one}{', or all' if every else ''}."
    )


def _logs(target: str, options: LogsOptions) -> int:
    record = store.load(target)
    worker = _worker(record, options.worker)
    backend = record.job.backend
    command = backend.logs(record.job, record.handle, worker, options.lines, options.follow, over=record.over)
    return _in_front(command.argv)


def _ssh(target: str, options: SshOptions) -> int:
    record = store.load(target)
    worker = _worker(record, options.worker, every=False)
    return _in_front(record.job.backend.ssh(record.job, record.handle, worker).argv)


def _in_front(argv: tuple[str, ...]) -> int:
    """Run a program that talks to the user itself."""
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise explain(argv, 127, "") from error


def _stop(target: str, _: StopOptions) -> int:
    record = watch.look(store.load(target))
    if record.over:
        say(f"{target} is not running: {record.phase}{f' ({record.detail})' if record.detail else ''}")
        return 0
    watch.end(record, State("stopped", "by tjax stop"))
    say(f"{target} is stopped; launched again, it goes on from its last checkpoint")
    return 0


def _cost(_: str, options: CostOptions) -> int:
    rows = []
    for record in store.load_all():
        price = record.job.budget.price or options.price
        summary = _summary(record) | {"price": price or None}
        summary["cost"] = replace(record.job.budget, price=price).cost(record.job.backend.chips, record.seconds)
        rows.append(summary if price else summary | {"cost": None})
    if options.json:
        print_json({"jobs": rows, "total": sum(row["cost"] or 0.0 for row in rows)})
        return 0
    table = Table("job", "state", box=None, pad_edge=False)
    for title in ("chips", "hours", "chip-hours", "price", "cost", "cap"):
        table.add_column(title, justify="right")
    for row in rows:
        money = [f"{row[key]:,.2f}" if row[key] is not None else "?" for key in ("price", "cost")]
        cap = f"{row['max_cost']:,.2f}" if row["max_cost"] else "none"
        chips, hours = row["chips"], row["hours"]
        table.add_row(row["job"], row["state"], str(chips), f"{hours:.2f}", f"{chips * hours:.1f}", *money, cap)
    out().print(table)
    say("hours are those in which the machines were seen at work; the bill of your provider is what counts")
    return 0


VERBS = {
    "jobs": Verb("", "what was launched from here, and how it does", JobsOptions, lambda _: JobsOptions(), _jobs),
    "logs": Verb("JOB", "what a worker wrote", LogsOptions, lambda _: LogsOptions(), _logs),
    "ssh": Verb("JOB", "a shell on a worker", SshOptions, lambda _: SshOptions(), _ssh),
    "stop": Verb("JOB", "let a job save, and give its machines back", StopOptions, lambda _: StopOptions(), _stop),
    "cost": Verb("", "chips x hours x price of the jobs", CostOptions, lambda _: CostOptions(), _cost),
}
