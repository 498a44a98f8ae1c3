"""Pictures of a run: its loss curve and what its attention looks at.

Drawn on figures of our own, without `pyplot` and without touching `rcParams`, so that a library call leaves no
trace in the caller's session. Tokens come in any script; `_font` sees to it that each has a glyph.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.storage import written_here

if TYPE_CHECKING:  # at run time each function imports what it draws with: matplotlib takes two thirds of a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

DPI = 150
LARGEST_SIDE = 20_000
"""Pixels; what would be larger is drawn at a lower resolution, since image viewers give up on it."""
_INK, _TRAIN, _VALIDATION = "#333333", "#8fb3d9", "#c8452f"
_COLORS = ("#3b6ea8", "#c8452f", "#4f9b58", "#8a5fa8", "#b8860b", "#555555")


def loss_curve(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    train: str = "loss",
    validation: str = "validation_loss",
) -> None:
    """Draw training loss (thin) and validation loss (thick, its best point marked) against steps.

    Args:
        records: lines of a metrics file; each has "step" and, where measured, the two losses.
        path: PNG to write.
        train: name of the training loss in the records.
        validation: name of the validation loss.

    Raises:
        UserError: no record holds a finite loss.
    """
    records = list(records)
    curves = {name: _curve(records, name) for name in (train, validation)}
    if not any(len(steps) for steps, _ in curves.values()):
        raise UserError(f"Nothing to draw: no record holds a finite '{train}' or '{validation}'.")

    figure = new_figure(7.0, 4.0)
    axes = figure.add_subplot()
    steps, losses = curves[train]
    axes.plot(steps, losses, color=_TRAIN, linewidth=0.9, label="training")
    steps, losses = curves[validation]
    if len(steps):
        best = int(np.argmin(losses))
        axes.plot(steps, losses, color=_VALIDATION, linewidth=2.2, label="validation")
        mark = f"best: {losses[best]:.4g} at step {steps[best]:,}"
        axes.plot(steps[best], losses[best], "o", color=_VALIDATION, markersize=7, markeredgecolor="white", label=mark)
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    _save(figure, path)


@dataclass(frozen=True)
class Curve:
    """One line of `curves`: y at each x, measured once or several times (seeds)."""

    name: str
    x: Sequence[float]
    ys: Sequence[Sequence[float]]
    dashed: bool = False
    """Thin, and without an entry of its own in the legend: what belongs to the solid line of that name."""


def curves(lines: Sequence[Curve], path: Path, x_label: str, y_label: str, *, log: bool = False) -> None:
    """Draw lines with a band from the lowest to the highest of their measurements.

    Args:
        lines: what to draw.
        path: PNG to write.
        x_label: meaning and unit of x.
        y_label: meaning and unit of y.
        log: both axes by powers (of two for x).
    """
    from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415

    figure = new_figure(7.0, 4.0)
    axes = figure.add_subplot()
    _draw_lines(axes, lines)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    _save(figure, path)


def panels(
    lines: Mapping[str, Sequence[Curve]],
    path: Path,
    x_label: str,
    *,
    across: int = 3,
    size: tuple[float, float] = (4.2, 3.0),
    focus: bool = False,
) -> None:
    """Draw several quantities side by side, each as `curves` does; a name has one colour in all of them.

    Args:
        lines: what to draw, by quantity.
        path: PNG to write.
        x_label: meaning and unit of x.
        across: panels in a row, at most.
        size: of a panel, in inches.
        focus: end the y axis at twice the highest point of the first line, however high the others go.
    """
    across = min(across, len(lines))
    down = math.ceil(len(lines) / across)
    figure = new_figure(size[0] * across, size[1] * down + 0.4)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (name, drawn) in zip(grid, lines.items(), strict=False):
        _draw_lines(axes, drawn)
        axes.set_title(name, fontsize=10, color=_INK)
        axes.set_xlabel(x_label)
        if focus:
            axes.set_ylim(top=min(axes.get_ylim()[1], 2 * float(np.max(drawn[0].ys))))
    for axes in grid[len(lines) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    _save(figure, path)


def _draw_lines(axes: Axes, lines: Sequence[Curve]) -> None:
    colors = dict(zip(dict.fromkeys(line.name for line in lines), itertools.cycle(_COLORS), strict=False))
    for line in lines:
        ys, color = np.asarray(line.ys, dtype=float), colors[line.name]
        if line.dashed:
            axes.plot(line.x, ys.mean(0), color=color, linewidth=1.0, linestyle="--")
        else:
            axes.plot(line.x, ys.mean(0), color=color, linewidth=2.0, marker="o", markersize=3.5, label=line.name)
        axes.fill_between(line.x, ys.min(0), ys.max(0), color=color, alpha=0.15, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)


def attention_grid(
    panels: Mapping[str, np.ndarray],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: Path,
    title: str = "",
    *,
    across: int = 4,
) -> None:
    """Draw heads side by side on one colour scale.

    Args:
        panels: weights_TS by name, for example {"layer 1, head 3": weights_LNTS[0, 2]}.
        row_labels: the T tokens that attend.
        column_labels: the S tokens attended to.
        path: PNG to write; its size follows the number of tokens.
        title: written above all.
        across: panels in a row, at most.

    Raises:
        UserError: no panels, weights that do not fit the labels or are not finite, or a character for which no
            font is installed.
    """
    T, S = len(row_labels), len(column_labels)
    if not panels or not T or not S or across < 1:
        raise UserError("An attention map needs at least one panel, one row, one column, and one panel across.")
    for name, weights_TS in panels.items():
        if np.shape(weights_TS) != (T, S):
            raise UserError(f"Attention '{name}' has shape {np.shape(weights_TS)}, the labels want {(T, S)}.")
        if not np.all(np.isfinite(weights_TS)):
            raise UserError(f"Attention '{name}' has weights that are not finite.")
    rows, columns = [visible(label) for label in row_labels], [visible(label) for label in column_labels]
    title = title and visible(title)
    font = _font("".join([*rows, *columns, *panels, title]))

    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    cell, size = (0.26, 8) if len(panels) == 1 else (0.2, 6)  # inches, points: neighbouring labels do not touch
    labels = 0.075 * max(map(len, rows)), 0.075 * max(map(len, columns))
    width, height = (max(tokens * cell, 1.2) for tokens in (S, T))
    # Compressed: panels of a fixed aspect stand together instead of filling equal cells.
    figure = new_figure(across * width + labels[0] + 1.0, down * (height + 0.3) + labels[1] + 0.5, layout="compressed")
    grid = figure.subplots(down, across, squeeze=False)
    highest = max(float(np.max(weights_TS)) for weights_TS in panels.values())
    for axes, name in zip(grid.flat, panels, strict=False):
        image = axes.imshow(panels[name], cmap="Blues", vmin=0.0, vmax=highest)
        axes.set_title(name, fontproperties=font, fontsize=8, color=_INK, parse_math=False)
        axes.spines[:].set_color("#cccccc")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    text = {"fontproperties": font, "fontsize": size, "color": _INK, "parse_math": False}
    for axes in grid[:, 0]:
        axes.set_yticks(range(T), rows, **text)
        axes.tick_params(length=0)
    for axes in grid[0]:
        axes.xaxis.tick_top()  # where reading starts
        axes.set_xticks(range(S), columns, rotation=90, **text)
        axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0, labelcolor=_INK)
    if title:
        title = textwrap.fill(title, max(40, int(9 * figure.get_figwidth())))  # about 9 characters an inch
        figure.suptitle(title, fontproperties=font, fontsize=11, color=_INK, parse_math=False)
    dpi = min(DPI, LARGEST_SIDE / max(figure.get_size_inches()))
    _save(figure, path, dpi=dpi, bbox_inches="tight", pad_inches=0.12)


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """Return an empty figure of this size in inches, which no session knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path, **options: Any) -> None:
    with written_here(path) as file:
        figure.savefig(file, **options)


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if name in record and math.isfinite(record[name])]
    return np.array([step for step, _ in points], int), np.array([loss for _, loss in points], float)


