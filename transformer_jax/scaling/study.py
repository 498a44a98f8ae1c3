"""`tjax fit`: one table through every approach, with intervals, diagnostics and decisions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.provenance import provenance
from transformer_jax.scaling.approaches import APPROACHES, Approach, Estimate, Settings, estimate
from transformer_jax.scaling.bootstrap import KINDS
from transformer_jax.scaling.decide import at_ratios, decision, other_splits
from transformer_jax.scaling.diagnostics import (
    leave_largest_out,
    residual_summary,
    sensitivity,
    warnings,
    without_outliers,
)
from transformer_jax.scaling.runs import Points, Table
from transformer_jax.scaling.scipy_loop import scipy_loop
from transformer_jax.scaling.table import TableOptions, read_table


@dataclass(frozen=True)
class Study:
    """A table, and what every approach says of it."""

    table: Table
    estimates: list[Estimate]
    missing: dict[Approach, str]
    """Why an approach could not be applied, and what it would take."""
    budgets: list[float]
    figures: dict[str, Any]
    """Everything as plain JSON."""


def study(
    path: Path,
    options: TableOptions,
    settings: Settings,
    approaches: Sequence[Approach] = tuple(APPROACHES),
    budgets: Sequence[float] = (),
    scipy_starts: int = 0,
) -> Study:
    """Fit a table.

    Args:
        path: CSV, TSV, JSONL or Parquet.
        options: its columns, and which rows count.
        settings: of the fit and its bootstrap.
        approaches: which; one that the table cannot support is left out, with the reason.
        budgets: FLOPs (6ND) to decide for; by default the largest of the table, and 10 and 100 times that.
        scipy_starts: also time SciPy's L-BFGS on so many starts of approach 3.

    Raises:
        UserError: the table cannot be read, or supports none of the approaches.
    """
    began = time.monotonic()
    settings.check()
    if any(budget <= 0 for budget in budgets):
        raise UserError(f"--budgets must be positive FLOPs, got {min(budgets):g}.")
    table = read_table(path, options)
    for line in [*table.notes, *(f"left out {line}" for line in table.exclusions())]:
        say(line)
    estimates: list[Estimate] = []
    missing: dict[Approach, str] = {}
    for name in dict.fromkeys(approaches):
        say(f"{name}: {APPROACHES[name]}")
        try:
            estimates.append(estimate(name, table, settings))
        except UserError as error:
            missing[name] = str(error)
            say(f"left out: {error}")
    if not estimates:
        raise UserError(missing.get("A3", next(iter(missing.values()))))
    budgets = list(budgets) or [float(table.runs.C.max()) * factor for factor in (1, 10, 100)]
    main = next((e for e in estimates if e.name == "A3"), next((e for e in estimates if e.fit is not None), None))
    figures: dict[str, Any] = {
        "table": _table(table),
        "settings": _own(Settings, settings) | {"columns": _own(TableOptions, options)},
        "approaches": {e.name: _estimate(e) for e in estimates},
        "missing": missing,
        "decisions": [{"C": C} | {e.name: decision(e, C) for e in estimates} for C in budgets],
    }
    if over := next((e for e in estimates if e.name == "over-training"), None):
        figures["over_training"] = [{"C": C, "runs": at_ratios(over, C)} for C in budgets]
    if main is not None:
        say(f"diagnostics of {main.name}")
        figures["other_splits"] = [{"C": C, "by": main.name, "splits": other_splits(main, C)} for C in budgets]
        figures["diagnostics"] = _diagnostics(main, table, options, settings)
    if scipy_starts and any(e.name == "A3" for e in estimates):
        figures["scipy"] = _scipy(next(e for e in estimates if e.name == "A3"), table.runs, settings, scipy_starts)
    figures |= {"seconds": time.monotonic() - began, "provenance": provenance()}
    return Study(table, estimates, missing, budgets, plain(figures))


def plain(value: Any) -> Any:
    """Turn NaN and infinities, which JSON does not have, into None, NumPy numbers into Python's."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _own(kind: type[Any], value: Any) -> dict[str, Any]:
    """Return the fields of `kind` (the command line's options are a subclass)."""
    return {item.name: getattr(value, item.name) for item in fields(kind)}


def _table(table: Table) -> dict[str, Any]:
    runs = table.runs
    spans = {name: [getattr(runs, name).min(), getattr(runs, name).max()] for name in ("N", "D", "C", "loss")}
    return {
        "path": str(table.path),
        "rows": len(table.rows),
        "rows_used": len(table.curves),
        "runs": len(runs),
        "sizes": int(runs.size.max()) + 1,
        **spans,
        "notes": table.notes,
        "excluded": [asdict(exclusion) | {"rows": len(exclusion.lines)} for exclusion in table.excluded],
    }


def _estimate(e: Estimate) -> dict[str, Any]:
    result: dict[str, Any] = {"what": APPROACHES[e.name], **e.values}
    result["intervals"] = {kind: e.intervals(kind) for kind in KINDS}
    result["resamples_without_optimum"] = {kind: e.lost(kind) for kind in KINDS}
    if e.fit is not None:
        result["fit"] = {
            "sum_of_huber": e.fit.objective,
            "starts": e.fit.starts,
            "starts_that_reach_it": e.fit.reached,
            "next_optimum": e.fit.runner_up and e.fit.runner_up[0],
            "seconds": e.fit.seconds,
        }
    if e.isoflops is not None:
        result["budgets"] = [
            {"C": b.C, "runs": len(b.rows), "spread": b.spread, "N": b.N, "loss": b.loss, "rejected": b.rejected}
            for b in e.isoflops.budgets
        ]
    if e.envelope is not None:
        result["envelope"] = {"points": int((e.envelope.best >= 0).sum()), "rejected": e.envelope.rejected}
    return result


def _diagnostics(main: Estimate, table: Table, options: TableOptions, settings: Settings) -> dict[str, Any]:
    assert main.fit is not None
    law, runs = main.fit.law, table.runs
    held_out = {by: leave_largest_out(law, runs, by, settings) for by in ("C", "N")}
    dropped = options.drop_highest_loss
    outliers: dict[str, Points] = {}
    for count in (0, 2 * dropped) if dropped else (max(1, round(0.02 * len(runs))),):
        try:
            outliers[f"{count} highest losses dropped"] = read_table(
                table.path, replace(options, drop_highest_loss=count)
            ).runs
        except UserError:  # nothing would be left
            continue
    outliers["residuals above 4 robust sd dropped"] = without_outliers(main.fit, runs)
    return {
        "of": main.name,
        "warnings": warnings(main, runs, held_out),
        "residuals": residual_summary(main.fit, runs),
        "leave_largest_out": held_out,
        "sensitivity": sensitivity(law, runs, settings, outliers, table.also_N),
    }


def _scipy(a3: Estimate, runs: Points, settings: Settings, starts: int) -> dict[str, Any]:
    assert a3.fit is not None
    say(f"SciPy's L-BFGS on {starts} starts")
    loop = scipy_loop(runs.N, runs.D, runs.loss, settings.delta, starts, settings.seed)
    return {
        "starts_timed": loop.timed,
        "starts": loop.starts,
        "seconds_timed": loop.seconds,
        "seconds_for_all": loop.extrapolated,
        "extrapolated": loop.timed < loop.starts,
        "sum_of_huber": loop.objective,
        "ours_seconds": a3.fit.seconds,
        "times_faster": loop.extrapolated / a3.fit.seconds,
    }
