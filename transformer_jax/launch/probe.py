"""What one host says of itself, and whether all hosts of a job agree, before any of them trains.

`python -m transformer_jax.launch.probe` prints one line of JSON. With `--agree` it runs on every host at once: each
calls the first one on the coordinator's port, which compares them all and tells each whether to go on. So a worker
that is missing, a blocked port or a different version shows before training, and not as a hang.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "transformer_jax")
PORT = 8482
"""Of the coordinator on Cloud TPU, as in `jax.distributed`."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
PATIENCE = 900.0
"""Seconds that the first host waits for the others: they install at different speeds."""
EVERY = 30.0
"""Seconds between two lines that say who is waited for."""
CLOCK, DISK = 10.0, 10.0
"""Seconds that clocks may differ; GiB of disk that a host needs."""

Report = dict[str, Any]


def peers() -> tuple[int, int, str, int]:
    """Return this process, how many there are, and host and port of the first."""
    env = os.environ
    port = int(env.get("JAX_COORDINATOR_PORT", PORT))
    if "TJAX_PROCESS" in env:
        host, _, own_port = env["TJAX_COORDINATOR"].rpartition(":")
        return int(env["TJAX_PROCESS"]), int(env["TJAX_PROCESSES"]), host, int(own_port)
    if "SLURM_PROCID" in env:
        listed = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
        chosen = int(env["SLURM_JOB_ID"]) % 2**12 + 65535 - 2**12 + 1  # as jax.distributed chooses it
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), names[0], chosen
    if "TPU_WORKER_HOSTNAMES" in env:
        return *_numbered(int(env["TPU_WORKER_ID"]), env["TPU_WORKER_HOSTNAMES"].split(","), env), port
    try:
        hosts = [worker.split(":")[-1] for worker in _metadata("worker-network-endpoints").split(",")]
    except OSError:  # not on Google Cloud
        return 0, 1, "127.0.0.1", port
    slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?$", _metadata("tpu-env"), re.M))
    return *_numbered(int(_metadata("agent-worker-number")), hosts, {**slices, **env}), port


def _numbered(worker: int, hosts: list[str], env: Mapping[str, str]) -> tuple[int, int, str]:
    """Number the workers of all slices through, as jax.distributed does; return the first one's host with them."""
    slices, own = int(env.get("MEGASCALE_NUM_SLICES") or 1), int(env.get("MEGASCALE_SLICE_ID") or 0)
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
    return own * len(hosts) + worker, slices * len(hosts), first


def _metadata(key: str) -> str:
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def report() -> Report:
    """Return what this host has to say of itself."""
    process, count, _, _ = peers()
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return {
        "process": process,
        "processes": count,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": os.environ.get("TJAX_COMMIT", "unknown"),
        "chips": len(chips),
        "disk": round(shutil.disk_usage(Path.home()).free / 2**30, 1),
        "clock": time.time(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def compare(reports: list[Report], clock: float = CLOCK) -> list[str]:
    """Return what is wrong with the hosts of a job, one line each; nothing if they may train together."""
    problems = []
    for key in ("python", *PACKAGES, "commit", "chips"):
        values: dict[Any, list[str]] = {}
        for one in reports:
            values.setdefault(one[key], []).append(one["host"])
        if len(values) > 1:
            said = "; ".join(f"{value} on {', '.join(sorted(hosts))}" for value, hosts in values.items())
            problems.append(f"{key} differs: {said}")
    missing = sorted(set(range(reports[0]["processes"])) - {one["process"] for one in reports})
    if missing:
        problems.append(f"of {reports[0]['processes']} workers these did not answer: {', '.join(map(str, missing))}")
    times = [one["clock"] for one in reports]
    if max(times) - min(times) > clock:
        problems.append(f"the clocks differ by {max(times) - min(times):.0f} s")
    for one in reports:
        if one["disk"] < DISK:
            problems.append(f"{one['host']} has only {one['disk']} GiB of disk left; {DISK:.0f} are needed")
    return problems


def agree(seconds: float = PATIENCE) -> list[str]:
    """Meet all other hosts at the coordinator's port; return what is wrong, the same on every host that came."""
    process, count, host, port = peers()
    if count == 1:
        return compare([report()])
    return _host(count, port, seconds) if process == 0 else _visit(host, port, seconds)


def _host(count: int, port: int, seconds: float) -> list[str]:
    """Receive every other host's report, and tell all of them the verdict."""
    reports, callers = [report()], []
    until, next_line = time.monotonic() + seconds, time.monotonic() + EVERY
    with socket.create_server(("", port), backlog=count) as server:
        while len(reports) < count and time.monotonic() < until:
            server.settimeout(max(min(until, next_line) - time.monotonic(), 0.01))
            if time.monotonic() > next_line:
                next_line += EVERY
                missing = sorted(set(range(count)) - {one["process"] for one in reports})
                sys.stderr.write(f"tjax: before training: waiting for workers {', '.join(map(str, missing))}\n")
            try:
                caller, _ = server.accept()
                caller.settimeout(10)
                with caller.makefile("r", encoding="utf-8") as line:
                    told = json.loads(line.readline())
            except (TimeoutError, json.JSONDecodeError):  # nobody came, or somebody who is none of us
                continue
            ahead = told["clock"] - time.time()
            reports.append(told | {"clock": reports[0]["clock"] + ahead})
            callers.append(caller)
        problems = compare(reports)
        for caller in callers:
            with caller:
                caller.sendall((json.dumps(problems) + "\n").encode())
    return problems


def _visit(host: str, port: int, seconds: float) -> list[str]:
    """Tell the first host about this one, and wait for its verdict."""
    until, why, next_line = time.monotonic() + seconds, "", time.monotonic() + EVERY
    while time.monotonic() < until:
        if time.monotonic() > next_line:
            next_line += EVERY
            sys.stderr.write(f"tjax: before training: waiting for the first worker at {host}:{port} ({why})\n")
        try:
            with socket.create_connection((host, port), timeout=5) as line:
                line.sendall((json.dumps(report()) + "\n").encode())
                line.settimeout(max(until - time.monotonic(), 1) + 10)
                with line.makefile("r", encoding="utf-8") as answer:
                    if verdict := answer.readline():
                        return list(json.loads(verdict))
                    why = "it hung up"
        except OSError as error:
            why = str(error)
        time.sleep(0.2)
    return [f"the coordinator {host}:{port} cannot be reached ({why}); is the port open between the hosts?"]


def main() -> int:
    """Print the report of this host, or with --agree what is wrong with the hosts together."""
    if sys.argv[1:] != ["--agree"]:
        sys.stdout.write(json.dumps(report()) + "\n")
        return 0
    problems = agree()
    for problem in problems:
        sys.stderr.write(f"tjax: before training: {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
