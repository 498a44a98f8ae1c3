"""What a benchmark says: lines for the terminal, and a page with plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer_jax.bench.pictures import draw
from transformer_jax.errors import UserError
from transformer_jax.report import table, write_report

GIB = 2**30
Result = dict[str, Any]


def lines(result: Result) -> Iterator[str]:
    """Yield what a terminal shows."""
    for point in result["points"]:
        if point["variant"]:
            yield point["variant"]
        if "failed" in point:
            yield f"  {point['rows']} rows of {point['length']} tokens: {point['failed']}"
            continue
        for name, value in _details(result["what"], point):
            yield f"  {name:16}{value}"
        yield ""
    if limits := result["points"][0].get("ceilings"):
        yield from (f"  {name:16}{value}" for name, value in _limits(limits))
    if result.get("disturbed"):
        yield f"  {'disturbed':16}{result['disturbed']}"


def write(result: Result, folder: Path) -> Path:
    """Write bench.json, report.md, report.html and pictures into a folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sections = [summary(result), result["disturbed"]]
    sections += [f"![{name}]({file})" for name, file in draw(result, folder)]
    for point in result["points"]:
        if "failed" not in point:
            title = f"## {point['variant'] or 'Point'}: {point['rows']} rows of {point['length']} tokens"
            sections.append(f"{title}\n\n" + table(("", ""), list(_details(result["what"], point))))
    if limits := result["points"][0].get("ceilings"):
        sections.append("## The device\n\n" + table(("", ""), list(_limits(limits))))
    sections.append("## Provenance\n\n```\n" + json.dumps(result["provenance"], indent=1) + "\n```")
    return write_report(f"bench {result['what']}: {result['experiment']}", sections, folder)[1]


def summary(result: Result) -> str:
    """Return one Markdown table, a row a point."""
    header = ["", "rows", "length", "step", "95 %", "tokens/s", "MFU", "memory"]
    rows = []
    for point in result["points"]:
        start: list[object] = [point["variant"], point["rows"], point["length"]]
        if "failed" in point:
            rows.append([*start, point["failed"], "", "", "", ""])
            continue
        step = point.get("step_seconds")
        mfu, memory = point.get("mfu"), point.get("memory")
        rows.append(
            [
                *start,
                seconds(step["median"]) if step else "",
                f"{seconds(step['low'])} to {seconds(step['high'])}" if step else "",
                f"{point['tokens_per_second']:,.0f}" if "tokens_per_second" in point else "",
                f"{mfu[point['ranked_by']]:.1%}" if mfu else "",
                f"{memory['compiler'] / GIB:.2f} GiB" if memory else "",
            ]
        )
    return table(header, rows)