def visible(label: str) -> str:
    """Spell out what would draw nothing or move the pen: control characters, and a label of spaces."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in label)
    return spelled if spelled.strip() else f"'{spelled}'"


def _font(text: str) -> FontProperties:
    """Return matplotlib's default font, followed by as few others as it takes to have a glyph for all of `text`."""
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415

    families = list(FontProperties().get_family())
    missing = set(text) - _glyphs(families[0])
    if missing:
        candidates = {family: _glyphs(family) for family in _other_families()}
        while missing and candidates:
            family = max(candidates, key=lambda family: len(missing & candidates[family]))
            if not missing & candidates[family]:
                break
            missing -= candidates.pop(family)
            families.append(family)
    if missing:
        raise UserError(
            f"No installed font has glyphs for {' '.join(sorted(missing))}: install one and retry, for Korean by "
            "pip install koreanize-matplotlib, for Chinese and Japanese a system font such as Noto Sans CJK."
        )
    return FontProperties(family=families)


def _other_families() -> list[str]:
    """Names of the system's upright fonts, sans first, and last the NanumGothic of koreanize-matplotlib."""
    from matplotlib import font_manager  # noqa: PLC0415

    # Last Resort has a box for every character, and emoji fonts are bitmaps that Agg cannot scale.
    plain = ("normal", 400, "normal")
    fonts = font_manager.fontManager.ttflist
    system = sorted(
        {font.name for font in fonts if (font.style, font.weight, font.stretch) == plain},
        key=lambda name: ("Sans" not in name and "Gothic" not in name, name),
    )
    families = [name for name in system if "Last Resort" not in name and "Emoji" not in name]
    shipped = "NanumGothic"
    # Importing the package would set the fonts of the whole session.
    package = importlib.util.find_spec("koreanize_matplotlib")
    if shipped not in families and package is not None and package.origin is not None:
        font_manager.fontManager.addfont(Path(package.origin).with_name("fonts") / f"{shipped}.ttf")
        families.append(shipped)
    return families


def _glyphs(family: str) -> set[str]:
    """Return the characters that a font family can draw."""
    from matplotlib.font_manager import FontProperties, findfont  # noqa: PLC0415
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    path = findfont(FontProperties(family=[family]))
    return {chr(code) for code in FT2Font(path).get_charmap()}
