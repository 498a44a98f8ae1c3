"""What must not be typed where others can read it: on a command line, in a manifest, in a log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformer_jax.errors import UserError

_NAMES = re.compile(r"(?i)(token|secret|password|passwd|passphrase|credential|private|api_?key|access_?key|auth)")
_VALUES = re.compile(
    r"hf_\w{20,}|sk-[\w-]{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abpr]-[\w-]{10,}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.|-----BEGIN"
)
_INSTEAD = "Put it into a file for --env-file, or name a stored secret with --secret."


def environment(pairs: Iterable[str]) -> dict[str, str]:
    """Read NAME=VALUE pairs of a command line.

    Raises:
        UserError: not of that form, or what looks like a secret: everybody on this machine can read a command line.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env {name}: an environment variable is given as NAME=VALUE.")
        if _NAMES.search(name) or _VALUES.search(value) or re.fullmatch(r"[0-9a-f]{32,}", value):
            raise UserError(f"--env {name}: this looks like a secret, and a command line is public. {_INSTEAD}")
        found[name] = value
    return found


def references(pairs: Iterable[str]) -> dict[str, str]:
    """Read NAME=REFERENCE pairs, where the reference names a secret in a store, and is not the secret."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(r"[\w./-]+", value):
            raise UserError(f"--secret {name}: it is given as VARIABLE=NAME_OF_THE_STORED_SECRET.")
        if _VALUES.search(value):
            raise UserError(f"--secret {name}: this is the secret itself; name the stored secret that holds it.")
        found[name] = value
    return found


def refuse_secrets(argv: Iterable[str]) -> None:
    """Raise `UserError` if an argument of the command to launch looks like a secret."""
    for word in argv:
        if _VALUES.search(word):
            raise UserError(f"the command holds what looks like a secret ('{word[:12]}...'). {_INSTEAD}")


def read_env_file(path: str) -> Mapping[str, str]:
    """Read lines NAME=VALUE; blank lines and those that begin with # are left out.

    Raises:
        UserError: no such file, a line of another form, or a file that others may read.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--env-file {path}: there is no such file.")
    if file.stat().st_mode & 0o077:
        raise UserError(f"--env-file {path}: others may read it; `chmod 600 {path}` first.")
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{path}:{number}: not of the form NAME=VALUE.")
        found[name] = value
    return found
