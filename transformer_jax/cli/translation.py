"""evaluate, translate, attention, compare: what a trained translator is worth."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from transformer_jax import verbs
from transformer_jax.attention_page import Heads
from transformer_jax.cli.verb import Verb, experiment_of_run, lines_of, out
from transformer_jax.compare import compare
from transformer_jax.config import DataConfig, DecodeConfig, TrainConfig, with_changes
from transformer_jax.curves import by_stem, numbered
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError
from transformer_jax.evaluate import Scored
from transformer_jax.logs import print_json, say
from transformer_jax.nn.weights import Weights
from transformer_jax.recipes import find_experiments
from transformer_jax.storage import folder_here, run_path
from transformer_jax.translate import Translation, Translator
from transformer_jax.trials import trials


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a run on its held-out test split, or on another test set, beside floors.

    Translators by BLEU and chrF, labels by the metrics of their task, everything else by the means of its objective.
    """

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")]
    test: str = ""
    """Another test set: files (pairs.tsv, pairs.jsonl, a.de,a.en) or a TFDS dataset."""
    by_position: bool = False
    """Of a language model, also the loss by how many tokens stood before: does it use its context?"""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TranslateOptions:
    """Translate with a trained run: a sentence, a file with one sentence a line, or standard input."""

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")]
    text: Annotated[str, tyro.conf.Positional] = ""
    """The sentence; without it, sentences are read from --file or standard input, one a line."""
    file: str = ""
    """Text file with one sentence a line."""
    attention_map: str = ""
    """PNG to draw: where each word of the (first) translation looks in the source."""
    weights: Weights = "float"
    """How matrices are held: float is the precision of the computation; int8 takes a byte a number, rounded."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class AttentionOptions:
    """Draw what a trained run looks at: one PNG for each kind of attention, and a page to explore all of it."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The sentence to read."""
    target: str = ""
    """The text to write, instead of the model's own translation."""
    kind: tuple[str, ...] = ()
    """Of attention, to draw as PNG: cross, encoder, decoder; by default all that the model has."""
    layer: tuple[int, ...] = ()
    """Layers to draw as PNG, numbered from 1; by default all."""
    head: Heads = "mean"
    """Heads to draw as PNG: their mean, all of them, or numbers from 1."""
    out: str = ""
    """Folder for the files; by default RUN/attention."""
    json: bool = False
    """Print one JSON object: tokens, layers and heads of each kind, and the files."""


@dataclass(frozen=True)
class CompareOptions:
    """Train several experiments on the same task with several seeds, and report what differs, with pictures.

    Typed again, it continues where it was interrupted.
    """

    data: DataConfig
    """What is changed here is changed for all."""
    train: TrainConfig
    seeds: int = 2
    """Runs of each experiment."""
    lengths: tuple[int, ...] = (64, 256, 1024)
    """Sequence lengths at which the speed of a training step is measured (translators)."""
    tokens: int = 2048
    """Tokens a side of a batch in that measurement."""
    out: str = ""
    """Folder for the runs and the report; by default runs/compare_PLAN."""
    json: bool = False
    """Print one JSON object."""


def _evaluate(run: str, options: EvaluateOptions) -> int:
    result = verbs.evaluate(run, options.test, options.decode, by_position=options.by_position)
    if options.json:
        print_json(result.report)
        return 0
    title = f"{run}, test: {result.report['test']}"
    if result.scored is None:
        out().print(_means(result.report, title))
        for stem, names in by_stem(result.report["scores"]).items():
            out().print()
            out().print(_by_number(result.report, stem, names))
        if options.by_position:
            out().print()
            out().print(_by_position(result.report["by_position"]))
    else:
        _print_translations(result.scored, result.samples, title)
    say(f"\nwritten: {', '.join(map(str, result.files))}")
    return 0


