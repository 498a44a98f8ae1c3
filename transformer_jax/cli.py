"""`tjax VERB ...`: one thin subcommand per verb.

Results go to standard output, everything else to standard error; with --json, standard output is one JSON object.
Bad input ends with one line and exit code 2, an interrupted run with 128 + the signal's number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from transformer_jax import verbs
from transformer_jax.attention_page import Heads
from transformer_jax.bench import bench_train
from transformer_jax.compare import compare, with_settings
from transformer_jax.config import DecodeConfig, Experiment, TrainConfig, flatten, read_experiment
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError, closest
from transformer_jax.evaluate import parallel_text
from transformer_jax.logs import print_json, say
from transformer_jax.recipes import find_experiments, find_recipe
from transformer_jax.translate import Translation, Translator

T = TypeVar("T")
Tree = Annotated[Experiment, tyro.conf.arg(name="")]

USAGE = """\
usage: tjax VERB ...

  tjax list                        recipes that ship with the project
  tjax show RECIPE                 parameters by component, and every setting; takes no memory
  tjax train RECIPE                train, or continue where it was interrupted
  tjax evaluate RUN                score a trained run on held-out text
  tjax translate RUN "sentence"    translate an argument, a file, or standard input
  tjax attention RUN "sentence"    draw what each token looks at: PNGs, and a page to explore
  tjax compare PLAN                train several on the same text; report quality, speed, pictures
  tjax bench RECIPE                time the training step, beside the rate of a matrix product

RECIPE and PLAN are names that `tjax list` shows, or FILE.py:function; RUN is the folder that `tjax train` printed.
`tjax VERB --help` explains a verb, `tjax train RECIPE --help` lists every setting of a recipe.
"""


@dataclass(frozen=True)
class ListOptions:
    """Show the recipes that ship with the project."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ShowOptions:
    """Count the parameters of an experiment by component, without allocating memory."""

    experiment: Tree
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TrainOptions:
    """Train an experiment. Typed again, it continues where it was interrupted, or does nothing if it was done."""

    experiment: Tree
    out: str = ""
    """Run folder; by default runs/NAME."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a run on its held-out test split, or on another test set, with BLEU and chrF beside two floors."""

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")]
    test: str = ""
    """Another test set: files (pairs.tsv, pairs.jsonl, a.de,a.en) or a TFDS dataset."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TranslateOptions:
    """Translate with a trained run: a sentence, a file with one sentence a line, or standard input."""

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")]
    text: Annotated[str, tyro.conf.Positional] = ""
    """The sentence; without it, sentences are read from --file or standard input, one a line."""
    file: str = ""
    """Text file with one sentence a line."""
    attention_map: str = ""
    """PNG to draw: where each word of the (first) translation looks in the source."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class AttentionOptions:
    """Draw what a trained run looks at: one PNG for each kind of attention, and a page to explore all of it."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The sentence to read."""
    target: str = ""
    """The text to write, instead of the model's own translation."""
    kind: tuple[str, ...] = ()
    """Of attention, to draw as PNG: cross, encoder, decoder; by default all that the model has."""
    layer: tuple[int, ...] = ()
    """Layers to draw as PNG, numbered from 1; by default all."""
    head: Heads = "mean"
    """Heads to draw as PNG: their mean, all of them, or numbers from 1."""
    out: str = ""
    """Folder for the files; by default RUN/attention."""
    json: bool = False
    """Print one JSON object: tokens, layers and heads of each kind, and the files."""


