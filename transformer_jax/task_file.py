"""Task files for prompting: questions, answers, and examples of how to answer."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import cattrs
from cattrs.v import format_exception

from transformer_jax.data.files import json_object
from transformer_jax.errors import UserError, closest

Kind = Literal["choice", "completion", "last_word"]
Normalisation = Literal["sum", "token", "unconditional"]
WORD: Final = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?")
"""A word of any script, with apostrophes and hyphens inside."""


@dataclass(frozen=True)
class Item:
    """One question, or one example of how to answer; each kind of task has fields of its own."""

    context: str = ""
    """choice, completion: what comes before the answer."""
    choices: tuple[str, ...] = ()
    """choice: answers to choose from, each with the blank it begins with."""
    answer: int = 0
    """choice: number of the right one, from 0."""
    answers: tuple[str, ...] = ()
    """completion: texts that count as right; examples show the first, after a blank."""
    text: str = ""
    """last_word: a passage that ends in the word to guess."""

    def parts(self, blank: str) -> tuple[str, str]:
        """Return what is read, and the right way to go on."""
        if self.choices:
            return self.context, self.choices[self.answer]
        if self.answers:
            return self.context, f" {self.answers[0]}"
        head, _, word = self.text.rpartition(" ")
        return head.rstrip() + blank, f" {word}"


@dataclass(frozen=True)
class Task:
    """A task file: one JSON object, or JSON lines with this head first and one item with its `split` on each other."""

    name: str
    kind: Kind
    about: str = ""
    source: str = ""
    licence: str = ""
    instruction: str = ""
    """Text before the examples."""
    separator: str = "\n\n"
    """Between instruction, examples and question."""
    blank: str = ""
    """What stands for the missing word of a passage: " ____. ->" makes it a fill-in (Brown 2020, section 3.1.1)."""
    normalisation: Normalisation = "token"
    """The one that counts, of the three that are reported."""
    answer_context: str = "Answer:"
    """What the unconditional likelihood is taken after."""
    stop: tuple[str, ...] = ("\n",)
    """Strings before which what is written ends."""
    max_tokens: int = 16
    train: tuple[Item, ...] = ()
    """Where examples are drawn from; if empty, from the other questions."""
    test: tuple[Item, ...] = ()

    def check(self, where: str) -> None:
        """Raise `UserError` naming the first item that does not fit the kind."""
        for part, items in (("train", self.train), ("test", self.test)):
            for number, item in enumerate(items, 1):
                fits = {
                    "choice": len(item.choices) > 1 and 0 <= item.answer < len(item.choices),
                    "completion": bool(item.answers) and bool(item.context),
                    "last_word": bool(WORD.fullmatch(item.text.rpartition(" ")[2])) and " " in item.text.strip(),
                }
                if not fits[self.kind]:
                    needs = {
                        "choice": "two choices or more, and which is the answer",
                        "completion": "a context and answers",
                        "last_word": "a text of several words that ends in a word, without punctuation after it",
                    }
                    raise UserError(f"{where}: {part} item {number} of a {self.kind} task needs {needs[self.kind]}.")
        if not self.test:
            raise UserError(f"{where}: there is no test item.")

    def examples(self, question: int, shots: int, seed: int) -> list[Item]:
        """Draw the examples for a question; more shots add to those of fewer."""
        pool = self.train or self.test
        asked = self.test[question]
        rest = [item for item in pool if item.parts("") != asked.parts("")]
        return random.Random(f"{seed} {question}").sample(rest, len(rest))[:shots]

    def prompt(self, question: int, shots: int, seed: int) -> str:
        """Return what is read before the answer to a question."""
        shown = ["".join(item.parts(self.blank)) for item in self.examples(question, shots, seed)]
        return self.separator.join(filter(None, [self.instruction, *shown, self.test[question].parts(self.blank)[0]]))


def bundled_tasks() -> dict[str, Path]:
    """Return the tasks that ship with the library, by name."""
    folder = Path(str(resources.files("transformer_jax") / "tasks"))
    return {path.stem: path for path in sorted(folder.glob("*.json*"))}


def read_task(name: str | Path) -> Task:
    """Read a task file, or a task that ships with the library by its name.

    Raises:
        UserError: there is none, or it is malformed; the message names file, line and field.
    """
    path = Path(name)
    if not path.is_file():
        known = bundled_tasks()
        if str(name) not in known:
            hint = closest(str(name), known) or f" Tasks by name: {', '.join(known)}."
            raise UserError(f"{name}: there is no such task file.{hint}")
        path = known[str(name)]
    text = path.read_text(encoding="utf-8")
    value = _lines(text, path) if path.suffix == ".jsonl" else json_object(text, str(path))
    try:
        task = cattrs.Converter(forbid_extra_keys=True).structure(value, Task)
    except cattrs.BaseValidationError as error:
        reasons = cattrs.transform_error(error, path="task", format_exception=format_exception)
        raise UserError(f"{path}: {'; '.join(reasons)}") from error
    task.check(str(path))
    return task


def _lines(text: str, path: Path) -> dict[str, Any]:
    head, *items = [
        json_object(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
    ] or [{}]
    for number, item in enumerate(items, 2):
        split = item.pop("split", "test")
        if split not in ("train", "test"):
            raise UserError(f"{path}:{number}: split must be train or test, got '{split}'.")
        head.setdefault(split, []).append(item)
    return head
