"""`tjax VERB ...`: one thin subcommand per verb.

Results go to standard output, everything else to standard error; with --json, standard output is one JSON object.
Bad input ends with one line and exit code 2, an interrupted run with 128 + the signal's number.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from transformer_jax import compilation_cache, heap
from transformer_jax.cli import (
    benchmarks,
    exchange,
    generation,
    launching,
    planning,
    reading,
    scaling,
    training,
    translation,
)
from transformer_jax.cli.verb import Verb
from transformer_jax.distributed import part
from transformer_jax.errors import Interrupted, UserError, closest
from transformer_jax.logs import say

VERBS: dict[str, Verb] = (
    training.VERBS
    | translation.VERBS
    | reading.VERBS
    | generation.VERBS
    | benchmarks.VERBS
    | planning.VERBS
    | launching.VERBS
    | exchange.VERBS
    | scaling.VERBS
)

_CONFIG: Any = jax.config  # its settings are attributes that a type checker does not see

EPILOGUE = """
RECIPE and PLAN are names that `tjax list` shows, or FILE.py:function; RUN is the folder that `tjax train` printed.
`tjax VERB --help` explains a verb, `tjax train RECIPE --help` lists every setting of a recipe.
"""


def usage() -> str:
    """Return what `tjax --help` prints."""
    lines = [f"  {f'tjax {name} {verb.target}':32}{verb.summary}" for name, verb in VERBS.items()]
    return "usage: tjax VERB ...\n\n" + "\n".join(lines) + "\n" + EPILOGUE


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(_run(argv))
    except UserError as error:
        say(f"tjax: {error}")
        part(2)
        sys.exit(2)
    except Interrupted as stop:
        say(f"stopped by {stop.signal}; the same command continues")
        sys.exit(128 + signal.Signals[stop.signal])
    except KeyboardInterrupt:
        say("tjax: interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        sys.exit(1)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        raise UserError(f"there is no verb '{name}'.{closest(name, VERBS)} `tjax --help` lists them.")
    compilation_cache.keep()
    heap.keep()
    if heap.on_cpu() and find_spec("libtpu") and not _CONFIG.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # libtpu, here for its compiler, complains if it finds no TPU
    return VERBS[name].call(name, rest)
