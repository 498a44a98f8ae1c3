"""Learning curves of several seeds, and whether another run stays in the band that they make."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_jax.config import Experiment, differences, read_experiment
from transformer_jax.errors import UserError, closest
from transformer_jax.logs import read_metrics
from transformer_jax.plots import Curve, panels

Curves = dict[str, Any]
"""{"steps": [...], "validation": {metric: a list a seed}, "training": the same}."""

LEVEL = 0.98
"""How often a run of another seed would lie in the band, at each step."""

SPARED = 0.2
"""Share of the steps at which a run may be outside and still reproduce the reference."""

_NUMBERED = re.compile(r"_\d+$")
_NOT_LEARNT = {"step", "split", "tokens", "tokens_per_second", "seconds", "learning_rate"}


def learning_curves(runs: Sequence[Path]) -> Curves:
    """Read the metrics of runs that differ in their seed, at the steps where all were evaluated.

    The training part is the mean of what was logged since the evaluation before.
    """
    records = [read_metrics(run) for run in runs]
    held = [{r["step"]: r for r in run if r["split"] == "validation"} for run in records]
    steps = sorted(set.intersection(*map(set, held))) if held else []
    trained = [[r for r in run if r["split"] == "train"] for run in records]
    since = [
        [[r for r in run if begin < r["step"] <= end] for begin, end in itertools.pairwise([0, *steps])]
        for run in trained
    ]
    return {
        "steps": steps,
        "validation": _by_metric([[[at[step]] for step in steps] for at in held]),
        "training": _by_metric(since),
    }


def _by_metric(records: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> dict[str, list[list[float]]]:
    """Average records [seed][step][record] over the last axis, for every metric that is never missing."""
    everywhere = [set(at[0]) if at else set() for seed in records for at in seed]
    names = set.intersection(*everywhere) - _NOT_LEARNT if everywhere else set()
    return {
        name: [[float(f"{np.mean([r[name] for r in at]):.5g}") for at in seed] for seed in records]
        for name in sorted(names)
    }


def compact_json(value: Any) -> str:
    """Indented JSON with every list of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s[-+.\deE,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def band(values_RS: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return low [S] and high [S] between which a run of another seed lies with `LEVEL`, from R runs at S steps.

    It is the prediction interval of Student's t: mean -+ t s sqrt(1 + 1 / R).
    """
    from scipy.stats import t  # noqa: PLC0415 - takes most of a second

    runs = len(values_RS)
    reach_S = t.ppf((1 + LEVEL) / 2, runs - 1) * values_RS.std(0, ddof=1) * np.sqrt(1 + 1 / runs)
    return values_RS.mean(0) - reach_S, values_RS.mean(0) + reach_S


@dataclass(frozen=True)
class Against:
    """A metric of a run on the validation split, beside the band of its reference, at S steps."""

    name: str
    steps: list[int]
    run: list[float]
    low: list[float]
    high: list[float]

    @property
    def outside(self) -> list[int]:
        """Places where the run is not in the band."""
        return [i for i, value in enumerate(self.run) if not self.low[i] <= value <= self.high[i]]

    @property
    def reproduces(self) -> bool:
        """Whether it ends in the band, and was outside at few steps (`SPARED`)."""
        last = len(self.steps) - 1
        return last not in self.outside and len(self.outside) <= SPARED * len(self.steps)


@dataclass(frozen=True)
class Comparison:
    """A run beside the stored curves of several seeds."""

    run: Path
    reference: str
    seeds: int
    metrics: list[Against]
    differences: list[str]
    """Settings that differ from the reference, other than the seed and how things are computed."""

    @property
    def reproduces(self) -> bool:
        """Whether all metrics do."""
        return all(metric.reproduces for metric in self.metrics)

    def verdict(self) -> str:
        """Answer in one line, with where the run leaves the band."""
        steps = self.metrics[0].steps
        of = f"{self.reference} ({self.seeds} seeds, {len(steps)} steps to {steps[-1]:,})"
        stray = [metric for metric in self.metrics if not metric.reproduces]
        if not stray:
            return f"{self.run} reproduces {of}: {', '.join(m.name for m in self.metrics)} in the {LEVEL:.0%} band"
        worst = max(stray, key=lambda metric: len(metric.outside))
        i = worst.outside[0]
        return (
            f"{self.run} does not reproduce {of}: {worst.name} leaves the {LEVEL:.0%} band at step "
            f"{worst.steps[i]:,} ({worst.run[i]:.4g}; band {worst.low[i]:.4g} to {worst.high[i]:.4g}), "
            f"outside at {len(worst.outside)} of {len(worst.steps)} steps"
        )

    def draw(self, path: Path) -> None:
        """Draw every metric of the run over its band."""
        panels(
            {
                m.name: [Curve(f"{self.reference}, band", m.steps, [m.low, m.high]), Curve("run", m.steps, [m.run])]
                for m in self.metrics
            },
            path,
            "steps",
        )


def against(run: Path, reference: Path) -> Comparison:
    """Compare a run with the `trials.json` of `tjax compare`, stored as a reference.

    Raises:
        UserError: the file holds no curves of two seeds or more, or none of this experiment, or no common steps.
    """
    experiment = read_experiment(run / "experiment.json")
    if not reference.is_file():
        raise UserError(f"{reference}: there is no such file; `tjax compare {experiment.name}` writes one.")
    try:
        stored = json.loads(reference.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{reference}: not JSON ({error}).") from error
    curves = stored.get("curves") if isinstance(stored, dict) else None
    if not curves:
        raise UserError(f"{reference} has no curves; `tjax compare PLAN --seeds 3` writes them to trials.json.")
    name = experiment.name if len(curves) > 1 else next(iter(curves))
    if name not in curves:
        raise UserError(f"{reference} has no curves of '{name}'.{closest(name, curves)}")
    setups = {e["name"]: Experiment.from_json(json.dumps(e), where=str(reference)) for e in stored["experiments"]}
    metrics = _side_by_side(curves[name], learning_curves([run]), reference)
    seeds = len(next(iter(curves[name]["validation"].values())))
    free = ("name", "train.seed", "compute.", "mesh.", "init.run", "published", "data.threads", "data.data_dir")
    changed = [line for line in differences(setups[name], experiment) if not line.startswith(free)]
    return Comparison(run, name, seeds, metrics, changed)


def _side_by_side(reference: Curves, ours: Curves, where: Path) -> list[Against]:
    common = sorted(set(reference["steps"]) & set(ours["steps"]))
    if not common:
        raise UserError(f"the run was evaluated at none of the steps in {where}; give it the same train.eval_every.")
    theirs_S = [reference["steps"].index(step) for step in common]
    ours_S = [ours["steps"].index(step) for step in common]
    metrics = []
    for name, seeds in reference["validation"].items():
        if len(seeds) < 2:
            raise UserError(f"{where} holds one seed, which makes no band; `tjax compare ... --seeds 3` makes one.")
        if name in ours["validation"] and not numbered(name):
            low_S, high_S = band(np.asarray(seeds, float)[:, theirs_S])
            values = np.asarray(ours["validation"][name][0])[ours_S]
            metrics.append(Against(name, common, values.tolist(), low_S.tolist(), high_S.tolist()))
    if not metrics:
        raise UserError(f"the run has none of the metrics in {where}: {', '.join(reference['validation'])}.")
    return metrics


def numbered(name: str) -> bool:
    """Whether a metric is one of many, such as the error after so many examples ("error_after_7")."""
    return _NUMBERED.search(name) is not None


def by_stem(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Group numbered metrics: {"error after": {0: "error_after_00", 1: "error_after_01", ...}}."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.search(name):
            found.setdefault(name[: match.start()].replace("_", " "), {})[int(match[0][1:])] = name
    return {stem: dict(sorted(of_stem.items())) for stem, of_stem in found.items()}


def draw_numbered(scores: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> list[Path]:
    """Draw the metrics that differ in a number at their end ("error_after_7") against that number.

    Args:
        scores: by name of a line, {metric: {"value": ...}} of each seed.
        path: PNG to write.

    Returns:
        The picture; nothing if there are no such metrics.
    """
    lines: dict[str, list[Curve]] = {}
    for line, seeds in scores.items():
        for stem, names in by_stem(seeds[0]).items():
            ys = [[seed[name]["value"] for name in names.values()] for seed in seeds]
            lines.setdefault(f"{stem} k", []).append(Curve(line, list(names), ys))
    if not lines:
        return []
    panels(lines, path, "k", size=(6.4, 4.0), focus=True)
    return [path]


def draw_curves(curves: dict[str, Curves], path: Path) -> None:
    """Draw every metric of several experiments by step: validation as a band over seeds, training dashed."""
    names = dict.fromkeys(name for c in curves.values() for name in c["validation"] if not numbered(name))
    panels(
        {
            name: [
                Curve(experiment, c["steps"], c[split][name], dashed=split == "training")
                for experiment, c in curves.items()
                for split in ("validation", "training")
                if name in c[split]
            ]
            for name in names
        },
        path,
        "steps",
    )
