"""One step of a launch: what it is for, what runs, and how the terminal would see it typed."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformer_jax.launch.vendors import explain
from transformer_jax.logs import console, say

WIDTH = 100
"""A printed command that is longer is broken at its options."""


GONE = ("NOT_FOUND", "NotFound", "Invalid job id", "matched no objects", "No such process")
"""What programs say of something that is not there any more."""


@dataclass(frozen=True)
class Command:
    """One step: files to write, then one program to run; either may be absent."""

    purpose: str
    """One line, for people."""
    argv: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Path -> content, written before the program runs."""
    until: str = ""
    """Run again every 30 s until it prints this line."""
    accept: Callable[[str], None] | None = None
    """Reads what was printed; raises `UserError` if it will not do."""
    background: bool = False
    """A shell goes on while it runs."""
    lenient: tuple[str, ...] = ()
    """A failure whose message holds one of these is none; ("",) for any."""

    def script(self) -> str:
        """Return the step as lines of shell that do the same, ready to be pasted."""
        lines = [f"# {self.purpose}"]
        for path, content in self.files.items():
            text = content if content.endswith("\n") else content + "\n"
            lines.append(f"mkdir -p {shlex.quote(str(Path(path).parent))}")
            lines.append(f"cat > {shlex.quote(path)} <<'END_OF_FILE'\n{text}END_OF_FILE")
        if self.argv and self.until:
            lines.append(f'until [ "$({shell(self.argv)})" = {shlex.quote(self.until)} ]; do sleep 30; done')
        elif self.argv:
            ending = " &" if self.background else " || true" if self.lenient else ""
            lines.append(shell(self.argv, broken=True) + ending)
        return "\n".join(lines)


def shell(argv: Iterable[str], *, broken: bool = False) -> str:
    """Quote a command for the shell, `--option=value` with only its value in quotes; broken into lines if long."""
    words = [_quote(word) for word in argv]
    line = " ".join(words)
    if not broken or len(line) <= WIDTH:
        return line
    lines = [[words[0]]]
    for word in words[1:]:
        if word.startswith("--") and word != "--":
            lines.append([word])
        else:
            lines[-1].append(word)
    return " \\\n    ".join(" ".join(part) for part in lines)


def _quote(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and name.startswith("--") and shlex.quote(name) == name:
        return f"{name}={shlex.quote(value)}"
    return shlex.quote(word)


@dataclass(frozen=True)
class Answer:
    """What a program said."""

    code: int
    out: str
    err: str


def ask(argv: tuple[str, ...]) -> Answer:
    """Run a program and return what it said, whatever it said; raises `UserError` if there is no such program."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise explain(argv, 127, "") from error
    return Answer(done.returncode, done.stdout, done.stderr)


def execute(command: Command, log: Path | None = None, every: float = 30.0) -> str:
    """Take one step; what its program prints is appended to `log` and returned.

    Raises:
        UserError: the program failed; the message says why in one line and how to mend it.
    """
    for path, content in command.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content, encoding="utf-8")
    if not command.argv:
        return ""
    while True:
        answer = ask(command.argv)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {shell(command.argv)}\n{answer.out}{answer.err}")
        text = answer.err or answer.out
        if answer.code and not any(words in text for words in command.lenient):
            raise explain(command.argv, answer.code, text)
        if command.accept is not None:
            command.accept(answer.out)
        if not command.until or answer.out.strip() == command.until:
            return answer.out
        time.sleep(every)


def execute_all(commands: Iterable[Command], log: Path, every: float = 30.0) -> str:
    """Take the steps in order, saying which one is under way; returns what the last one printed."""
    commands, printed = list(commands), ""
    for number, command in enumerate(commands, 1):
        title = f"[{number}/{len(commands)}] {command.purpose}"
        began = time.monotonic()
        if console.is_terminal:
            with console.status(title):
                printed = execute(command, log, every)
        else:
            say(title)
            printed = execute(command, log, every)
        if console.is_terminal:
            say(f"{title}  ({time.monotonic() - began:.0f} s)")
    return printed