def _means(report: dict[str, Any], title: str) -> Table:
    """What a run that is no translator scores, each score above its floors."""
    table = Table("held out", "", title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("value", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in (name for name in report["scores"] if not numbered(name)):
        entries = {"model": report["scores"][score]}
        entries |= {floor: scores[score] for floor, scores in report["floors"].items() if score in scores}
        for name, entry in entries.items():
            interval = "{:.4f} to {:.4f}".format(*entry["interval"]) if entry["interval"] else ""
            first = name == "model"
            table.add_row(
                score if first else "", name, f"{entry['value']:.4f}", interval, style="bold" if first else ""
            )
    return table


def _by_number(report: dict[str, Any], stem: str, names: dict[int, str]) -> Table:
    """What is scored by a number, such as errors after k examples, beside its floors."""
    columns = {"model": report["scores"]} | report["floors"]
    table = Table(stem, box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for number, name in names.items():
        table.add_row(str(number), *(f"{of[name]['value']:.4f}" if name in of else "" for of in columns.values()))
    return table


def _by_position(groups: list[dict[str, Any]]) -> Table:
    """The loss by how many tokens stood before."""
    table = Table("tokens before", box=None, pad_edge=False)
    for name in ("tokens", "nll", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        before = str(group["first"]) if group["first"] == group["last"] else f"{group['first']} to {group['last']}"
        interval = "{:.4f} to {:.4f}".format(*group["interval"]) if group["interval"] else ""
        table.add_row(before, f"{group['tokens']:,}", f"{group['nll']:.4f}", interval)
    return table


def _print_translations(scored: Scored, samples: Sequence[int], title: str) -> None:
    console, scores = out(), scored.scores
    table = Table(f"{scores['model']['sentences']} held-out sentences", title=title, box=None, pad_edge=False)
    for column in ("BLEU", "95 %", "chrF", "95 % "):
        table.add_column(column, justify="right")
    for name, values in scores.items():
        cells = [f"{values['bleu']:.1f}", _interval(values["bleu_interval"])]
        cells += [f"{values['chrf']:.1f}", _interval(values["chrf_interval"])]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "model" else "")
    console.print(table)
    for metric in ("bleu", "chrf"):
        console.print(f"{metric}: {scores['model'][f'{metric}_signature']}", markup=False)
    measured = ", ".join(f"{name} {scores['model'][name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
    console.print(f"rouge: {measured} ({scores['model']['rouge_signature']})", markup=False)
    for i in samples:
        output = scored.translations[i]
        console.print(f"\n  source     {output.source}", markup=False)
        console.print(f"  reference  {scored.references[i]}", markup=False)
        console.print(f"  model      {output.text}", markup=False)


def _translate(run: str, options: TranslateOptions) -> int:
    if options.text and options.file:
        raise UserError("give a sentence or --file, not both.")
    if options.attention_map and not Path(options.attention_map).absolute().parent.is_dir():
        raise UserError(f"--attention-map {options.attention_map}: there is no such folder.")
    sentences = [options.text] if options.text else lines_of(options.file)
    translator = Translator.open(run_path(run), options.decode.average, options.weights)
    decode = options.decode
    if not options.text and not options.file and sys.stdin.isatty():
        decode = dataclasses.replace(decode, batch=1)  # a person is typing: answer every line
    outputs: list[Translation] = []
    for output in translator.translate(sentences, decode):
        if not outputs and options.attention_map:
            verbs.draw_attention(translator, output.source, output.text, Path(options.attention_map))
        outputs.append(output)
        if not options.json:
            sys.stdout.write(output.text + "\n")
            sys.stdout.flush()
    if options.json:
        print_json({"run": run, "translations": [dataclasses.asdict(output) for output in outputs]})
    if options.attention_map and outputs:
        say(f"written: {options.attention_map}")
    return 0


def _attention(run: str, options: AttentionOptions) -> int:
    choice: dict[str, Any] = {"kinds": options.kind, "layers": options.layer, "heads": options.head}
    drawn = verbs.attention(run, options.text, options.target, options.out or None, **choice)
    if options.json:
        maps = [
            {"kind": m.kind, "layers": len(m.weights_LNTS), "heads": m.weights_LNTS.shape[1]}
            | {"rows": m.rows, "columns": m.columns}
            for m in drawn.maps
        ]
        files = [str(file) for file in drawn.files]
        print_json({"run": run, "source": drawn.source, "target": drawn.target, "maps": maps, "files": files})
        return 0
    sys.stdout.write(f"{drawn.target}\n")
    say(f"written: {', '.join(map(str, drawn.files))}")
    return 0


def _compare_default(plan: str) -> CompareOptions:
    first = find_experiments(plan)[0]
    return CompareOptions(first.data, first.train)


def _compare(plan: str, options: CompareOptions) -> int:
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}.")
    experiments = with_changes(find_experiments(plan), {"data": options.data, "train": options.train})
    out = folder_here(options.out or f"runs/compare_{plan.rsplit(':', maxsplit=1)[-1]}", "a comparison")
    if all(isinstance(e.data, ParallelText) for e in experiments):
        files = compare(experiments, options.seeds, out, options.lengths, options.tokens)
    else:
        files = trials(experiments, options.seeds, out)
    if options.json:
        print_json(json.loads(files[-1].read_text(encoding="utf-8")))
    say(f"written: {', '.join(map(str, files))}")
    return 0


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"


VERBS = {
    "evaluate": Verb(
        "RUN",
        "score a trained run on held-out text",
        EvaluateOptions,
        lambda run: EvaluateOptions(experiment_of_run(run).decode),
        _evaluate,
    ),
    "translate": Verb(
        "RUN",
        "translate an argument, a file, or standard input",
        TranslateOptions,
        lambda run: TranslateOptions(experiment_of_run(run).decode),
        _translate,
    ),
    "attention": Verb(
        "RUN",
        "draw what each token looks at: PNGs, and a page to explore",
        AttentionOptions,
        lambda _: AttentionOptions(),
        _attention,
    ),
    "compare": Verb(
        "PLAN",
        "train several on the same text; report quality, speed, pictures",
        CompareOptions,
        _compare_default,
        _compare,
    ),
}
