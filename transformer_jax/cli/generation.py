"""generate, prompt: what a decoder-only model writes, and what it answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from rich.table import Table

from transformer_jax.cli.verb import Verb, lines_of, out
from transformer_jax.completion import Completer
from transformer_jax.config import MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.fewshot import Outcome, chance, evaluate
from transformer_jax.generation import Completion, Generation, Speed
from transformer_jax.logs import print_json, say
from transformer_jax.nn.weights import Weights
from transformer_jax.provenance import provenance
from transformer_jax.storage import run_path
from transformer_jax.task_file import Task, read_task


@dataclass(frozen=True)
class GenerateOptions(Generation):
    """Continue a prompt with a trained decoder-only run; text is shown as it is written."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The prompt; empty begins a new text."""
    file: str = ""
    """Text file with a prompt a line instead (- reads standard input)."""
    draft: str = ""
    """Run folder of a smaller model that drafts for this one: greedy text and distribution stay the same."""
    draft_tokens: int = 4
    """Tokens it drafts at a time."""
    average: int = 1
    """Checkpoints whose parameters are averaged."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices; by default each holds the whole model."""
    weights: Weights = "float"
    """How matrices are held: float is the precision of the computation; int8 takes a byte a number, rounded."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class PromptOptions:
    """Ask a trained decoder-only run the questions of a task, with no, one or a few examples before each."""

    task: tyro.conf.Positional[str] = ""
    """Task file, or the name of one that ships with the library."""
    shots: tuple[int, ...] = (0, 1, 4)
    """Examples before each question; several numbers are compared."""
    seed: int = 0
    """Draws the examples of each question."""
    limit: int = 0
    """Ask the first few questions only; 0 asks all."""
    average: int = 1
    """Checkpoints whose parameters are averaged."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices; by default each holds the whole model."""
    out: str = ""
    """File for the result; by default RUN/prompt/TASK.json."""
    json: bool = False
    """Print one JSON object."""


def _generate(run: str, options: GenerateOptions) -> int:
    if options.text and options.file:
        raise UserError("give a prompt or --file, not both.")
    if options.logprobs and not options.json:
        raise UserError("--logprobs needs --json, which has a place for them.")
    # What a shell passes as two characters, \n, is meant as a line break.
    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in options.stop)
    generation = dataclasses.replace(options, stop=stop)
    opened = options.average, options.mesh, options.weights
    completer = Completer.open(run, *opened)
    if options.draft:
        completer = completer.drafted_by(Completer.open(options.draft, *opened), options.draft_tokens)
    prompts = list(lines_of(options.file.removeprefix("-"))) if options.file else [options.text]
    completer.check(prompts, generation, options.file or "the prompt")
    speed, rows = Speed(), []
    if options.json or len(prompts) * options.n > 1:
        for row in completer.complete_all(prompts, generation, speed):
            rows.append(row)
            if not options.json:
                say(f"prompt {prompts.index(row.prompt) + 1}, sample {row.sample + 1}:")
                sys.stdout.write(row.text + "\n")
                sys.stdout.flush()
    else:
        rows.append(Completion(prompts[0]))
        for _, piece in completer.stream(rows, generation, speed):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    if options.json:
        print_json({"run": run, "completions": [_row(completer, row) for row in rows], "speed": _speed(speed)})
    full = sum(row.finish == "context" for row in rows)
    say(
        f"{speed}"
        + (f"; {full} of {len(rows)} ended with the context of {completer.config.context} tokens" if full else "")
    )
    return 0


def _row(completer: Completer, row: Completion) -> dict[str, Any]:
    labels = completer.tokenizer.tokens
    shown = {"prompt": row.prompt, "sample": row.sample, "text": row.text, "finish": row.finish, "tokens": row.tokens}
    if row.score is not None:
        return shown | {"score": row.score}
    places = zip(labels(row.tokens), row.log_probs, row.ranked, strict=True)
    return shown | {
        "logprobs": [
            {"token": token, "logprob": log_prob}
            | ({"top": [{"token": labels([i])[0], "logprob": p} for i, p in ranked.items()]} if ranked else {})
            for token, log_prob, ranked in places
        ]
    }


def _speed(speed: Speed) -> dict[str, Any]:
    numbers = {"tokens": speed.tokens, "seconds": speed.seconds, "tokens_per_second": speed.rate}
    return numbers | ({"drafted": speed.drafted, "acceptance": speed.acceptance} if speed.drafted else {})


def _prompt(run: str, options: PromptOptions) -> int:
    if not options.task:
        raise UserError("tjax prompt needs a task after the run: tjax prompt RUN TASK.")
    task = read_task(options.task)
    file = run_path(options.out or run_path(run) / "prompt" / f"{task.name}.json")
    completer = Completer.open(run, options.average, options.mesh)
    outcomes = list(evaluate(completer, task, options.shots, options.seed, options.limit))
    report = _report(run, task, options, outcomes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.json:
        print_json(report)
    else:
        out().print(_table(run, task, outcomes))
    say(f"written: {file}")
    return 0


def _report(run: str, task: Task, options: PromptOptions, outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "run": run,
        "task": task.name,
        "kind": task.kind,
        "source": task.source,
        "licence": task.licence,
        "seed": options.seed,
        "questions": len(outcomes[0].items),
        "chance": chance(task),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "provenance": provenance(),
    }


def _table(run: str, task: Task, outcomes: list[Outcome]) -> Table:
    title = f"{task.name}: {len(outcomes[0].items)} questions to {run}; in brackets 95 % intervals"
    table = Table("shots", title=title, title_justify="left", box=None, pad_edge=False)
    for name in outcomes[0].scores:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        cells = [f"{m.value:.3g} ({m.low:.3g} to {m.high:.3g})" for m in outcome.scores.values()]
        table.add_row(str(outcome.shots), *cells)
    if (blind := chance(task)) is not None:
        table.add_row("chance", f"{blind:.3g}", style="dim")
    return table


VERBS = {
    "generate": Verb(
        "RUN",
        "continue a prompt, or a file of them, as text comes",
        GenerateOptions,
        lambda _: GenerateOptions(),
        _generate,
    ),
    "prompt": Verb(
        "RUN TASK",
        "answer a task with no, one or a few examples before each question",
        PromptOptions,
        lambda _: PromptOptions(),
        _prompt,
    ),
}
