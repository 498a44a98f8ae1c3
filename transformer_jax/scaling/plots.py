"""The pictures of a fit, drawn on figures of their own (see `transformer_jax.plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_jax.plots import new_figure
from transformer_jax.scaling.approaches import Estimate
from transformer_jax.scaling.bootstrap import interval
from transformer_jax.scaling.decide import decision
from transformer_jax.scaling.envelope import Envelope
from transformer_jax.scaling.isoflop import IsoFlops
from transformer_jax.scaling.laws import predict, wasted
from transformer_jax.scaling.runs import Points

if TYPE_CHECKING:  # imported where it is drawn with, as in `transformer_jax.plots`
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

INK, GREY, LIGHT = "#333333", "#9a9a9a", "#e4e4e4"
COLORS = {"A1": "#4f9b58", "A2": "#b8860b", "A3": "#3b6ea8", "kaplan": "#c8452f", "over-training": "#8a5fa8"}
SYMBOLS = {
    "alpha": r"$\alpha$",
    "beta": r"$\beta$",
    "alpha_N": r"$\alpha_N$",
    "alpha_D": r"$\alpha_D$",
    "eta": r"$\eta$",
}


def panels(columns: int, width: float = 5.2, height: float = 4.0, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of axes in the house's style."""
    figure = new_figure(width * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=LIGHT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, color=GREY)
    return figure, grid


