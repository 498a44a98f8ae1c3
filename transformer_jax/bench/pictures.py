"""Plots of a benchmark: tokens a second against batch and length, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.plots import Curve, curves, new_figure


def draw(result: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw what a sweep shows, and return (caption, file) of each picture."""
    points = [point for point in result["points"] if "failed" not in point]
    found = []
    for axis, other in (("rows", "length"), ("length", "rows")):
        lines = _lines(points, axis, other)
        if lines:
            file = f"tokens_by_{axis}.png"
            label = "rows of a batch" if axis == "rows" else "tokens of a row"
            curves(lines, folder / file, label, "tokens/s", log=True)
            found.append((f"tokens/s against {axis}", file))
    if any("roofline" in point for point in points):
        _roofline(points, folder / "roofline.png")
        found.append(("roofline", "roofline.png"))
    return found


def _lines(points: list[dict[str, Any]], axis: str, other: str) -> list[Curve]:
    """Make a line of every variant and value of the other axis that has more than one point."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in points:
        if "tokens_per_second" in point and "step_seconds" in point:
            groups.setdefault((point["variant"], point[other]), []).append(point)
    lines = []
    for (variant, value), group in groups.items():
        if len({point[axis] for point in group}) < 2:
            continue
        group.sort(key=lambda point: point[axis])
        rates = [
            [point["tokens_per_second"] * point["step_seconds"]["median"] / point["step_seconds"][k] for point in group]
            for k in ("low", "median", "high")
        ]
        lines.append(Curve(f"{variant} {other} {value}".strip(), [point[axis] for point in group], rates))
    return lines


def _roofline(points: list[dict[str, Any]], path: Path) -> None:
    """Draw FLOP/s against FLOPs a byte, under the roof that was measured."""
    points = [point for point in points if "roofline" in point]
    limits = points[0]["ceilings"]
    x = [point["roofline"]["flops_per_byte"] for point in points]
    y = [x[i] * p["roofline"]["bytes"] / p["step_seconds"]["median"] for i, p in enumerate(points)]
    ridge = limits["matmul"] / limits["copy"]
    span = np.geomspace(min(*x, ridge) / 4, max(*x, ridge) * 4, 200)
    figure = new_figure(9.0, 4.0)
    axes = figure.add_subplot()
    axes.plot(span, np.minimum(span * limits["copy"], limits["matmul"]), color="#333333", label="roof, as measured")
    for i, point in enumerate(points):
        name = f"{point['variant']} {point['rows']} x {point['length']}".strip()
        axes.plot(x[i], y[i], "os^Dv"[i // 10 % 5], markersize=6, label=name)  # there are ten colours
    axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="FLOP/s of a device")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)