@dataclass(frozen=True)
class CompareOptions:
    """Train several experiments on the same text with several seeds, and report what differs, with pictures.

    Typed again, it continues where it was interrupted.
    """

    data: ParallelText
    train: TrainConfig
    seeds: int = 2
    """Runs of each experiment."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Sequence lengths at which the speed of a training step is measured."""
    tokens: int = 2048
    """Tokens a side of a batch in that measurement."""
    out: str = ""
    """Folder for the runs and the report; by default runs/compare_PLAN."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class BenchOptions:
    """Time the training step of an experiment on random tokens, beside the rate of a matrix product."""

    experiment: Tree
    rows: int = 32
    """Pairs of a batch."""
    length: int = 64
    """Tokens on each side of a pair."""
    steps: int = 20
    """Steps timed, after three that are not."""
    json: bool = False
    """Print one JSON object."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(_run(argv))
    except UserError as error:
        say(f"tjax: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("tjax: interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        sys.exit(1)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise UserError(f"there is no verb '{verb}'.{closest(verb, VERBS)} `tjax --help` lists them.")
    return VERBS[verb](rest)


def _list(argv: list[str]) -> int:
    options = parse(ListOptions, ListOptions(), argv, "tjax list")
    found = verbs.list_recipes()
    if options.json:
        print_json(found)
        return 0
    width = max(len(name) for names in found.values() for name in names)
    for kind, names in found.items():
        _out().print(f"{kind}:")
        for name, what in names.items():
            _out().print(f"  {name:{width}}  {what}", markup=False)
    return 0


def _show(argv: list[str]) -> int:
    target, rest = _target(argv, ShowOptions, "RECIPE")
    options = parse(ShowOptions, ShowOptions(_experiment(target)), rest, f"tjax show {target}")
    shown = verbs.show(options.experiment)
    if options.json:
        print_json(shown)
        return 0
    parameters, published = shown["parameters"], shown["published"]
    table = Table("component", title=shown["experiment"], title_justify="left", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for name, count in parameters.items():
        table.add_row(name, f"{count:,}", style="bold" if name == "total" else "")
    out = _out()
    out.print(table)
    if published:
        share = parameters["total"] / published["parameters"] - 1
        out.print(f"published {published['parameters']:,} ({published['source']}); ours differs by {share:+.1%}")
        out.print(published["note"], markup=False)
    out.print()
    for key, value in shown["settings"].items():
        out.print(f"  {key} = {value}", markup=False)
    return 0


def _train(argv: list[str]) -> int:
    target, rest = _target(argv, TrainOptions, "RECIPE")
    is_run = (Path(target) / "experiment.json").is_file()
    default = TrainOptions(_experiment(target), out=target if is_run else "")
    options = parse(TrainOptions, default, rest, f"tjax train {target}")
    outcome = verbs.train(options.experiment, options.out or None)
    if options.json:
        print_json(dataclasses.asdict(outcome) | {"run": str(outcome.run)})
    elif outcome.stopped_by:
        say(f"stopped by {outcome.stopped_by} at step {outcome.step}; the same command continues")
    elif outcome.step == outcome.started_at:
        say(f"nothing to train: {outcome.run} is at step {outcome.step} of {options.experiment.train.steps}")
    else:
        say(f"trained to step {outcome.step} in {outcome.seconds / 60:.1f} min")
    say(f"run folder: {outcome.run}  (checkpoints/, metrics.jsonl, tensorboard/, loss.png, provenance.json)")
    return 128 + signal.Signals[outcome.stopped_by] if outcome.stopped_by else 0


def _evaluate(argv: list[str]) -> int:
    run, rest = _target(argv, EvaluateOptions, "RUN")
    options = parse(EvaluateOptions, EvaluateOptions(_run_experiment(run).decode), rest, f"tjax evaluate {run}")
    result = verbs.evaluate(run, options.test, options.decode)
    if options.json:
        print_json(result.report)
        return 0
    out = _out()
    scores = result.report["scores"]
    count = scores["model"]["sentences"]
    table = Table(
        f"{count} held-out sentences", title=f"{run}, test: {result.report['test']}", box=None, pad_edge=False
    )
    for column in ("BLEU", "95 %", "chrF", "95 % "):
        table.add_column(column, justify="right")
    for name, values in scores.items():
        cells = [f"{values['bleu']:.1f}", _interval(values["bleu_interval"])]
        cells += [f"{values['chrf']:.1f}", _interval(values["chrf_interval"])]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "model" else "")
    out.print(table)
    for metric in ("bleu", "chrf"):
        out.print(f"{metric}: {scores['model'][f'{metric}_signature']}", markup=False)
    for i in result.samples:
        output = result.scored.translations[i]
        out.print(f"\n  source     {output.source}", markup=False)
        out.print(f"  reference  {result.scored.references[i]}", markup=False)
        out.print(f"  model      {output.text}", markup=False)
    say(f"\nwritten: {', '.join(map(str, result.files))}")
    return 0


def _translate(argv: list[str]) -> int:
    run, rest = _target(argv, TranslateOptions, "RUN")
    options = parse(TranslateOptions, TranslateOptions(_run_experiment(run).decode), rest, f"tjax translate {run}")
    if options.text and options.file:
        raise UserError("give a sentence or --file, not both.")
    if options.attention_map and not Path(options.attention_map).absolute().parent.is_dir():
        raise UserError(f"--attention-map {options.attention_map}: there is no such folder.")
    sentences = [options.text] if options.text else _lines(options.file)
    translator = Translator.open(Path(run), options.decode.average)
    decode = options.decode
    if not options.text and not options.file and sys.stdin.isatty():
        decode = dataclasses.replace(decode, batch=1)  # a person is typing: answer every line
    outputs: list[Translation] = []
    for output in translator.translate(sentences, decode):
        if not outputs and options.attention_map:
            verbs.draw_attention(translator, output.source, output.text, Path(options.attention_map))
        outputs.append(output)
        if not options.json:
            sys.stdout.write(output.text + "\n")
            sys.stdout.flush()
    if options.json:
        print_json({"run": run, "translations": [dataclasses.asdict(output) for output in outputs]})
    if options.attention_map and outputs:
        say(f"written: {options.attention_map}")
    return 0


def _attention(argv: list[str]) -> int:
    run, rest = _target(argv, AttentionOptions, "RUN")
    options = parse(AttentionOptions, AttentionOptions(), rest, f"tjax attention {run}")
    choice: dict[str, Any] = {"kinds": options.kind, "layers": options.layer, "heads": options.head}
    drawn = verbs.attention(run, options.text, options.target, options.out or None, **choice)
    if options.json:
        maps = [
            {"kind": m.kind, "layers": len(m.weights_LNTS), "heads": m.weights_LNTS.shape[1]}
            | {"rows": m.rows, "columns": m.columns}
            for m in drawn.maps
        ]
        files = [str(file) for file in drawn.files]
        print_json({"run": run, "source": drawn.source, "target": drawn.target, "maps": maps, "files": files})
        return 0
    sys.stdout.write(f"{drawn.target}\n")
    say(f"written: {', '.join(map(str, drawn.files))}")
    return 0


def _compare(argv: list[str]) -> int:
    plan, rest = _target(argv, CompareOptions, "PLAN")
    experiments = find_experiments(plan)
    default = CompareOptions(parallel_text(experiments[0]), experiments[0].train)
    options = parse(CompareOptions, default, rest, f"tjax compare {plan}")
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}.")
    experiments = [with_settings(experiment, options.data, options.train) for experiment in experiments]
    out = Path(options.out or Path("runs") / f"compare_{plan.rsplit(':')[-1]}")
    files = compare(experiments, options.seeds, out, options.lengths, options.tokens)
    if options.json:
        print_json(json.loads(files[-1].read_text(encoding="utf-8")))
    say(f"written: {', '.join(map(str, files))}")
    return 0


