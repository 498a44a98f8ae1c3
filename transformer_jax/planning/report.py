"""A plan on one screen."""

from __future__ import annotations

import importlib.metadata

from rich.console import Console
from rich.table import Table

from transformer_jax.planning.plan import DAY, Plan
from transformer_jax.planning.remedies import Trial
from transformer_jax.sharding import axes_shown

GIB = 2**30


def show(plan: Plan, console: Console, price: float = 0.0) -> None:
    """Print everything about a plan."""
    experiment, target, memory = plan.experiment, plan.target, plan.memory
    compute = experiment.compute
    console.print(f"{experiment.name} on {target.describe()}", style="bold", markup=False)
    console.print(
        f"mesh {_mesh(plan)}; {compute.dtype}, remat {compute.remat}, accumulate {experiment.train.accumulate}"
    )
    console.print(f"{_source(plan)}\n", markup=False)

    active = f" ({plan.flops.active:,} of a token)" if plan.flops.active != plan.parameters else ""
    table = _table(f"{plan.parameters:,} parameters{active}; FLOPs of a step of {plan.flops.tokens:,} positions", "lrr")
    for name, count in (*plan.flops.named().items(), ("computed: all attention, recomputation", plan.computed_flops)):
        each = "n/a" if count is None else f"{count / plan.flops.tokens / 1e9:,.2f} G each"
        table.add_row(name, "n/a" if count is None else f"{count:.3e}", each)
    console.print(table)

    table = _table("\nmemory of a device", "lr")
    for name in ("parameters", "optimizer", "batch", "activations", "logits", "gradients", "temporaries"):
        table.add_row(name, f"{getattr(memory, name) / GIB:.2f} GiB")
    verdict = "fits" if plan.fits else "does not fit"
    table.add_row(
        f"total: {verdict} in {memory.available / GIB:.2f} GiB", f"{memory.total / GIB:.2f} GiB", style="bold"
    )
    console.print(table)

    if plan.moves:
        table = _table("\ncollectives of a device in a step", "lllrrr")
        for move in plan.moves:
            hidden = {True: "overlapped", False: "exposed", None: ""}[move.overlapped]
            size, calls = f"{move.bytes / GIB:.3f} GiB", f"{move.calls:,} calls"
            table.add_row(move.kind, move.axes, move.network, size, calls, hidden)
        console.print(table)

    _time(plan, console, price)
    for remark in (*plan.remarks, plan.note):
        if remark:
            console.print(f"\n{remark}", markup=False)


def _time(plan: Plan, console: Console, price: float) -> None:
    roofline = plan.roofline
    parts = {"compute": roofline.compute, "memory traffic": roofline.memory, **roofline.networks}
    table = _table("\nleast time of a step", "lr")
    for name, seconds in parts.items():
        table.add_row(name, _milliseconds(seconds))
    if roofline.exposed:
        table.add_row("of the network time, exposed", _milliseconds(roofline.exposed))
    table.add_row(f"step: bound by {roofline.bound}", _milliseconds(roofline.step), style="bold")
    console.print(table)
    chip = plan.target.chip
    if plan.tokens_per_second is None or plan.days is None:
        console.print(f"\nno step time: a peak or a bandwidth of {chip.name} is not published")
    else:
        share = "n/a" if plan.utilisation is None else f"{plan.utilisation:.0%}"
        console.print(
            f"\nat most {plan.tokens_per_second:,.0f} positions/s ({plan.tokens_per_second * DAY:.3g} a day), "
            f"MFU {share} (matmuls) of {chip.name}'s published peak"
        )
        cost = plan.cost(price)
        money = f", {cost:,.0f} at {price:g} a chip and hour" if cost and price else ""
        console.print(f"at least {plan.days:,.2f} days for {plan.experiment.train.steps:,} steps{money}")
    room = "n/a" if plan.host_available is None else f"{plan.host_available / GIB:,.0f} GiB"
    console.print(f"a checkpoint takes up to {plan.host_memory / GIB:.2f} GiB of RAM on a host, which has {room}")


def show_ranking(trials: list[Trial], console: Console) -> None:
    """Print the meshes of a target, the best first."""
    rows = [("mesh", "memory", "step", "positions/s", "bound by", "by")]
    for trial in trials:
        plan = trial.plan
        memory = f"{plan.memory.total / GIB:.2f} GiB"
        step, speed = "too much memory", ""
        if trial.fits:
            step = _milliseconds(plan.roofline.step)
            speed = "n/a" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f}"
        rows.append((_mesh(plan), memory, step, speed, plan.roofline.bound, plan.source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        console.print("  ".join([first.ljust(widths[0]), *cells]), markup=False)


def _mesh(plan: Plan) -> str:
    return " ".join(axes_shown(plan.mesh))


def _source(plan: Plan) -> str:
    tpu = plan.target.chip.platform == "tpu"
    if plan.source == "compiler":
        package = "libtpu" if tpu else "jax-cuda13-plugin"
        return f"compiled ahead of time by {package} {importlib.metadata.version(package)}"
    extra = "pip install transformer_jax[plan]" if tpu else "no compiler for GPUs here"
    error = 15 if tpu else 25
    return f"ESTIMATE, not compiled: memory within about {error} %, collectives as the layout asks for ({extra})"


def _milliseconds(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{seconds * 1e3:,.1f} ms"


def _table(title: str, columns: str) -> Table:
    """Make a table without a frame; a letter for each column: l(eft) or r(ight)."""
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, show_header=False)
    for letter in columns:
        table.add_column(justify="right" if letter == "r" else "left")
    return table
