"""What the fake programs share: the record of calls, the scenario, and what lasts between two calls."""

import json
import os
import sys
from pathlib import Path

FAKES = Path(os.environ["FAKES"])


def called(program):
    """Write down one call."""
    with (FAKES / "calls.jsonl").open("a") as file:
        file.write(json.dumps([program, *sys.argv[2:]]) + "\n")


def scenario(key, default=None):
    path = FAKES / "scenario.json"
    return json.loads(path.read_text()).get(key, default) if path.exists() else default


def recall(key, default):
    path = FAKES / "memory.json"
    return json.loads(path.read_text()).get(key, default) if path.exists() else default


def remember(key, value):
    path = FAKES / "memory.json"
    memory = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(memory | {key: value}))


def take_turn(key, turns):
    """Return the next of several answers; the last one is given for ever."""
    turn = recall(key, 0)
    remember(key, turn + 1)
    return turns[min(turn, len(turns) - 1)]


def refuse(message, code=1):
    sys.stderr.write(message + "\n")
    sys.exit(code)


def option(name, default=None):
    """Return the value of --name=value."""
    for word in sys.argv[2:]:
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return default
