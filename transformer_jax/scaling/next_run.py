"""`tjax next`: which run to buy, and the cheapest grid of runs for a wanted interval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.provenance import provenance
from transformer_jax.scaling.approaches import Settings, estimate
from transformer_jax.scaling.planner import Belief, Target, cheapest_grid
from transformer_jax.scaling.study import plain
from transformer_jax.scaling.table import TableOptions, read_table


def next_run(
    path: Path,
    options: TableOptions,
    settings: Settings,
    budget: float,
    target: Target = "exponent",
    at: float = 0.0,
    width: float = 0.0,
) -> dict[str, Any]:
    """Rank the runs that could be bought, by the interval of a target that is expected after each (approach 3).

    Args:
        path: the table of runs.
        options: its columns, and which rows count.
        settings: of the fit and its bootstrap.
        budget: FLOPs (6ND) of the next run at most; with `width`, of all runs of the grid together.
        target: "exponent" a of N* ~ C^a, or "loss" of the best run at budget `at`.
        at: FLOPs; 0 for 100 times the largest of the table.
        width: also find the cheapest grid after which the 95 % interval is this narrow; 0 for none.

    Returns:
        JSON-able: the present width, the ranking, best first, and with `width` the plan.

    Raises:
        UserError: the table does not support approach 3, or no run of the budget is near it.
    """
    settings.check()
    if at < 0 or width < 0:
        raise UserError("--at and --width must not be negative.")
    table = read_table(path, options)
    for line in [*table.notes, *(f"left out {line}" for line in table.exclusions())]:
        say(line)
    at = at or 100 * float(table.runs.C.max())
    found = estimate("A3", table, settings)
    belief = Belief.of(found, table.runs, target, at, budget)
    result: dict[str, Any] = {
        "target": target,
        "at": at if target == "loss" else None,
        "budget": budget,
        "width": belief.width,
        "ranking": [asdict(candidate) for candidate in belief.ranking()],
        "provenance": provenance(),
    }
    if width:
        bought = cheapest_grid(belief, width, budget)
        last = bought[-1].width if bought else belief.width
        result["plan"] = {
            "runs": [asdict(run) for run in bought],
            "cost": sum(run.cost for run in bought),
            "width": last,
            "reached": last <= width,
        }
    return plain(result)
