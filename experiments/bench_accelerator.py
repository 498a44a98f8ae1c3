"""The rows of the throughput table that need an accelerator, in one run of under ten minutes and without a network.

`make bench-gpu` runs it; `python -m experiments.bench_accelerator --small` is the same in miniature for any machine.
Random parameters and random tokens: nothing is downloaded. Rows that begin with "peers" need PyTorch and transformers,
here or in the interpreter that --python names; without them they say so, and the others run. The result is written
after every point, and a later run adds to it: `--rows` measures what an earlier one had no time for.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.bert import bert_large
from experiments.gpt import gpt2_124m, gpt2_355m, gpt2_1558m
from experiments.transformer import transformer_big_wmt14_en_de
from transformer_jax.bench.batches import sized
from transformer_jax.bench.decode import Prompted
from transformer_jax.bench.peer_spec import Variant
from transformer_jax.bench.peers import bench_peers
from transformer_jax.bench.run import Request, bench
from transformer_jax.bench.train import Effort
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import say
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM
from transformer_jax.provenance import provenance
from transformer_jax.report import table
from transformer_jax.storage import whole

Point = dict[str, Any]

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Peers:
    """The same work in PyTorch, by turns."""

    batch: tuple[int, ...]
    variants: tuple[Variant, ...]
    length: int = 0
    prompted: Prompted | None = None
    budget: float = 15.0


@dataclass(frozen=True)
class Row:
    """One piece of work."""

    name: str
    experiment: Experiment
    request: Request | Peers
    unit: str
    figure: Callable[[Point], float]
    """What is compared with the bar, of a point."""
    bars: tuple[float, ...]
    """One for each point, or for all, or none; on one H100, bfloat16 (ratios and shares hold anywhere)."""
    aims: tuple[float, ...]


@dataclass(frozen=True)
class Options:
    """Run the accelerator's rows of the throughput table."""

    minutes: float = 9.5
    """No point is begun that may end after these: one that takes as long as the longest of its kind so far."""
    seconds: float = 15.0
    """Of repeats of each point, at most."""
    small: bool = False
    """Miniature models, for a test on any machine."""
    rows: tuple[str, ...] = ()
    """Names of rows; by default all."""
    python: str = ""
    """Interpreter that has PyTorch and transformers; by default this one."""
    out: Path = field(default_factory=lambda: RESULTS)
    """Folder of the result."""


def rows(small: bool = False, seconds: float = 15.0) -> list[Row]:
    """List the rows, those that matter most first."""
    effort = Effort(budget=seconds, warm_cache=False)
    tokens, shares = (lambda p: p["tokens_per_second"]), (lambda p: p["share_of_floor"])
    decoding: tuple[int, ...] = (8, 16) if small else (1, 8, 64)

    def train(name: str, experiment: Experiment, batch: int, length: int, bar: float, aim: float) -> Row:
        request = Request(batch=(batch,), length=(length,), effort=effort)
        return Row(name, experiment, request, "tokens/s", tokens, (bar,), (aim,))

    def bert(length: int, batch: int, bar: float, aim: float) -> Row:
        request = Request(batch=(batch,), length=(length,), effort=effort)
        rate: Callable[[Point], float] = lambda p: p["rows"] / p["step_seconds"]["median"]  # noqa: E731
        return Row(f"bert_large_{length}", _bf16(bert_large()), request, "sequences/s", rate, (bar,), (aim,))

    big = _bf16(transformer_big_wmt14_en_de())
    translation = Request(batch=(384,), length=(64,), effort=effort)  # 24,576 tokens a side, none of them padding
    writing = Request(what="decode", batch=decoding, prompted=Prompted(128, 384), effort=effort)
    integers = replace(writing, batch=decoding[:2], prompted=Prompted(128, 384, "int8"))
    depths = Request(what="compile", batch=(8,), length=(1024,), layers=(12, 96))
    contexts = Request(what="compile", batch=(1,), length=(16, 64) if small else (8192, 32_768, 131_072), layers=(6,))
    gpt, medium, large = (_padded(recipe()) for recipe in (gpt2_124m, gpt2_355m, gpt2_1558m))
    looped = replace(gpt, compute=replace(gpt.compute, layers="scan"))
    saved = replace(large, compute=replace(large.compute, remat="dots"))

    def peers(name: str, experiment: Experiment, batch: int, length: int, *variants: Variant) -> Row:
        request = Peers((batch,), variants, length, budget=seconds)
        return Row(f"peers_{name}", experiment, request, "x the best peer", _ratio, (1.0,), (1.2,))

    against = Peers(decoding[:2], ("dynamic", "static-compile"), prompted=Prompted(128, 384), budget=seconds)
    found = [
        train("gpt2_124m", gpt, 32, 1024, 430e3, 500e3),
        train("gpt2_124m_scan", looped, 32, 1024, 430e3, 500e3),
        peers("gpt2_124m", gpt, 32, 1024, "compile", "compile-cudnn"),
        bert(128, 128, 1490, 1750),
        Row("transformer_big", big, translation, "of the product's rate", _of_product, (0.38,), (0.45,)),
        train("gpt2_1558m", saved, 16, 1024, 38e3, 46e3),
        Row("decode_gpt2_1558m", large, writing, "of the floor", shares, (0.60, 0.55, 0.50), (0.75, 0.70, 0.65)),
        peers("transformer_big", big, 384, 64, "compile"),
        peers("bert_large_128", _bf16(bert_large()), 128, 128, "compile"),
        Row("peers_decode_gpt2_1558m", large, against, "x the best peer", _ratio, (1.5,), (1.5,)),
        bert(512, 32, 350, 410),
        train("gpt2_355m", medium, 16, 1024, 165e3, 190e3),
        Row("compile_12_to_96", gpt, depths, "times as long", lambda p: p["ratio"], (1.2,), (1.2,)),
        Row("context_to_128k", _long(), contexts, "KiB a token", _kib_a_token, (), ()),
        Row("decode_int8_gpt2_1558m", large, integers, "tokens/s", tokens, (), ()),
        peers("bert_large_512", _bf16(bert_large()), 32, 512, "compile"),
        peers("gpt2_355m", medium, 16, 1024, "compile"),
        peers("gpt2_1558m", saved, 16, 1024, "compile"),
    ]
    return [_small(row) for row in found] if small else found


