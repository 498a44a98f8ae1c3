"""The report of a fit: report.md, one self-contained report.html, fit.json, runs.csv and the pictures."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformer_jax.report import table, write_report
from transformer_jax.scaling import plots
from transformer_jax.scaling.runs import write_runs
from transformer_jax.scaling.study import Study

READING = {
    "A1": "the least loss at each C over all training curves; noise and schedules longer than C bias it",
    "A2": "the minimum of a parabola at each budget; its symmetric shape biases it where the surface is not symmetric",
    "A3": "one surface for all runs; the only one that gives a loss for any N and D",
    "kaplan": "a surface without a floor E; extrapolates to loss 0",
    "over-training": "A3 with one exponent, so a = 0.5 by its form; made for the loss at D/N far from the best",
}


def write_study(study: Study, out: Path) -> list[Path]:
    """Write everything into `out`.

    Returns:
        The files: report.html, report.md, fit.json, runs.csv.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures, data = out / "fit.json", out / "runs.csv"
    figures.write_text(json.dumps(study.figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_runs(study.table.rows, data)
    sections = [
        _intro(study.figures),
        _side_by_side(study),
        _decisions(study, out),
        *_pictures_of_approaches(study, out),
        *_diagnostics(study, out),
        _exclusions(study.figures),
        _provenance(study.figures),
    ]
    markdown, page = write_report(f"Scaling laws of {html.escape(study.table.path.name)}", sections, out)
    return [page, markdown, figures, data]


def number(value: float | None, digits: int = 4) -> str:
    """Write a number for a table, in full up to a million; "n/a" for none."""
    if value is None:
        return "n/a"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e6 else text


def bounds(interval: Sequence[float] | None, digits: int = 3) -> str:
    """Write an interval for a table."""
    return "n/a" if interval is None else f"{number(interval[0], digits)} to {number(interval[1], digits)}"


def _intro(figures: dict[str, Any]) -> str:
    of, settings = figures["table"], figures["settings"]
    spans = "; ".join(f"{name} {bounds(of[name])}" for name in ("N", "D", "C", "loss"))
    return (
        f"{of['runs']} runs of {of['sizes']} sizes, from {of['rows_used']} of {of['rows']} rows. {spans}. "
        f"{'; '.join(of['notes'])}.\n\n"
        f"C is 6ND wherever this page splits a budget. Intervals are 95 % percentiles of {settings['bootstraps']:,} "
        "bootstrap resamples, by run and by model size. Losses are fitted in the logarithm, by the sum of Huber's loss "
        f"with delta {settings['delta']:g}."
    )


def _side_by_side(study: Study) -> str:
    found = study.figures["approaches"]
    rows = [
        [name, f"{e['a']:.3f}", bounds(e["intervals"]["run"]["a"]), bounds(e["intervals"]["size"]["a"]), READING[name]]
        for name, e in found.items()
    ]
    text = "## Exponents\n\nN\\* ~ C^a and D\\* ~ C^(1-a).\n\n"
    text += table(["approach", "a", "95 % by run", "95 % by size", "how to read it"], rows)
    for name, why in study.missing.items():
        text += f"\n\n**{name} is left out.** {why}"
    for e in study.estimates:
        if e.fit is None:
            continue
        values = found[e.name]
        names = [key for key in values["intervals"]["run"] if key not in ("b", "k")]
        rows = [
            [
                key,
                number(values[key]),
                bounds(values["intervals"]["run"][key]),
                bounds(values["intervals"]["size"][key]),
            ]
            for key in names
        ]
        text += (
            f"\n\n### {e.name}: {e.fit.law.formula}\n\n" + table(["", "fit", "95 % by run", "95 % by size"], rows)
        ).replace("*", "\\*")
        text += (
            f"\n\nSum of Huber {e.fit.objective:.8g}; {e.fit.reached:,} of {e.fit.starts:,} starts reach it; "
            f"{e.fit.seconds:.1f} s, compiling included."
        )
    if speed := study.figures.get("scipy"):
        how = "extrapolated from" if speed["extrapolated"] else "timed on all of"
        text += (
            f"\n\nSciPy's L-BFGS with exact gradient: {speed['seconds_for_all']:.0f} s for {speed['starts']:,} starts "
            f"({how} {speed['starts_timed']:,}, in the same run), sum of Huber {speed['sum_of_huber']:.8g}: "
            f"A3 here took {speed['ours_seconds']:.1f} s, {speed['times_faster']:.0f} times less."
        )
    return text


def _decisions(study: Study, out: Path) -> str:
    rows = []
    for by in study.figures["decisions"]:
        for e in study.estimates:
            what = by[e.name]
            loss = what.get("loss")
            rows.append(
                [
                    f"{by['C']:.3g}",
                    e.name,
                    f"{number(what['N']['value'], 3)} ({bounds(what['N']['run'])})",
                    f"{number(what['D']['value'], 3)} ({bounds(what['D']['run'])})",
                    number(what["tokens_per_parameter"]["value"], 3),
                    f"{number(loss['value'])} ({bounds(loss['run'], 4)})" if loss else "",
                    bounds(loss["new_run"], 4) if loss else "",
                ]
            )
    plots.allocation(study.estimates, study.table.runs, study.budgets, out / "allocation.png")
    header = [
        "budget C",
        "by",
        "N\\* (95 %)",
        "D\\* (95 %)",
        "D\\*/N\\*",
        "loss (95 % of the law)",
        "95 % of one new run",
    ]
    text = "## Decisions\n\n" + table(header, rows) + "\n\n![best size against compute](allocation.png)"
    splits = study.figures.get("other_splits")
    if splits:
        first = splits[0]
        main = next(e for e in study.estimates if e.name == first["by"])
        plots.cost_of_other_splits(main, first["C"], out / "other_splits.png")
        text += f"\n\n### What another split costs ({first['by']})\n\n" + table(
            ["budget C", "N / N\\*", "N", "D", "loss above the best", "compute wasted (95 %)"],
            [
                [
                    f"{by['C']:.3g}",
                    f"{s['factor']:g}",
                    number(s["N"], 3),
                    number(s["D"], 3),
                    number(s["loss_above_best"], 3),
                    f"{_percent(s['wasted']['value'])} ({_percents(s['wasted']['run'])})",
                ]
                for by in splits
                for s in by["splits"]
            ],
        )
        text += "\n\n![compute wasted by other sizes](other_splits.png)"
    if over := study.figures.get("over_training"):
        text += "\n\n### Trained longer than is best (over-training)\n\n" + table(
            ["budget C", "D/N", "N", "D", "loss (95 % of the law)", "95 % of one new run"],
            [
                [
                    f"{by['C']:.3g}",
                    f"{run['tokens_per_parameter']:g}",
                    number(run["N"], 3),
                    number(run["D"], 3),
                    f"{number(run['loss']['value'])} ({bounds(run['loss']['run'], 4)})",
                    bounds(run["loss"]["new_run"], 4),
                ]
                for by in over
                for run in by["runs"]
            ],
        )
    return text


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f} %"


def _percents(interval: Sequence[float] | None) -> str:
    return "n/a" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"


def _pictures_of_approaches(study: Study, out: Path) -> list[str]:
    sections = []
    for e in study.estimates:
        if e.envelope is not None:
            plots.envelope(e.envelope, out / "envelope.png")
            rejected = "; ".join(f"{count} with {why}" for why, count in e.envelope.rejected.items())
            sections.append(
                f"## Envelope (A1)\n\n{(e.envelope.best >= 0).sum()} of {len(e.envelope.best)} values of C count; "
                f"left out: {rejected or 'none'}.\n\n![envelope of the training curves](envelope.png)"
            )
        if e.isoflops is not None:
            plots.isoflop(e.isoflops, out / "isoflop.png")
            rows = [
                [
                    f"{b.C:.4g}",
                    len(b.rows),
                    "" if b.rejected else f"{b.N:.3g}",
                    "" if b.rejected else f"{b.loss:.4g}",
                    b.rejected or "interior minimum",
                ]
                for b in e.isoflops.budgets
            ]
            sections.append(
                "## IsoFLOP (A2)\n\n"
                + table(["budget C", "runs", "N\\*", "loss", "verdict"], rows)
                + "\n\n![IsoFLOP parabolas](isoflop.png)"
            )
    if study.figures.get("diagnostics"):
        main = next(e for e in study.estimates if e.name == study.figures["diagnostics"]["of"])
        plots.surface(main, study.table.runs, study.budgets, out / "surface.png")
        plots.clouds(main, out / "bootstrap.png")
        sections.append(
            f"## Fit and bootstrap ({main.name})\n\n![runs and fitted form](surface.png)\n\n"
            "![bootstrap by run and by size](bootstrap.png)"
        )
    return sections


def _diagnostics(study: Study, out: Path) -> list[str]:
    found = study.figures.get("diagnostics")
    if not found:
        return []
    main = next(e for e in study.estimates if e.name == found["of"])
    plots.residuals(main, study.table.runs, out / "residuals.png")
    warned = "\n".join(f"- {line}" for line in found["warnings"]) or "No warning."
    r = found["residuals"]
    thirds = [[name, *(f"{100 * mean:+.2f} %" for mean in means)] for name, means in r["mean_by_third"].items()]
    held = [_held_out(by, row) for by, row in found["leave_largest_out"].items()]
    names = [n for n in ("E", "alpha", "beta", "alpha_N", "alpha_D", "eta", "a") if n in main.values]
    varied = [
        [name, "", row] if isinstance(row, str) else [name, row["runs"], *(number(row[key]) for key in names)]
        for name, row in found["sensitivity"].items()
    ]
    base = ["as fitted", len(study.table.runs), *(number(main.values[key]) for key in names)]
    return [
        f"## Diagnostics ({main.name})\n\n{warned}",
        f"### Residuals\n\nRMS {100 * r['rms']:.2f} %, largest {100 * r['largest']:.1f} % of the loss. Means by thirds "
        "of the runs:\n\n" + table(["by", "low", "middle", "high"], thirds) + "\n\n![residuals](residuals.png)",
        "### The largest runs, predicted by the others\n\n"
        + table(
            ["held out", "runs", "mean error", "RMS error", "RMS of the others", "inside 95 %", "a without them"], held
        ),
        "### One choice changed at a time\n\n" + table(["", "runs", *names], [base, *varied]),
    ]


def _held_out(by: str, row: dict[str, Any]) -> list[object]:
    if "missing" in row:
        return [f"largest {by}", row["missing"]]
    return [
        f"{by} from {row['from']:.3g} to {row['to']:.3g}",
        row["held_out"],
        f"{100 * row['mean_error']:+.2f} %",
        f"{100 * row['rms_error']:.2f} %",
        f"{100 * row['rms_of_the_others']:.2f} %",
        f"{row['inside_interval']:.0%}",
        number(row["a"], 3),
    ]


def _exclusions(figures: dict[str, Any]) -> str:
    left_out = figures["table"]["excluded"]
    if not left_out:
        return "## Rows left out\n\nNone."
    rows = [[e["rows"], e["reason"], ", ".join(map(str, e["lines"]))] for e in left_out]
    return "## Rows left out\n\n" + table(["rows", "reason", "lines of the file"], rows)


def _provenance(figures: dict[str, Any]) -> str:
    where = figures["provenance"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("jax", "numpy"))
    return (
        f"## Provenance\n\n`{shlex.join(where['command'])}`\n\nCommit {where['commit']}; {where['time']}; {versions}, "
        f"float64 on the CPU ({where['cores']} cores); {figures['seconds']:.0f} s. Every number of this page is in "
        "fit.json, every row of the table with its verdict in runs.csv."
    )
