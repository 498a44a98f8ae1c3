"""What to look at before money is spent, and while it is: each check is ok, failed with its remedy, or unchecked."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from transformer_jax.errors import UserError
from transformer_jax.launch.checks import Check, failed, ok, unchecked
from transformer_jax.launch.command import ask
from transformer_jax.launch.gke import Gke
from transformer_jax.launch.google import check_cluster, check_tpu
from transformer_jax.launch.job import Backend
from transformer_jax.launch.local import Local
from transformer_jax.launch.probe import compare
from transformer_jax.launch.slurm import Slurm
from transformer_jax.launch.source import read_source
from transformer_jax.launch.store import Record
from transformer_jax.launch.tpu_vm import TpuVm
from transformer_jax.launch.vendors import sentence

ROOM = 5.0
"""GiB of disk for runs and caches."""
SEEN_CLOCK = 60.0
"""Seconds that clocks may differ when each host is asked over its own connection."""


def check_here() -> Iterator[Check]:
    """Look at this machine."""
    yield ok("python", sys.version.split()[0])
    try:
        devices = jax.devices()
        yield ok("jax devices", f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
    except RuntimeError as error:
        mend = "install JAX for this machine (`pip install transformer_jax[tpu]` or [gpu]), or set JAX_PLATFORMS=cpu"
        yield failed("jax devices", str(error).splitlines()[0], mend)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, folder in (("runs folder", Path("runs")), ("cache folder", cache)):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not os.access(there, os.W_OK):
            yield failed(name, f"{there} is not writable", f"`chmod u+w {there}`, or work in another folder")
        elif free < ROOM:
            yield failed(name, f"{free:.1f} GiB left at {there}", f"make room: {ROOM:.0f} GiB are needed")
        else:
            yield ok(name, f"writable, {free:.0f} GiB left")


def check_tree() -> Check:
    """Look whether the working tree can travel."""
    try:
        source = read_source(allow_changes=True)
    except UserError as error:
        return failed("working tree", str(error).rstrip("."), "launch from a checkout of the project")
    if source.changed:
        return failed("working tree", f"changed since {source.commit[:12]}", "commit, or launch with --allow-dirty")
    return ok("working tree", f"clean at {source.commit[:12]}")


def check_backend(backend: Backend) -> Iterator[Check]:
    """Look at where a job would go."""
    if isinstance(backend, Local):
        return
    yield check_tree()
    if isinstance(backend, TpuVm):
        yield from check_tpu(backend)
    elif isinstance(backend, Gke):
        yield from check_cluster(backend)
    elif isinstance(backend, Slurm):
        yield from _slurm(backend)
    when = "every host is asked before training starts, and by `tjax doctor --job NAME`"
    yield unchecked("versions, clocks, disks, coordinator port of the hosts", f"no host is there yet: {when}")


def _slurm(backend: Slurm) -> Iterator[Check]:
    chosen = (f"--partition={backend.partition}",) if backend.partition else ()
    argv = ("sinfo", "--noheader", "--format=%D %G %l", *chosen)
    try:
        answer = ask(argv)
    except UserError as error:
        yield failed("SLURM", str(error), "launch from a login node of the cluster")
        return
    if answer.code:
        yield failed("SLURM", sentence(answer.err), "`sinfo` lists the partitions")
        return
    rows = [line.split() for line in answer.out.splitlines() if line.strip()]
    nodes = sum(int(row[0]) for row in rows)
    if nodes < backend.nodes:
        yield failed("nodes", f"{nodes} nodes, and {backend.nodes} are needed", "another --partition, or fewer --nodes")
    else:
        yield ok("nodes", f"{nodes} nodes; generic resources {', '.join(sorted({row[1] for row in rows}))}")
    gpus = max((int(number) for row in rows for number in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", row[1])), default=0)
    if gpus < backend.gpus_per_node:
        need = f"a node has {gpus} GPUs, and {backend.gpus_per_node} are needed"
        yield failed("GPUs", need, "another --partition, or --gpus-per-node")
    yield unchecked("shared folder", f"that the nodes see {Path.cwd()} is not known here")


def check_job(record: Record) -> Iterator[Check]:
    """Ask every host of a running job about itself, and compare."""
    hosts = record.job.backend.hosts
    command = record.job.backend.probe(record.job, record.handle)
    names = "versions, commit, clocks and disks of the hosts"
    if command is None or record.over:
        why = f"the job is {record.phase}" if record.over else "its processes run on this machine"
        yield unchecked(names, why)
        return
    answer = ask(command.argv)
    reports = [json.loads(line) for line in re.findall(r"^(?:\s*\d+: )?(\{.*\})$", answer.out, re.M)]
    if not reports:
        yield failed("all workers answer", sentence(answer.err), "`tjax logs` shows how far they are")
        return
    who = sorted({one["host"] for one in reports})
    if len(who) < hosts:
        yield failed("all workers answer", f"{len(who)} of {hosts}: {', '.join(who)}", "`tjax stop`, then launch again")
    else:
        yield ok("all workers answer", f"{len(who)} of {hosts}")
    problems = [line for line in compare(reports, SEEN_CLOCK) if "did not answer" not in line]
    for problem in problems:
        yield failed("hosts agree", problem, "`tjax stop`, then launch again from one commit")
    if not problems:
        first = reports[0]
        yield ok(
            "hosts agree", f"python {first['python']}, jax {first['jax']}, libtpu {first['libtpu']}; clocks, disks"
        )