def _padded(experiment: Experiment) -> Experiment:
    """GPT-2 with 50,304 tokens, as nanoGPT and llm.c train it: 50,257 is no multiple of 8, which matrix units want."""
    return replace(experiment, model=replace(experiment.model, vocab_size=50_304))


def _long() -> Experiment:
    """A small decoder that reads long rows: rotary positions, and logits of a few positions at a time.

    Attention in blocks, since that of cuDNN wants the mask of packed rows as an array of length x length.
    """
    base = gpt2_124m()
    model = GPTConfig(layers=6, width=384, heads=6, context=131_072, positions="rope")
    compute = replace(base.compute, remat="full", attention="blockwise")
    return replace(base, name="gpt_long", model=model, compute=compute, objective=CausalLM(chunk=1024))


def _ratio(point: Point) -> float:
    return float(point["ratios"][point["best"]["medians"]]["medians"])


def _kib_a_token(point: Point) -> float:
    return float(point["depths"][0]["memory"] / 1024 / (point["rows"] * point["length"]))


def _of_product(point: Point) -> float:
    return float(point["share_of_matmul_rate"])


def _bf16(experiment: Experiment) -> Experiment:
    return replace(experiment, compute=replace(experiment.compute, dtype="bfloat16"))


_UNCOMPILED: tuple[Variant, ...] = ("eager",)


def _small(row: Row) -> Row:
    """Shrink a row to seconds: sizes change, what is measured and how does not."""
    names = {name for name in ("layers", "encoder_layers", "decoder_layers") if hasattr(row.experiment.model, name)}
    sizes: dict[str, Any] = {"width": 16, "heads": 2, "vocab_size": 64, "feedforward": 32} | dict.fromkeys(names, 1)
    experiment = replace(
        row.experiment,
        model=replace(row.experiment.model, **sizes),
        compute=replace(row.experiment.compute, dtype="float32"),
        decode=replace(row.experiment.decode, beam=1),
    )
    request: Request | Peers
    if isinstance(row.request, Peers):
        prompted = row.request.prompted and Prompted(8, 4)
        length, variants = min(row.request.length, 16), ("dynamic",) if prompted else _UNCOMPILED
        request = replace(row.request, batch=(8,), length=length, prompted=prompted, budget=0.1, variants=variants)
    else:
        request = replace(
            row.request,
            batch=row.request.batch if row.request.what == "decode" else (8,),
            length=row.request.length if len(row.request.length) > 1 else (16,) * len(row.request.length),
            prompted=Prompted(8, 4, row.request.prompted.weights),
            layers=(1, 3)[: len(row.request.layers)],
            effort=replace(row.request.effort, budget=0.1, width=0.5),
        )
    return replace(row, experiment=experiment, request=request)