def log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic; one that spans less than two decades is labelled between its powers of ten too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    if high / low < 100:
        subs = (1.0, 2.0, 3.0, 5.0) if high / low < 12 else (1.0, 3.0)
        axis.set_major_locator(LogLocator(subs=subs) if high / low > 4 else MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_locator(NullLocator())


def _shades(values: np.ndarray) -> ScalarMappable:
    """Return the colours of these values, by their logarithms."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    return ScalarMappable(LogNorm(values.min(), values.max() * 1.0001), "viridis")


def _color_bar(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> ScalarMappable:
    shades = _shades(values)
    bar = figure.colorbar(shades, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return shades


def surface(estimate: Estimate, runs: Points, budgets: Sequence[float], path: Path) -> None:
    """Draw the runs over the fitted form: loss against C with the frontier and its band, and predicted losses."""
    fitted = estimate.fit
    assert fitted is not None
    theta = fitted.theta[None]
    figure, grid = panels(2, 6.2, 4.6)
    left, right = grid[0]
    shades = _color_bar(figure, left, runs.N, "parameters N")
    sizes = np.unique(runs.size)
    for size in sizes[np.linspace(0, len(sizes) - 1, min(len(sizes), 9)).astype(int)]:
        N = float(np.exp(np.log(runs.N[runs.size == size]).mean()))
        D = np.geomspace(runs.D.min(), runs.D.max(), 100)
        flops = 6 * N * D
        near = (flops > 0.8 * runs.C.min()) & (flops < 1.25 * runs.C.max())
        fit = np.exp(predict(fitted.law, theta, N + 0 * D, D))[0]
        left.plot(flops[near], fit[near], color=shades.to_rgba(np.asarray(N)), lw=0.9)
    dots: dict[str, Any] = {"c": shades.to_rgba(runs.N), "s": 14, "linewidths": 0.3, "edgecolors": "white", "zorder": 3}
    left.scatter(runs.C, runs.loss, **dots)
    C = np.geomspace(runs.C.min(), max([runs.C.max() * 10, *budgets]), 60)
    points = [decision(estimate, float(value)) for value in C]
    best = np.array([point["loss"]["value"] for point in points])
    band = np.array([point["loss"]["run"] or [np.nan] * 2 for point in points])
    left.fill_between(C, band[:, 0], band[:, 1], color=COLORS["kaplan"], alpha=0.2, linewidth=0)
    left.plot(C, best, color=COLORS["kaplan"], lw=2, label="best split of C, 95 %")
    left.set(xlabel="training FLOPs C", ylabel="loss", ylim=(0.97 * np.nanmin(band), 1.02 * runs.loss.max()))
    left.legend(loc="upper right", frameon=False)
    predicted = np.exp(predict(fitted.law, theta, runs.N, runs.D))[0]
    right.scatter(predicted, runs.loss, **dots)
    ends = np.array([min(predicted.min(), runs.loss.min()), max(predicted.max(), runs.loss.max())])
    right.plot(ends, ends, color=INK, lw=0.9, label="measured = fitted")
    right.set(xlabel=f"loss by {estimate.name}", ylabel="loss measured")
    right.legend(frameon=False)
    log_axis(left, "x")
    for axes, which in ((left, "y"), (right, "x"), (right, "y")):
        log_axis(axes, which)
    figure.savefig(path)


def isoflop(found: IsoFlops, path: Path) -> None:
    """Draw every budget's runs, its parabola, and its minimum: filled where it counts, hollow where it does not."""
    budgets = [budget for budget in found.budgets if np.isfinite(budget.coefficients).all()]
    figure, grid = panels(1, 7.4, 5.0)
    axes = grid[0, 0]
    shades = _color_bar(figure, axes, np.array([budget.C for budget in budgets]), "budget C (FLOPs)")
    for budget in budgets:
        color, points = shades.to_rgba(np.asarray(budget.C)), budget.runs
        # A run's loss brought to the budget's C, as the fit does.
        correction = budget.coefficients[3] * np.log(points.C / budget.C) if len(budget.coefficients) > 3 else 0.0
        axes.scatter(points.N, points.loss - correction, color=color, s=13, linewidths=0)
        N = np.geomspace(points.N.min(), points.N.max(), 100)
        axes.plot(N, budget.curve(N), color=color, lw=1.2, ls="--" if budget.rejected else "-")
        if not budget.rejected:
            axes.plot(
                budget.N, budget.loss, "D", color=COLORS["kaplan"], markersize=6, markeredgecolor="white", zorder=4
            )
    axes.plot([], [], "D", color=COLORS["kaplan"], markeredgecolor="white", label="interior minimum")
    if any(budget.rejected for budget in budgets):
        axes.plot([], [], "--", color=GREY, label="rejected: no interior minimum")
    axes.set(xlabel="parameters N", ylabel="loss")
    axes.legend(frameon=False)
    log_axis(axes, "x")
    figure.savefig(path)


def envelope(found: Envelope, path: Path) -> None:
    """Draw the training curves and the interior of their envelope."""
    figure, grid = panels(1, 7.4, 5.0)
    axes = grid[0, 0]
    shades = _color_bar(figure, axes, np.exp(found.log_N), "parameters N")
    C = np.exp(found.log_C)
    for log_N, curve in zip(found.log_N, found.log_loss, strict=True):
        axes.plot(C, np.exp(curve), color=shades.to_rgba(np.exp(log_N)), lw=0.9)
    counted = found.best >= 0
    least = np.exp(np.where(counted, found.log_loss[found.best, np.arange(len(C))], np.nan))
    axes.plot(C, least, color=COLORS["kaplan"], lw=2.4, label="envelope, where sizes on both sides are alive")
    axes.set(xlabel="training FLOPs C", ylabel="loss")
    axes.legend(frameon=False)
    log_axis(axes, "x")
    log_axis(axes, "y")
    figure.savefig(path)


def allocation(estimates: Sequence[Estimate], runs: Points, budgets: Sequence[float], path: Path) -> None:
    """Draw N* against C by every approach, the 95 % band of the first one, and where the runs are."""
    figure, grid = panels(1, 7.4, 5.0)
    axes = grid[0, 0]
    axes.scatter(runs.C, runs.N, color="#cccccc", s=9, linewidths=0, label="runs")
    C = np.geomspace(runs.C.min(), max([runs.C.max() * 10, *budgets]), 60)
    for estimate in estimates:
        color, a = COLORS[estimate.name], estimate.values["a"]
        bounds = estimate.intervals("run")["a"]
        known = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds and bounds[1] - bounds[0] > 1e-6 else " (by its form)"
        line = [float(estimate.line.N(value)[0]) for value in C]
        axes.plot(C, line, color=color, lw=1.8, label=f"{estimate.name}: $C^{{{a:.3f}}}${known}")
        if estimate.isoflops is not None:
            accepted = [budget for budget in estimate.isoflops.budgets if not budget.rejected]
            axes.plot([b.C for b in accepted], [b.N for b in accepted], "D", color=color, markersize=5, mec="white")
    main = next((e for e in estimates if e.name == "A3"), estimates[0])
    band = np.array([interval(main.lines["run"].N(value)) or [np.nan] * 2 for value in C])
    axes.fill_between(C, band[:, 0], band[:, 1], color=COLORS[main.name], alpha=0.15, linewidth=0)
    for budget in budgets:
        axes.axvline(budget, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="training FLOPs C", ylabel="compute-optimal parameters N*")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    log_axis(axes, "x")
    log_axis(axes, "y")
    figure.savefig(path)


def residuals(estimate: Estimate, runs: Points, path: Path) -> None:
    """Draw the residuals of log L against N, D and C, with the mean of each tenth."""
    assert estimate.fit is not None
    r = 100 * estimate.fit.residuals
    figure, grid = panels(3, 4.2, 3.6)
    labels = {"N": "parameters N", "D": "tokens D", "C": "training FLOPs C"}
    colors = _shades(runs.N).to_rgba(runs.N)
    for axes, (name, label) in zip(grid[0], labels.items(), strict=True):
        values = getattr(runs, name)
        axes.scatter(values, r, color=colors, s=11, linewidths=0)
        parts = [part for part in np.array_split(np.argsort(values), min(10, len(r) // 3 or 1)) if len(part)]
        middles = [np.exp(np.log(values[part]).mean()) for part in parts]
        axes.plot(
            middles, [r[part].mean() for part in parts], color=COLORS["kaplan"], lw=1.6, marker="o", markersize=3.5
        )
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_xlabel(label)
        log_axis(axes, "x")
    grid[0, 0].set_ylabel("loss measured / fitted - 1 (%)")
    figure.savefig(path)


def clouds(estimate: Estimate, path: Path) -> None:
    """Draw the bootstrap, by run and by size: the two exponents, floor and exponent, and the histogram of a."""
    names = [name for name in ("alpha", "beta", "alpha_N", "alpha_D", "eta", "E") if name in estimate.values]
    pairs: list[tuple[str, str]] = [(names[0], names[1])]
    pairs.append(("E", "a") if "E" in names else (names[1], "a"))
    figure, grid = panels(3, 4.4, 3.9)
    styles = {"run": COLORS["A3"], "size": COLORS["A2"]}
    for axes, (x, y) in zip(grid[0], pairs, strict=False):
        for kind, color in styles.items():
            samples: Any = estimate.samples[kind]  # type: ignore[index]
            axes.scatter(
                samples[x], samples[y], color=color, s=3, alpha=0.25, linewidths=0, rasterized=True, label=f"by {kind}"
            )
        axes.plot(
            estimate.values[x], estimate.values[y], "D", color=COLORS["kaplan"], markersize=7, mec="white", label="fit"
        )
        for name, setter in ((x, axes.set_xlim), (y, axes.set_ylim)):
            values = np.concatenate([estimate.samples[kind][name] for kind in ("run", "size")])
            low, high = np.nanquantile(values, [0.002, 0.998])
            setter(low - 0.1 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
        axes.set(xlabel=SYMBOLS.get(x, x), ylabel=SYMBOLS.get(y, y))
    last = grid[0, 2]
    both = np.concatenate([estimate.samples[kind]["a"] for kind in ("run", "size")])
    low, high = np.nanquantile(both, [0.002, 0.998])
    for kind, color in styles.items():
        values = estimate.samples[kind]["a"]  # type: ignore[index]
        last.hist(
            values[np.isfinite(values)], np.linspace(low, high + 1e-9, 40), color=color, alpha=0.5, label=f"by {kind}"
        )
    last.axvline(estimate.values["a"], color=COLORS["kaplan"], lw=1.6)
    last.set(xlabel="exponent a of $N^* \\propto C^a$", ylabel="resamples")
    legend = last.legend(frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    figure.savefig(path)


def cost_of_other_splits(estimate: Estimate, C: float, path: Path) -> None:
    """Draw the share of the budget that a model smaller or larger than N* wastes."""
    assert estimate.fit is not None
    best = float(estimate.line.N(C)[0])
    factors = np.geomspace(0.05, 20, 81)
    N = factors * best
    law, theta = estimate.fit.law, estimate.fit.theta[None]
    share = np.array([wasted(law, theta, n, C / 6 / n)[0] for n in N])
    band = np.array([interval(wasted(law, estimate.thetas["run"], n, C / 6 / n)) or [np.nan] * 2 for n in N])
    figure, grid = panels(1, 6.4, 4.2)
    axes = grid[0, 0]
    axes.fill_between(N, 100 * band[:, 0], 100 * band[:, 1], color=COLORS["A3"], alpha=0.2, linewidth=0, label="95 %")
    axes.plot(N, 100 * share, color=COLORS["A3"], lw=2, label=f"C = {C:.3g}")
    axes.axvline(best, color=COLORS["kaplan"], lw=1.2, label=f"N* = {best:.3g}")
    axes.set(xlabel="parameters N of the run", ylabel="compute wasted (%)", ylim=(0, 100))
    axes.legend(frameon=False)
    log_axis(axes, "x")
    figure.savefig(path)