def _bench(argv: list[str]) -> int:
    target, rest = _target(argv, BenchOptions, "RECIPE")
    options = parse(BenchOptions, BenchOptions(_experiment(target)), rest, f"tjax bench {target}")
    result = bench_train(options.experiment, options.rows, options.length, options.steps)
    if options.json:
        print_json(result)
        return 0
    step, out = result["step_seconds"], _out()
    out.print(f"{result['experiment']}, {options.rows} pairs of {options.length} tokens a side")
    out.print(f"first step   {result['first_step_seconds']:.1f} s, compiling included")
    bounds = f"{step['low'] * 1e3:.1f} to {step['high'] * 1e3:.1f}"
    out.print(f"step         {step['median'] * 1e3:.1f} ms (median of {step['samples']}; 95 % {bounds})")
    out.print(f"speed        {result['tokens_per_second']:,.0f} target tokens/s")
    out.print(
        f"work         {result['model_flops_per_second'] / 1e9:,.1f} GFLOP/s of the model, "
        f"{result['share_of_matmul_rate']:.0%} of the {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s that a "
        "matrix product reached in this run"
    )
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "train": _train,
    "evaluate": _evaluate,
    "translate": _translate,
    "compare": _compare,
    "bench": _bench,
    "attention": _attention,
}


def parse(kind: type[T], default: T, argv: list[str], prog: str) -> T:
    """Read typed options from the command line by the dataclass `kind`, every field of an experiment included.

    Raises:
        UserError: an unknown option (the closest is named) or a value of the wrong type.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, unknown = tyro.cli(
                kind,
                default=default,
                args=argv,
                prog=prog,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box of several lines; the first paragraph in it is the message.
        text = re.sub(r"[│╭╮╰╯]", "", errors.getvalue()).split("──")
        message = next((part.strip() for part in text[1:] if len(part.split()) > 2), errors.getvalue())
        raise UserError(f"{message} (`{prog} --help` lists the options)") from None
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument '{unknown[0]}'. (`{prog} --help`)")
    if unknown:
        options_known = [f"--{name.replace('_', '-')}" for name in _option_names(default)]
        raise UserError(f"unknown option {unknown[0]}.{closest(unknown[0], options_known)} (`{prog} --help`)")
    return options


def _option_names(default: Any) -> Iterator[str]:
    for name, _ in flatten(default):
        yield re.sub(r"^(experiment|decode)\.", "", name)  # these fields are named ""


def _target(argv: list[str], kind: type[Any], what: str) -> tuple[str, list[str]]:
    """Take the recipe or run folder from the front; `tjax VERB --help` explains the verb without one."""
    verb = kind.__name__.removesuffix("Options").lower()
    if argv and argv[0] in ("-h", "--help"):
        settings = "the options" if what == "RUN" else "every setting"
        sys.stdout.write(f"usage: tjax {verb} {what} [options]\n\n{kind.__doc__}\n\n")
        sys.stdout.write(f"`tjax {verb} {what} --help` lists {settings}.\n")
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"tjax {verb} needs a {what} first: tjax {verb} {what} [options].")
    return argv[0], argv[1:]


def _experiment(target: str) -> Experiment:
    """Return the experiment of a recipe, or of a run folder."""
    file = Path(target) / "experiment.json"
    if file.is_file():
        return read_experiment(file)
    return find_recipe(target)


def _run_experiment(run: str) -> Experiment:
    file = Path(run) / "experiment.json"
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (it has no experiment.json); `tjax train` prints where it writes.")
    return read_experiment(file)


def _lines(file: str) -> Iterator[str]:
    """Yield the lines of a file, or of standard input."""
    if file and not Path(file).is_file():
        raise UserError(f"{file}: there is no such file.")
    with Path(file).open("rb") if file else contextlib.nullcontext(sys.stdin.buffer) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{file or 'standard input'}:{number}: not UTF-8 ({error.reason}).") from error


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def _out() -> Console:
    return Console(highlight=False, soft_wrap=True)
