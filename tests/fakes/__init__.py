"""Programs that answer as gcloud, kubectl and Slurm do, for a PATH without any of them.

Each writes what it was asked to `$FAKES/calls.jsonl`, and takes from `$FAKES/scenario.json` how the world is. The
messages are those of the real programs (gcloud 528, kubectl 1.32, Slurm 22.05).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = {
    "gcloud": "gcloud.py",
    "kubectl": "kubectl.py",
    **dict.fromkeys(("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun", "ssh-add"), "slurm.py"),
}


@dataclass(frozen=True)
class World:
    """A checkout to launch from, and the programs it meets."""

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def is_so(self, **scenario) -> None:
        """Say how the world is from now on."""
        (self.folder / "fakes" / "scenario.json").write_text(json.dumps(scenario))

    def calls(self, *begin: str) -> list[list[str]]:
        """Return the calls made so far whose first words are these."""
        path = self.folder / "fakes" / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call[: len(begin)] == list(begin)]

    def bucket(self, path: str) -> Path:
        return self.folder / "fakes" / "gs" / path


def git(*argv, cwd) -> str:
    own = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *who, *argv], cwd=cwd, env=os.environ | own, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def make_world(folder: Path, monkeypatch, programs=tuple(PROGRAMS)) -> World:
    """Put the fake programs on PATH, and stand in a clean checkout."""
    world = World(folder)
    for name in ("bin", "fakes", "work/constraints"):
        (folder / name).mkdir(parents=True)
    for program in programs:
        path = folder / "bin" / program
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / PROGRAMS[program]} {program} "$@"\n')
        path.chmod(0o755)
    (world.work / "pyproject.toml").write_text('[project]\nname = "transformer_jax"\n')
    (world.work / "constraints" / "py312.txt").write_text("")
    git("init", "--quiet", cwd=world.work)
    git("add", "--all", cwd=world.work)
    git("commit", "--quiet", "--message=first", cwd=world.work)
    monkeypatch.setenv("FAKES", str(folder / "fakes"))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(world.work)
    return world
