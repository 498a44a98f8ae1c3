"""Several translators trained on the same text, side by side: what attention and parallelism are worth.

Trains every recipe with every seed (an interrupted comparison goes on where it stood), and writes one report:
BLEU and its dependence on sentence length, loss against steps and against seconds, speed against sequence length,
translations, alignments.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.bench.batches import context_of, sized
from transformer_jax.bench.train import step_seconds
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.evaluate import parallel_text, scores_of
from transformer_jax.logs import read_metrics, say
from transformer_jax.loop import train_to_the_end
from transformer_jax.metrics import bleu, copy_source, nearest_neighbour
from transformer_jax.nn.module import parameter_count
from transformer_jax.plots import Curve, attention_grid, curves
from transformer_jax.provenance import provenance
from transformer_jax.report import table, write_report
from transformer_jax.translate import Translator

Pair = tuple[str, str]

SAMPLES = 5
"""Held-out sentences whose translations are printed."""

TIMED = 3
"""Steps in a measurement of speed, after one that compiles."""


@dataclass(frozen=True)
class Contestant:
    """One recipe, trained with every seed."""

    name: str
    parameters: int
    runs: list[Path]
    hypotheses: list[list[str]]
    """Translations of the test set, by seed."""


def compare(
    experiments: Sequence[Experiment], seeds: int, out: Path, lengths: Sequence[int], tokens: int = 2048
) -> list[Path]:
    """Train, score and draw. Data, decoding and schedule are those of each experiment; the data must be the same.

    Args:
        experiments: what to compare.
        seeds: runs of each, with train.seed 0 ... seeds - 1.
        out: folder for `runs/` and the report.
        lengths: sequence lengths at which speed is measured, on random tokens; a model whose context is shorter
            is left out there.
        tokens: tokens of a batch in that measurement.

    Returns:
        The report as Markdown, as HTML, and its figures as JSON.

    Raises:
        UserError: the experiments are trained on different data, or as `train_to_the_end`.
    """
    data = parallel_text(experiments[0])
    for other in experiments[1:]:
        if replace(parallel_text(other), tokenizer=data.tokenizer) != data:
            raise UserError(f"'{other.name}' and '{experiments[0].name}' are trained on different data.")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    opened = data.open(experiments[0].model.vocab_size)
    train, test = opened.pairs("train"), opened.pairs("test")
    contestants = [_contest(experiment, seeds, out / "runs", test) for experiment in experiments]
    references = [reference for _, reference in test]
    floors = {
        "copy the source": copy_source(test),
        "nearest neighbour": nearest_neighbour(train, [source for source, _ in test]),
    }
    texts = {c.name: c.hypotheses for c in contestants} | {name: [floor] for name, floor in floors.items()}
    results = {name: [scores_of(h, references, data.target) for h in each] for name, each in texts.items()}
    by_length = _by_length(contestants, test, data.target)
    speed = {e.name: {t: _speed(e, t, tokens) for t in lengths if t <= context_of(e)} for e in experiments}
    _draw(contestants, by_length, speed, out)
    figures = {
        "scores": results,
        "parameters": {c.name: c.parameters for c in contestants},
        "bleu_by_source_words": by_length,
        "tokens_per_second_by_length": speed,
        "training": {c.name: _training(c) for c in contestants},
        "data": opened.summary(),
        "experiments": [json.loads(e.to_json()) for e in experiments],
        "minutes": (time.monotonic() - began) / 60,
        "provenance": provenance(),
    }
    path = out / "compare.json"
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sections = _sections(figures, contestants, test, lengths, tokens) + _alignments(contestants, test, out)
    return [*write_report("Translation, side by side", sections, out), path]


def _contest(experiment: Experiment, seeds: int, folder: Path, test: list[Pair]) -> Contestant:
    runs, hypotheses, parameters = [], [], 0
    for seed in range(seeds):
        run = folder / f"{experiment.name}-seed{seed}"
        train_to_the_end(replace(experiment, train=replace(experiment.train, seed=seed)), run)
        translator = Translator.open(run)
        say(f"translating {len(test)} sentences with {run}")
        # In order of length, so that a batch is not padded to its one long sentence.
        order = sorted(range(len(test)), key=lambda i: len(test[i][0]))
        outputs = translator.translate([test[i][0] for i in order])
        texts = dict(zip(order, (output.text for output in outputs), strict=True))
        hypotheses.append([texts[i] for i in range(len(test))])
        runs.append(run)
        parameters = parameter_count(translator.params)
    return Contestant(experiment.name, parameters, runs, hypotheses)


def _by_length(contestants: list[Contestant], test: list[Pair], language: str) -> dict[str, Any]:
    """BLEU in five classes of equal size by the words of the source: per class, the mean words and a score a seed."""
    words = np.array([len(source.split()) for source, _ in test])
    edges = np.unique(np.quantile(words, [0.2, 0.4, 0.6, 0.8]))
    classes = np.searchsorted(edges, words, side="right")
    members = [np.flatnonzero(classes == c) for c in range(len(edges) + 1)]
    members = [rows for rows in members if len(rows)]

    def scores(hypotheses: list[str]) -> list[float]:
        parts = [bleu([hypotheses[i] for i in rows], [test[i][1] for i in rows], language) for rows in members]
        return [float(part["bleu"]) for part in parts]  # type: ignore[arg-type]

    return {
        "words": [float(words[rows].mean()) for rows in members],
        "sentences": [len(rows) for rows in members],
        "bleu": {c.name: [scores(h) for h in c.hypotheses] for c in contestants},
    }


def _speed(experiment: Experiment, length: int, tokens: int) -> float:
    """Target tokens a second of the training step at one length, from the fastest of a few steps."""
    multiple = experiment.data.rows_multiple
    rows = max(tokens // length // multiple, 1) * multiple
    _, seconds = step_seconds(sized(experiment, rows, length), TIMED)
    rate = rows * length / min(seconds)
    say(f"{experiment.name}: {rate:,.0f} tokens/s at length {length}")
    return rate


def _training(contestant: Contestant) -> dict[str, float]:
    """Median training speed, and mean seconds and best validation loss of the runs."""
    records = [read_metrics(run) for run in contestant.runs]
    rates = [r["tokens_per_second"] for run in records for r in run if r["split"] == "train"]
    best = [min(r["nll"] for r in run if r["split"] == "validation") for run in records]
    return {
        "tokens_per_second": statistics.median(rates),
        "seconds": statistics.mean(run[-1]["seconds"] for run in records),
        "validation_nll": statistics.mean(best),
    }


def _draw(
    contestants: list[Contestant], by_length: dict[str, Any], speed: dict[str, dict[int, float]], out: Path
) -> None:
    words = by_length["words"]
    lengths = [Curve(c.name, words, by_length["bleu"][c.name]) for c in contestants]
    curves(lengths, out / "bleu_by_length.png", "words in the source (mean of a fifth of the test set)", "BLEU")
    for axis, label in (("step", "steps"), ("seconds", "seconds of training, compiling included")):
        losses = []
        for contestant in contestants:
            runs = [[r for r in read_metrics(run) if r["split"] == "validation"] for run in contestant.runs]
            x = np.mean([[r[axis] for r in run] for run in runs], axis=0)
            losses.append(Curve(contestant.name, x.tolist(), [[r["nll"] for r in run] for run in runs]))
        curves(losses, out / f"loss_by_{axis}.png", label, "validation loss (nats a token)")
    rates = [Curve(name, list(by), [list(by.values())]) for name, by in speed.items() if by]
    curves(rates, out / "speed_by_length.png", "sequence length (tokens)", "tokens/s", log=True)


def _alignments(contestants: list[Contestant], test: list[Pair], out: Path) -> list[str]:
    """Draw where each model looks while it is made to write the reference of one test sentence."""
    # Long enough to show an order, short enough to read.
    sample = min(test, key=lambda pair: (abs(len(pair[0].split()) - 9), abs(len(pair[1].split()) - 7), pair))
    panels: dict[str, np.ndarray] = {}
    own: dict[str, np.ndarray] = {}
    rows: list[str] = []
    columns: list[str] = []
    for contestant in contestants:
        weights, columns, rows = Translator.open(contestant.runs[0]).attention(*sample)
        if "cross" in weights:
            panels[contestant.name] = weights["cross"][-1].mean(0)
        if "encoder" in weights:
            last_NTS = weights["encoder"][-1]
            own |= {f"{contestant.name}: encoder, head {i + 1}": head for i, head in enumerate(last_NTS)}
    sections = []
    if panels:
        attention_grid(panels, rows, columns, out / "alignment.png", f"{sample[0]} → {sample[1]}", across=2)
        sections.append(
            "## Alignment\n\nWhere each model looks (the mean of the heads of its last decoder layer) while it is made "
            f"to write the reference of “{sample[0]}”.\n\n![alignment](alignment.png)"
        )
    if own:
        attention_grid(own, columns, columns, out / "self_attention.png", sample[0], across=2)
        sections.append("## Self-attention, by head\n\n![self-attention](self_attention.png)")
    return sections


def _sections(
    figures: dict[str, Any], contestants: list[Contestant], test: list[Pair], lengths: Sequence[int], tokens: int
) -> list[str]:
    """The report: every number in it stands in `figures`."""
    data, where = figures["data"], figures["provenance"]
    rows = []
    for name, seeds in figures["scores"].items():
        scores = [seed["bleu"] for seed in seeds]
        low, high = np.mean([seed["bleu_interval"] for seed in seeds], axis=0)
        training = figures["training"].get(name)
        rows.append(
            [
                name,
                f"{figures['parameters'][name]:,}" if training else "",
                f"{np.mean(scores):.1f}",
                f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else "",
                f"{low:.1f} to {high:.1f}",
                *(f"{np.mean([seed[score] for seed in seeds]):.1f}" for score in ("chrf", "rougeL")),
                f"{training['validation_nll']:.3f}" if training else "",
                f"{training['tokens_per_second']:,.0f}" if training else "",
                f"{training['seconds']:.0f}" if training else "",
            ]
        )
    header = ["model", "parameters", "BLEU", "over seeds", "95 % (test set)", "chrF", "ROUGE-L", "validation loss"]
    seeds, first = len(contestants[0].runs), figures["scores"][contestants[0].name][0]
    steps = figures["experiments"][0]["train"]["steps"]
    intro = (
        f"{data['pairs']['train']:,} training pairs, {steps} steps, {seeds} seed(s); {data['pairs']['test']} test "
        f"sentences held out by group; {where['devices']} x {where['device']} ({where['cores']} cores); "
        f"jax {where['versions']['jax']}; "
        f"commit {where['commit']}; {where['time']}; {figures['minutes']:.1f} minutes. "
        f"Command: `{' '.join(where['command'])}`. "
        f"Signatures: `{first['bleu_signature']}`, `{first['rouge_signature']}`."
    )
    return [
        intro,
        "## Scores\n\n" + table([*header, "tokens/s", "seconds"], rows),
        "## BLEU by length of the source\n\nEach point is a fifth of the test set; the band spans the seeds.\n\n"
        "![BLEU by length](bleu_by_length.png)",
        "## Loss against steps and against seconds\n\n![loss against steps](loss_by_step.png)\n"
        "![loss against seconds](loss_by_seconds.png)",
        "## Speed against sequence length\n\n"
        f"Training steps of {tokens} random tokens a side, the fastest of {TIMED}.\n\n"
        "![tokens/s against length](speed_by_length.png)\n\n"
        + table(
            ["model", *map(str, lengths)],
            [
                [name, *(f"{by[t]:,.0f}" if t in by else "beyond its context" for t in lengths)]
                for name, by in figures["tokens_per_second_by_length"].items()
            ],
        ),
        "## Translations\n\n" + _translations(contestants, test),
    ]


def _translations(contestants: list[Contestant], test: list[Pair]) -> str:
    positions = np.linspace(0, len(test) - 1, SAMPLES).astype(int)
    rows = []
    for i in positions:
        rows += [["**source**", f"**{test[i][0]}**"], ["reference", test[i][1]]]
        rows += [[c.name, c.hypotheses[0][i]] for c in contestants]
    return table(["", ""], rows)