def main(options: Options) -> Path:
    """Run the rows, write what there is after each point, and print the table; returns the file."""
    wanted = [row for row in rows(options.small, options.seconds) if not options.rows or row.name in options.rows]
    if not wanted:
        raise UserError(f"--rows: choose among {', '.join(row.name for row in rows())}.")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has to live beside us
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"bench_{device}{'_small' if options.small else ''}.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    clock = Clock(60 * options.minutes, time.monotonic())
    for row in wanted:
        result: dict[str, Any] = {"points": []}
        for piece in pieces(row.request):
            found = _tried(row, piece, options.python, clock)
            result = result | found | {"points": [*result["points"], *found["points"]]}
            # What an earlier run measured stays until this one has measured something.
            if "provenance" in result or "provenance" not in results.get(row.name, {}):
                results[row.name] = result
            _write(file, results)
    print(summary(wanted, results))
    say(f"{file}, {(time.monotonic() - clock.began) / 60:.1f} min")
    return file


@dataclass
class Clock:
    """Says whether there is time for one more point."""

    seconds: float
    began: float
    longest: dict[type, float] = field(default_factory=dict)
    """Seconds of the longest point, of ours and of those with peers."""

    def allows(self, piece: Request | Peers) -> bool:
        """Whether a point ends in time that takes as long as the longest one."""
        return time.monotonic() - self.began + self.longest.get(type(piece), 0.0) < self.seconds

    def took(self, piece: Request | Peers, seconds: float) -> None:
        """Take note of a point."""
        self.longest[type(piece)] = max(self.longest.get(type(piece), 0.0), seconds)


def pieces(request: Request | Peers) -> list[Request | Peers]:
    """Cut a row into its points."""
    if isinstance(request, Peers):
        return [replace(request, batch=(batch,)) for batch in request.batch]
    lengths: list[tuple[int, ...]] = [(length,) for length in request.length] or [()]
    return [replace(request, batch=(b,), length=length) for b, length in itertools.product(request.batch, lengths)]


def _tried(row: Row, piece: Request | Peers, python: str, clock: Clock) -> dict[str, Any]:
    """Measure a point, or say why not: what one of them lacks (memory, a kernel, PyTorch) others may have."""
    if not clock.allows(piece):
        return {"points": [_failed(piece, f"not begun: {clock.seconds / 60:g} minutes would be over")]}
    say(f"== {row.name}")
    began = time.monotonic()
    try:
        return _run(row, piece, python)
    except (UserError, RuntimeError, ValueError) as error:  # JAX's are of these kinds
        say(f"failed: {error}")
        return {"points": [_failed(piece, str(error)[:MOST])]}
    finally:
        clock.took(piece, time.monotonic() - began)


MOST = 500
"""Characters that are kept of an error."""


def _failed(piece: Request | Peers, why: str) -> Point:
    trains = piece.length if isinstance(piece, Request) else (piece.length,)
    length = (piece.prompted.prompt if piece.prompted else 0) if not any(trains) else trains[0]
    return {"rows": piece.batch[0], "length": length, "failed": why}


def _write(file: Path, results: dict[str, Any]) -> None:
    """Write in one go, so that a run that is killed leaves what there was."""
    with whole(file) as scratch:
        scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _run(row: Row, piece: Request | Peers, python: str) -> dict[str, Any]:
    if isinstance(piece, Request):
        return bench([("", row.experiment)], piece)
    experiment = sized(row.experiment, piece.batch[0], piece.length)
    point = bench_peers(experiment, piece.variants, python, piece.budget, piece.prompted)
    return {"what": "peers", "points": [point], "provenance": provenance()}


def summary(wanted: list[Row], results: dict[str, Any]) -> str:
    """Return the Markdown table of figures beside their bars."""
    lines: list[list[object]] = []
    for row in wanted:
        for i, point in enumerate(results[row.name]["points"]):
            bar, aim = (f"{marks[min(i, len(marks) - 1)]:,g}" if marks else "" for marks in (row.bars, row.aims))
            work = [row.name, f"{point['rows']} x {point['length']}"]
            if "failed" in point and isinstance(point["failed"], str):
                lines.append([*work, point["failed"], row.unit, bar, aim])
                continue
            lines.append([*work, f"{row.figure(point):,.4g}", row.unit, bar, aim])
    return table(["work", "rows x length", "figure", "unit", "bar (H100)", "aim"], lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
