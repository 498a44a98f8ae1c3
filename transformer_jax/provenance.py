"""Where a number comes from: command, commit, versions, device, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

FLAGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_DEFAULT_MATMUL_PRECISION",
)
"""Environment variables that change the compiled program."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers", "numpy")


def provenance() -> dict[str, Any]:
    """Return what a reader needs to make the number again, JSON-able."""
    devices = jax.devices()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "processes": jax.process_count(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> str | None:
    """Commit of the source tree, "+changes" if it differs from it; what launched it says so outside a checkout."""
    source = Path(__file__).parent
    try:
        args = ["git", "-C", str(source), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        done = subprocess.run(args, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return os.environ.get("TJAX_COMMIT")
    found = done.stdout.strip() if done.returncode == 0 else ""
    return found or os.environ.get("TJAX_COMMIT")