def _limits(limits: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", limits["device"]
    yield "peak", f"{flops(limits['peak'])}, {limits['peak_source']}"
    yield "matrix product", f"{flops(limits['matmul'])} reached in this run ({limits['dtype']})"
    yield "copy", f"{limits['copy'] / 1e9:,.1f} GB/s reached in this run, read and written"
    if limits["doubt"]:
        yield "doubt", limits["doubt"]


def _details(what: str, point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "setup" in point:
        yield "setup", point["setup"]
    yield from {
        "train": _train,
        "decode": _decode,
        "data": _data,
        "checkpoint": _checkpoint,
        "compile": _compile,
    }[what](point)


def _step(timing: dict[str, Any]) -> str:
    share = f"{timing['confidence']:.0%}"
    interval = f"{share}: {seconds(timing['low'])} to {seconds(timing['high'])}"
    return f"{seconds(timing['median'])} (median of {timing['samples']}; {interval}; fastest {seconds(timing['min'])})"


def _train(point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "batch", f"{point['rows']} rows of {point['length']} tokens"
    yield "step", _step(point["step_seconds"])
    padded = point["tokens_per_second_padded"]
    yield "speed", f"{point['tokens_per_second']:,.0f} tokens/s ({padded:,.0f} with padding)"
    if compiling := point.get("compile_seconds"):
        warm = "" if compiling["warm"] is None else f", {seconds(compiling['warm'])} from the cache"
        yield "compile", f"{seconds(compiling['cold'])} cold{warm}; tracing {seconds(compiling['trace'])} before it"
    if memory := point.get("memory"):
        device = memory["device_peak"]
        said = "" if device is None else f"; {device / GIB:.2f} GiB by the device, of {memory['device_peak_is_of']}"
        yield "memory", f"{memory['compiler'] / GIB:.2f} GiB by the compiler{said}"
    filled = ", padding counted" if point.get("padding") else ""
    for name, share in point["mfu"].items():
        yield f"MFU{'' if name != point['ranked_by'] else ' *'}", f"{_share(share)} by {name}{filled}"
    if "roofline" in point:
        multiplied = "what the program multiplies, recomputed and masked parts included"
        unknown = "n/a: the attention kernel does not say what it multiplies"
        yield "HFU", unknown if point["hfu"] is None else f"{_share(point['hfu'])}: {multiplied}"
    yield "of a product", f"{point['share_of_matmul_rate']:.1%} of the rate of a matrix product"
    if roof := point.get("roofline"):
        cached = " (so part of it stays in caches)" if roof["in_cache"] else ""
        place = f"{roof['bound']}-bound, {roof['flops_per_byte']:.1f} FLOP/byte (ridge {roof['ridge']:.1f})"
        alone = f"products alone take {roof['compute_share']:.0%} of the step, traffic alone {roof['memory_share']:.0%}"
        yield "roofline", f"{place}: {alone}{cached}"
    if "input_bound_share" in point:
        share = point["input_bound_share"]
        bound = "INPUT-BOUND: " if share > 0.05 else ""
        yield "input", f"{bound}{share:.1%} of the time waits for data; {point['padding']:.1%} padding"


def _decode(point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "work", f"{point['rows']} rows, {point['length']} tokens read, {point['new']} written ({point['how']})"
    yield "prefill", f"{_step(point['prefill_seconds'])}; {point['prefill_tokens_per_second']:,.0f} tokens/s"
    yield "a token", f"{_step(point['step_seconds'])}"
    yield "speed", f"{point['tokens_per_second']:,.0f} tokens/s"
    cached = "; so few may stay in caches" if point["in_cache"] else ""
    yield (
        "floor",
        f"{seconds(point['floor_seconds'])} by {point['floor_bound']}: at {point['share_of_floor']:.1%} of it; reads "
        f"{point['bytes_per_token'] / 1e6:,.1f} MB a token{cached}",
    )
    yield "bandwidth", f"{point['share_of_measured_bandwidth']:.1%} of that of a copy"


def _data(point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "data", point["data"].removeprefix("data: ")
    where = "all cores" if point["core"] is None else "one core"
    yield "loader", f"{point['examples_per_second']:,.0f} examples/s on {where}, {point['threads']} threads"
    padded = point["tokens_per_second_padded"]
    yield "speed", f"{point['tokens_per_second']:,.0f} tokens/s ({padded:,.0f} with padding)"
    bound = "" if point["headroom"] >= 1 else "INPUT-BOUND: "
    yield "headroom", f"{bound}{point['headroom']:.1f} x the {point['step_tokens_per_second']:,.0f} tokens/s of a step"


def _checkpoint(point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "state", f"{point['state_bytes'] / 1e6:,.1f} MB, {point['disk_bytes'] / 1e6:,.1f} MB on disk"
    yield "stall", f"{_step(point['step_seconds'])}: {point['stall_in_steps']:.2f} steps"
    yield "save", f"{_step(point['save_seconds'])}; {point['bytes_per_second'] / 1e6:,.1f} MB/s"
    if beside := point["step_seconds_while_saving"]:
        plain = point["plain_step_seconds"]["median"]
        yield "steps beside it", f"{seconds(beside['median'])}, {beside['median'] / plain:.2f} x a step without a save"
    yield "restore", seconds(point["restore_seconds"])


def _compile(point: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for depth in point["depths"]:
        yield (
            f"{depth['layers']} layers",
            f"{depth['how']}: {seconds(depth['trace'])} to trace, {seconds(depth['compile'])} to compile",
        )
    yield "ratio", f"{point['ratio']:.2f}"


def _share(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def flops(rate: float) -> str:
    """Return a rate in a unit that suits it."""
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"


def seconds(value: float) -> str:
    """Return a time in a unit that suits it."""
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def read(file: Path) -> Result:
    """Read a result, or the folder it was written to; raises `UserError` if it is none."""
    file = file / "bench.json" if file.is_dir() else file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}).") from error
    if not isinstance(result, dict) or "what" not in result:
        raise UserError(f"{file} is no result of `tjax bench --out` or `--json`.")
    return result


def compared(found: Result) -> Iterator[str]:
    """Yield what a terminal shows of a comparison."""
    for point in found["points"]:
        name = f"{point['variant']} {point['rows']} x {point['length']}".strip()
        interval = f"{point['low']:.3f} to {point['high']:.3f}"
        program = {True: ", the same program", False: ", another program", None: ""}[point["same_program"]]
        yield (
            f"{name}: {seconds(point['old'])} -> {seconds(point['new'])}, {point['medians']:.3f} x as fast (95 % "
            f"{interval}, p = {point['p']:.2g}{program}): {point['verdict']}"
        )
    yield "changed:" if found["changed"] else "nothing else is recorded as changed"
    yield from (f"  {name}: {change}" for name, change in found["changed"].items())


def against_peers(found: Result) -> str:
    """Return the Markdown table of a comparison with peers, and the ratio to the best of them."""
    rows = []
    for name, side in found["contenders"].items():
        step, cpu = side["step_seconds"], side["cpu_seconds"]
        ratios = found["ratios"].get(name)
        loss = f"{side['loss']:.4f}" if "loss" in side else ""
        rows.append(
            [
                name,
                seconds(step["median"]),
                seconds(step["min"]),
                seconds(cpu["min"]),
                f"{side['best_tokens_per_second']:,.0f}",
                f"{ratios['minima']:.2f}" if ratios else "",
                f"{ratios['medians']:.2f} ({ratios['low']:.2f} to {ratios['high']:.2f})" if ratios else "",
                f"{ratios['cpu_minima']:.2f}" if ratios else "",
                f"{side['same_tokens']:.0%}" if "same_tokens" in side else loss,
                seconds(side["first_seconds"]),
            ]
        )
    rows += [[f"PyTorch {name}", f"failed: {why}", *[""] * 8] for name, why in found["failed"].items()]
    piece, same = ("a text", "equal tokens") if found["work"] == "decode" else ("step", "loss at first")
    header = ["", f"{piece}, median", "fastest", "CPU, least", "tokens/s, best", "ours by minima", "by medians (95 %)"]
    lines = table([*header, "by CPU time", same, "to the first one"], rows)
    best = [f"{found['ratios'][name][by]:.2f} by {WORDS[by]} ({name})" for by, name in found["best"].items()]
    return f"{lines}\nOurs against the best of them: {', '.join(best)}."


WORDS = {"minima": "minima", "medians": "medians", "cpu_minima": "CPU time"}


def write_peers(found: Result, folder: Path) -> Path:
    """Write a comparison with peers as `write` does; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    setup = found["contenders"]["transformer_jax"]["setup"]
    new = f", {found['new']} written after them" if found["new"] else ""
    work = f"{setup}; {found['rows']} rows of {found['length']} tokens{new}, {found['cores']} cores."
    told = "## Provenance\n\n```\n" + json.dumps(found["provenance"], indent=1) + "\n```"
    return write_report(
        f"bench peers: {found['experiment']}", [work, against_peers(found), found["disturbed"], told], folder
    )[1]
