"""Several experiments on the same task, each with several seeds, scored on held-out data side by side.

What differs between them (a pre-trained start, a head, a size) is what the report is about. An interrupted trial goes
on where it stood. Translators have a richer report of their own (`compare.py`).

`trials.json`, the curves of all seeds included, is what `tjax show RUN --against FILE` compares another run with.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.checkpoint import steps_of
from transformer_jax.config import Experiment
from transformer_jax.curves import compact_json, draw_curves, draw_numbered, learning_curves, numbered
from transformer_jax.held_out import held_out
from transformer_jax.loop import train_to_the_end
from transformer_jax.provenance import provenance
from transformer_jax.report import table, write_report


def trials(experiments: Sequence[Experiment], seeds: int, out: Path) -> list[Path]:
    """Train and score every experiment with seeds 0 ... seeds - 1; write a report.

    Returns:
        The report as Markdown, as HTML, and its figures as JSON.

    Raises:
        UserError: as `train_to_the_end` and `held_out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    reports: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[Path]] = {}
    for experiment in experiments:
        for seed in range(seeds):
            run = out / "runs" / f"{experiment.name}-seed{seed}"
            train_to_the_end(replace(experiment, train=replace(experiment.train, seed=seed)), run)
            runs.setdefault(experiment.name, []).append(run)
            reports.setdefault(experiment.name, []).append(_scored(run))
    figures: dict[str, Any] = {
        "scores": {
            name: {metric: [r["scores"][metric] for r in each] for metric in each[0]["scores"]}
            for name, each in reports.items()
        },
        "floors": {name: each[0]["floors"] for name, each in reports.items()},
        "data": {name: each[0]["data"] for name, each in reports.items()},
        "curves": {name: learning_curves(folders) for name, folders in runs.items()},
        "experiments": [json.loads(e.to_json()) for e in experiments],
        "minutes": (time.monotonic() - began) / 60,
        "provenance": provenance(),
    }
    path = out / "trials.json"
    path.write_text(compact_json(figures), encoding="utf-8")
    draw_curves(figures["curves"], out / "curves.png")
    floors = {floor: [scores] for of in figures["floors"].values() for floor, scores in of.items()}
    by_number = {name: [r["scores"] for r in each] for name, each in reports.items()} | floors
    drawn = draw_numbered(by_number, out / "by_number.png")
    return [*write_report("Side by side", _sections(figures, seeds, drawn), out), path]


def _scored(run: Path) -> dict[str, Any]:
    """Score a run, or read what it scored at its newest checkpoint before."""
    path = run / "evaluation.json"
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["checkpoints"] == steps_of(run)[-1:]:
            return report
    report = held_out(run)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _sections(figures: dict[str, Any], seeds: int, drawn: list[Path]) -> list[str]:
    where = figures["provenance"]
    intro = (
        f"{seeds} seed(s) each; {where['devices']} x {where['device']} ({where['cores']} cores); jax "
        f"{where['versions']['jax']}; commit {where['commit']}; {where['time']}; {figures['minutes']:.1f} minutes. "
        f"Command: `{' '.join(where['command'])}`."
    )
    names = dict.fromkeys(metric for scores in figures["scores"].values() for metric in scores)
    metrics = [metric for metric in names if not numbered(metric)]  # the others are drawn
    rows = []
    for name, scores in figures["scores"].items():
        for metric in metrics:
            if metric in scores:
                rows.append([name, metric, *_summary(scores[metric])])
    floors = {floor: entries for scores in figures["floors"].values() for floor, entries in scores.items()}
    for floor, entries in floors.items():
        rows += [[floor, m, *_summary([entry])] for m, entry in entries.items() if not numbered(m)]
    header = ["experiment", "score", "mean over seeds", "over seeds", "95 % (test set, mean over seeds)"]
    return [
        intro,
        "## Held out\n\n" + table(header, rows),
        *(f"## {path.stem.replace('_', ' ').capitalize()}\n\n![{path.stem}]({path.name})" for path in drawn),
        "## Curves\n\nValidation with its band over seeds; training dashed.\n\n![by step](curves.png)",
    ]


def _summary(entries: list[dict[str, Any]]) -> list[str]:
    values = [entry["value"] for entry in entries]
    intervals = [entry["interval"] for entry in entries if entry["interval"]]
    low, high = np.mean(intervals, axis=0) if intervals else (None, None)
    return [
        f"{statistics.mean(values):.4f}",
        f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else "",
        "" if low is None else f"{low:.4f} to {high:.4f}",
    ]
