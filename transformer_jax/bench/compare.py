"""Two results side by side: how much faster, whether that is more than chance, and what was different."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformer_jax.errors import UserError

Result = dict[str, Any]

DRAWS = 2000
CHANCE = 0.05
"""A probability below this one counts as a difference."""


def ratio(new: Sequence[float], old: Sequence[float]) -> dict[str, float]:
    """Return how many times faster the new seconds are than the old: ratio of medians, 95 % bootstrap interval, p.

    The probability is that of a permutation test: how often a random assignment of all repeats to the two sides gives
    medians at least as far apart (on a logarithmic scale).
    """
    random, a, b = np.random.default_rng(0), np.asarray(new), np.asarray(old)
    found = np.median(b) / np.median(a)
    a_D, b_D = (np.median(random.choice(x, (DRAWS, len(x))), axis=1) for x in (a, b))
    low, high = np.quantile(b_D / a_D, [0.025, 0.975])
    pooled = random.permuted(np.broadcast_to(np.concatenate([a, b]), (DRAWS, len(a) + len(b))), axis=1)
    shuffled_D = np.median(pooled[:, len(a) :], axis=1) / np.median(pooled[:, : len(a)], axis=1)
    as_far = np.abs(np.log(shuffled_D)) >= abs(np.log(found)) * (1 - 1e-12)
    return {
        "medians": float(found),
        "low": float(low),
        "high": float(high),
        "p": float((as_far.sum() + 1) / (DRAWS + 1)),
    }


def compare(old: Result, new: Result) -> dict[str, Any]:
    """Compare the points that two results have in common.

    Raises:
        UserError: they measured different things, or have no point in common.
    """
    if old["what"] != new["what"]:
        raise UserError(f"one is of '{old['what']}' and the other of '{new['what']}': nothing to compare.")
    if "points" not in old or "points" not in new:
        raise UserError("results of `tjax bench` are compared; a comparison with peers is one already.")
    before = {_key(point): point for point in old["points"] if "step_seconds" in point}
    points = []
    for point in new["points"]:
        other = before.get(_key(point))
        if other is None or "step_seconds" not in point:
            continue
        found = ratio(point["step_seconds"]["seconds"], other["step_seconds"]["seconds"])
        points.append(
            {
                "variant": point["variant"],
                "rows": point["rows"],
                "length": point["length"],
                "old": other["step_seconds"]["median"],
                "new": point["step_seconds"]["median"],
                **found,
                "verdict": _verdict(found),
                "same_program": point["hlo"] == other["hlo"] if "hlo" in point and "hlo" in other else None,
            }
        )
    if not points:
        raise UserError("the two results have no batch and length in common that both could run.")
    return {"what": new["what"], "points": points, "changed": dict(changed(old, new))}


def _key(point: dict[str, Any]) -> tuple[Any, ...]:
    return point["variant"], point["rows"], point["length"], point.get("new")


def _verdict(found: dict[str, float]) -> str:
    if found["p"] >= CHANCE:
        return "no difference beyond chance"
    return "faster" if found["medians"] > 1 else "slower"


def changed(old: Result, new: Result) -> Iterator[tuple[str, str]]:
    """Yield what may explain a difference: (where, "before -> after")."""
    ignored = ("provenance.time", "provenance.command", "provenance.load")
    parts = ("provenance", "config", "request")
    a, b = ({key: value for part in parts for key, value in _flat(side.get(part, {}), part)} for side in (old, new))
    for key in sorted(a.keys() | b.keys()):
        if not key.startswith(ignored) and a.get(key) != b.get(key):
            yield key, f"{a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    else:
        yield path, value
