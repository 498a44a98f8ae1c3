"""Prompting in the manner of GPT-3: no, one or a few examples before each question, and no training (Brown 2020).

Three kinds of task, scored as in section 2.4 of the paper:

    choice       the likelihood of each given answer: of all of it ("sum"), per token ("token"), and relative to its
                 likelihood after words that say nothing, P(answer | context) / P(answer | "Answer:") ("unconditional")
    completion   what is written until a stop string: exact match and F1 of words (Rajpurkar 2016). Greedy, where the
                 paper takes 4 beams
    last_word    the first word written after a passage that lacks its last one, as in LAMBADA (Paperno 2016), and the
                 perplexity of the true one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from transformer_jax.completion import Completer
from transformer_jax.errors import UserError
from transformer_jax.generation import Generation
from transformer_jax.logs import console
from transformer_jax.task_file import WORD, Normalisation, Task
from transformer_jax.task_metrics import interval, squad

NORMALISATIONS: Final[tuple[Normalisation, ...]] = ("sum", "token", "unconditional")
RESAMPLES: Final = 1000
"""Of the bootstrap."""
BATCH: Final = 64
"""Questions between two updates of the progress bar."""
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Measured:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """What a number of shots gave."""

    shots: int
    scores: dict[str, Measured]
    """The first is the one that counts."""
    items: list[dict[str, Any]]
    """Each question's answer, as the model gave it, and what it was worth."""


def evaluate(
    completer: Completer, task: Task, shots: Sequence[int] = (0, 1, 4), seed: int = 0, limit: int = 0
) -> Iterator[Outcome]:
    """Ask the questions of a task, with so many examples before each, drawn by `seed`; `limit` asks the first few.

    Raises:
        UserError: more shots than there are examples, or prompts that the model cannot read; before any is asked.
    """
    if limit < 0:
        raise UserError(f"--limit must not be negative, got {limit}; 0 asks all questions.")
    pool = len(task.train) or len(task.test) - 1
    if not shots or min(shots) < 0 or max(shots) > pool:
        raise UserError(f"--shots must lie between 0 and the {pool} examples of {task.name}, got {list(shots)}.")
    questions = range(min(limit or len(task.test), len(task.test)))
    prompts = {n: [task.prompt(question, n, seed) for question in questions] for n in shots}
    for n in shots:
        _check_length(completer, task, n, prompts[n])
    return (_outcome(completer, task, n, prompts[n]) for n in shots)


def _check_length(completer: Completer, task: Task, shots: int, prompts: list[str]) -> None:
    answers = [item.choices or (item.parts(task.blank)[1],) for item in task.test[: len(prompts)]]
    pairs = [(prompt, answer) for prompt, texts in zip(prompts, answers, strict=True) for answer in texts]
    longest = max(len(before) + len(after) for before, after in completer.encoder.encode_pairs(pairs))
    if longest > completer.config.context:
        raise UserError(
            f"{task.name} with {shots} shots makes texts of up to {longest} tokens, but the model reads at most "
            f"{completer.config.context}; ask with fewer."
        )


def _outcome(completer: Completer, task: Task, shots: int, prompts: list[str]) -> Outcome:
    ask = {"choice": _choose, "completion": _complete, "last_word": _guess}[task.kind]
    items: list[dict[str, Any]] = []
    batches = range(0, len(prompts), BATCH)
    # On a terminal a bar, elsewhere nothing until it is done.
    for first in track(batches, f"{shots} shots", console=console, transient=True, disable=not console.is_terminal):
        items += ask(completer, task, first, prompts[first : first + BATCH])
    return Outcome(shots, _scores(task, items), items)


def _choose(completer: Completer, task: Task, first: int, prompts: list[str]) -> list[dict[str, Any]]:
    questions = task.test[first : first + len(prompts)]
    pairs = [(p, choice) for p, question in zip(prompts, questions, strict=True) for choice in question.choices]
    texts = sorted({choice for _, choice in pairs})
    alone = dict(zip(texts, completer.score([(task.answer_context, choice) for choice in texts]), strict=True))
    scores = iter(completer.score(pairs))
    items = []
    for question in questions:
        found = [next(scores) for _ in question.choices]
        by = {
            "sum": [score.log_prob for score in found],
            "token": [score.log_prob / len(score.log_probs) for score in found],
            "unconditional": [
                score.log_prob - alone[choice].log_prob for choice, score in zip(question.choices, found, strict=True)
            ],
        }
        chosen = {name: int(np.argmax(values)) for name, values in by.items()}
        items.append({"answer": question.answer, "chosen": chosen, "log_probs": by["sum"]})
    return items


def _complete(completer: Completer, task: Task, first: int, prompts: list[str]) -> list[dict[str, Any]]:
    items = []
    for question, text in zip(task.test[first:], _written(completer, task, prompts), strict=False):
        scored = squad({"": text}, {"": question.answers})
        items.append({"answers": list(question.answers), "written": text})
        items[-1] |= {name: scored[name] / 100 for name in ("exact", "f1")}
    return items


def _guess(completer: Completer, task: Task, first: int, prompts: list[str]) -> list[dict[str, Any]]:
    words = [item.parts(task.blank)[1] for item in task.test[first : first + len(prompts)]]
    scores = completer.score(list(zip(prompts, words, strict=True)))
    items = []
    for word, score, text in zip(words, scores, _written(completer, task, prompts), strict=True):
        guess = found[0] if (found := WORD.search(text)) else ""
        items.append({"answer": word.strip(), "guess": guess, "log_prob": score.log_prob})
    return items


def _written(completer: Completer, task: Task, prompts: list[str]) -> list[str]:
    greedy = Generation(max_tokens=task.max_tokens, temperature=0.0, stop=task.stop)
    return [row.text.strip() for row in completer.complete_all(prompts, greedy)]


def _scores(task: Task, items: list[dict[str, Any]]) -> dict[str, Measured]:
    if task.kind == "completion":
        return {name: bootstrap(np.asarray([item[name] for item in items]), np.mean) for name in ("exact", "f1")}
    if task.kind == "last_word":
        right = sum(item["guess"] == item["answer"] for item in items)
        log_prob_B = np.asarray([item["log_prob"] for item in items])
        perplexity = bootstrap(log_prob_B, lambda x: math.exp(min(-float(np.mean(x)), 700.0)))
        return {"accuracy": wilson(right, len(items)), "perplexity": perplexity}
    names = sorted(NORMALISATIONS, key=lambda name: name != task.normalisation)
    right = {name: sum(item["chosen"][name] == item["answer"] for item in items) for name in names}
    return {f"accuracy_{name}": wilson(right[name], len(items)) for name in names}


def chance(task: Task) -> float | None:
    """Return the accuracy of guessing blindly, where there are choices."""
    return float(np.mean([1 / len(item.choices) for item in task.test])) if task.kind == "choice" else None


def wilson(right: int, total: int) -> Measured:
    """Return a share with its score interval (Wilson 1927), which is honest for few questions and near 0 and 1."""
    from scipy.stats import binomtest  # noqa: PLC0415 - takes half a second

    found = binomtest(right, total).proportion_ci(method="wilson")
    return Measured(right / total, float(found.low), float(found.high))


def bootstrap(values_B: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], Any]) -> Measured:
    """Return a statistic of the questions with percentiles over resamples of them (Efron and Tibshirani 1993)."""
    low, high = interval(lambda chosen: statistic(values_B[chosen]), len(values_B), RESAMPLES, 0)
    return Measured(float(statistic(values_B)), float(low), float(high))
