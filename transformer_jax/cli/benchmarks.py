"""bench, bench-compare, bench-peers, profile: how fast an experiment runs, and where its time goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from transformer_jax.bench.batches import sized
from transformer_jax.bench.compare import compare
from transformer_jax.bench.decode import Prompted
from transformer_jax.bench.peer_spec import Variant
from transformer_jax.bench.peer_spec import What as PeerWork
from transformer_jax.bench.peers import bench_peers
from transformer_jax.bench.profile import profile
from transformer_jax.bench.report import against_peers, compared, lines, read, write, write_peers
from transformer_jax.bench.run import Request, What, bench
from transformer_jax.bench.train import Effort
from transformer_jax.cli.verb import Tree, Verb, experiment_of, out, parse
from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import print_json, say
from transformer_jax.nn.weights import Weights

Numbers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="N,N,...",
        instance_from_str=lambda words: tuple(int(n) for word in words for n in word.split(",") if n),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(n, int) for n in value),
        str_from_instance=lambda value: [",".join(map(str, value))] if value else [],
    ),
]


@dataclass(frozen=True)
class BenchOptions:
    """Measure how fast an experiment runs, beside what the device can do (docs/bench.md says what each figure means).

    Without --batch and --length, the batch is the recipe's largest. Several values of either, or of --vary, are a
    sweep. A figure that cannot be (above the peak, of a step that does nothing) is an error.
    """

    experiment: Tree
    what: What = "train"
    """train: the step; decode: tokens a second; data: the loader on one core; checkpoint: how long saving stops the
    loop; compile: seconds against layers."""
    batch: Numbers = ()
    """Rows of a batch."""
    length: Numbers = ()
    """Tokens of a row (of each side)."""
    vary: tuple[str, ...] = ()
    """Settings to sweep: compute.layers=scan,unrolled compute.remat=none,full."""
    real_data: bool = False
    """Train on the recipe's own data, and say how long the step waits for it."""
    budget: float = 30.0
    """Seconds of repeats for each point; compiling is not counted."""
    width: float = 0.02
    """Stop earlier where the 95 % interval of the median is narrower than this share of it."""
    peak: float = 0.0
    """Peak of one device in TFLOP/s, for a chip that is not known; by default it is measured."""
    prompt: int | None = None
    """decode: tokens of a prompt; by default 128, or half of a smaller context, or what --new leaves."""
    new: int | None = None
    """decode: tokens written after it; by default 128, or what a smaller context leaves."""
    weights: Weights = "float"
    """decode: how matrices are held; float is the precision of the computation, int8 a byte a number."""
    layers: Numbers = (12, 96)
    """compile: depths."""
    tokens_per_second: float = 0.0
    """data: what the loader has to feed; by default a step is timed."""
    warm_cache: bool = True
    """train: compile a second time, from the cache on disk."""
    out: str = ""
    """Folder for bench.json, report.md and report.html with plots."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare two results of `tjax bench`: is the second faster, is that more than chance, and what was different."""

    new: tyro.conf.Positional[str]
    """The second result: bench.json, or its folder."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class PeersOptions:
    """Do the same work here and in PyTorch, in one run on one device, turn by turn, and print ratios.

    Training has peers of GPT-2 (a decoder like nanoGPT's), of BERT's pre-training and of the Transformer (BERT and
    Marian of transformers); writing has transformers' `generate` of GPT-2 and of Marian. All begin with our parameters,
    and must agree on the loss or the text. They run in a process of their own, so PyTorch may be installed elsewhere.
    """

    experiment: Tree
    what: PeerWork = "train"
    """train: the step; decode: read prompts, and write after them what is most probable."""
    batch: int = 0
    """Rows of a batch; by default the recipe's."""
    length: int = 0
    """train: tokens of a row (of each side); by default the recipe's."""
    prompt: int | None = None
    """decode: tokens of a prompt; by default 128, or half of a smaller context, or what --new leaves."""
    new: int | None = None
    """decode: tokens written after it; by default 128, or what a smaller context leaves."""
    peers: tuple[Variant, ...] = ()
    """How PyTorch does it. train: eager, compile, compile-cudnn (with cuDNN's attention; GPUs); decode: with a cache
    that grows (dynamic), one of fixed size (static), and that compiled (static-compile). By default all."""
    python: str = ""
    """Interpreter that has torch, transformers and safetensors; by default this one."""
    budget: float = 60.0
    """Seconds of all turns together; compiling is not counted."""
    out: str = ""
    """Folder for bench.json, report.md and report.html."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ProfileOptions:
    """Trace some training steps on random tokens: a trace for xprof and TensorBoard, and the longest operations."""

    experiment: Tree
    batch: int = 0
    """Rows of a batch; by default the recipe's."""
    length: int = 0
    """Tokens of a row; by default the recipe's."""
    steps: int = 5
    """Steps traced."""
    top: int = 20
    """Operations printed; --json has all."""
    out: str = ""
    """Folder of the trace; by default runs/profile-NAME."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class _Varied:
    experiment: Tree


def variants(experiment: Experiment, vary: tuple[str, ...]) -> Iterator[tuple[str, Experiment]]:
    """Yield every combination of settings ("compute.remat=none,full"), and its name."""
    fields = []
    for setting in vary:
        name, equals, values = setting.partition("=")
        if not equals or not values:
            raise UserError(f"--vary takes FIELD=VALUE,VALUE (compute.remat=none,full), not '{setting}'.")
        fields.append([(name, value) for value in values.split(",")])
    for chosen in itertools.product(*fields):
        argv = [word for name, value in chosen for word in (f"--{name.replace('_', '-')}", value)]
        varied = parse(_Varied, _Varied(experiment), argv, "--vary").experiment
        yield " ".join(f"{name}={value}" for name, value in chosen), varied


def _bench(_: str, options: BenchOptions) -> int:
    request = Request(
        what=options.what,
        batch=options.batch,
        length=options.length,
        real_data=options.real_data,
        peak=options.peak,
        effort=Effort(options.budget, options.width, options.warm_cache),
        prompted=Prompted.fitting(options.experiment, options.prompt, options.new, options.weights),
        layers=options.layers,
        tokens_per_second=options.tokens_per_second,
    )
    result = bench(list(variants(options.experiment, options.vary)), request)
    if options.json:
        print_json(result)
    else:
        for line in lines(result):
            out().print(line, markup=False)
    if options.out:
        page = write(result, Path(options.out))
        say(f"report: {page}  (report.md, bench.json and pictures beside it)")
    return 0


def _compare(target: str, options: CompareOptions) -> int:
    found = compare(read(Path(target)), read(Path(options.new)))
    if options.json:
        print_json(found)
        return 0
    for line in compared(found):
        out().print(line, markup=False)
    return 0


def _peers(_: str, options: PeersOptions) -> int:
    experiment = sized(options.experiment, options.batch, options.length)
    prompted = Prompted.fitting(experiment, options.prompt, options.new) if options.what == "decode" else None
    found = bench_peers(experiment, options.peers, options.python, options.budget, prompted)
    if options.json:
        print_json(found)
    else:
        out().print(against_peers(found), markup=False)
        say("ratios above 1: transformer_jax is faster; other programs on the machine disturb both sides")
    if options.out:
        say(f"report: {write_peers(found, Path(options.out))}")
    return 0


def _profile(_: str, options: ProfileOptions) -> int:
    experiment = sized(options.experiment, options.batch, options.length)
    folder = Path(options.out or f"runs/profile-{experiment.name}")
    found = profile(experiment, folder, options.steps)
    if options.json:
        print_json(found)
    else:
        parts = Table("ms a step", "share", "forward", "backward", "part", box=None, pad_edge=False)
        for one in found["parts"][: options.top]:
            milliseconds = [f"{one[name]:.3f}" for name in ("milliseconds", "forward", "backward")]
            parts.add_row(milliseconds[0], f"{one['share']:.1%}", *milliseconds[1:], one["part"])
        rows = Table("ms a step", "share", "calls", "operation", "of", "line", box=None, pad_edge=False)
        for one in found["operations"][: options.top]:
            figures = f"{one['milliseconds']:.3f}", f"{one['share']:.1%}", f"{one['calls']:g}"
            rows.add_row(*figures, one["name"], one["source"].rpartition("/")[2], one["where"])
        out().print(parts, "", rows)
    say(f"trace: {found['trace']}  (xprof --logdir {folder}, or TensorBoard)")
    return 0


VERBS = {
    "bench": Verb(
        "RECIPE",
        "how fast it trains, decodes, loads, saves or compiles, beside what the device can do",
        BenchOptions,
        lambda target: BenchOptions(experiment_of(target)),
        _bench,
    ),
    "bench-compare": Verb(
        "A B",
        "is B faster than A, is that more than chance, and what was different",
        CompareOptions,
        lambda _: CompareOptions(""),
        _compare,
    ),
    "bench-peers": Verb(
        "RECIPE",
        "the same work in PyTorch, by turns on the same device",
        PeersOptions,
        lambda target: PeersOptions(experiment_of(target)),
        _peers,
    ),
    "profile": Verb(
        "RECIPE",
        "where the time of a training step goes: a trace, and its longest operations",
        ProfileOptions,
        lambda target: ProfileOptions(experiment_of(target)),
        _profile,
    ),
}
