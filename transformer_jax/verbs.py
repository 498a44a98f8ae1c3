"""The verbs of the library: list, show, train, evaluate, translate, attention. The command line calls exactly these."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.attention_page import AttentionMap, Choice, Heads, attention_page
from transformer_jax.by_position import next_tokens
from transformer_jax.checkpoint import load_meta
from transformer_jax.config import DecodeConfig, Experiment, flatten
from transformer_jax.curves import compact_json, draw_numbered
from transformer_jax.data.translation import ParallelText
from transformer_jax.errors import UserError
from transformer_jax.evaluate import Scored, parallel_text, read_test, score
from transformer_jax.flops import active_parameters
from transformer_jax.held_out import held_out
from transformer_jax.logs import read_metrics
from transformer_jax.loop import Outcome, run_training
from transformer_jax.nn.module import Skeleton, parameter_count
from transformer_jax.plots import Curve, attention_grid, curves, loss_curve
from transformer_jax.provenance import provenance
from transformer_jax.recipes import plans, recipes
from transformer_jax.storage import run_path
from transformer_jax.translate import Translation, Translator

SAMPLES = 10
"""Held-out sentences shown after an evaluation."""


def list_recipes() -> dict[str, dict[str, str]]:
    """Return the "recipes" and "plans" by name, each with the first line of its description."""

    def described(found: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
        return {name: (inspect.getdoc(function) or "").split("\n", 1)[0] for name, function in found.items()}

    return {"recipes": described(recipes()), "plans": described(plans())}


def show(experiment: Experiment) -> dict[str, Any]:
    """Count the parameters of an experiment by component, without allocating any memory.

    Returns:
        "experiment" (its name), "parameters" (by component, and "total"), "active" (those that a token meets, fewer
        with experts), "published" (the paper's count, if any) and "settings" (every field).
    """
    experiment.check()
    skeleton = Skeleton.of(experiment.model, replace(experiment.compute, layers="scan"))
    abstract = skeleton.abstract
    components: dict[str, int] = {}
    for name, part in abstract.items():
        layers = part.get("layers") if isinstance(part, dict) else None
        if layers is None:
            components[name] = parameter_count(part)
        else:
            components |= {f"{name}.{block}": parameter_count(layers[block]) for block in layers}
    published = experiment.published
    return {
        "experiment": experiment.name,
        "parameters": components | {"total": parameter_count(abstract)},
        "active": active_parameters(skeleton),
        "published": None if published is None else vars(published),
        "settings": {key: value for key, value in flatten(experiment) if not key.startswith("published")},
    }


def train(experiment: Experiment, run: str | Path | None = None) -> Outcome:
    """Train an experiment in the folder `run` (`runs/NAME` unless given); a run that was interrupted goes on.

    The folder then holds checkpoints/, metrics.jsonl, tensorboard/, loss.png, experiment.json, tokenizer.json and
    provenance.json.

    Raises:
        UserError: bad settings or data, a folder that holds another experiment, NaN, or a full disk.
    """
    run = run_path(run or Path("runs") / experiment.name)
    outcome, data = run_training(experiment, run)
    if jax.process_index() == 0 and outcome.step > outcome.started_at:
        _record(outcome, data.summary())
    return outcome


def _record(outcome: Outcome, data: dict[str, Any]) -> None:
    """Draw the loss curve, and add this session to the provenance of the run."""
    records = read_metrics(outcome.run)
    if records:
        validation = [{"step": r["step"], "validation_loss": r["nll"]} for r in records if r["split"] == "validation"]
        training = [{"step": r["step"], "loss": r["nll"]} for r in records if r["split"] == "train"]
        loss_curve([*training, *validation], outcome.run / "loss.png")
    path = outcome.run / "provenance.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    session = {"from_step": outcome.started_at, "to_step": outcome.step, "seconds": outcome.seconds}
    _write_json(path, {"sessions": [*sessions, session | provenance() | {"data": data}]})


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, and where it wrote it."""

    run: Path
    report: dict[str, Any]
    files: list[Path]
    scored: Scored | None = None
    """What a translator wrote."""
    samples: Sequence[int] = ()
    """Positions in the test set of the sentences to show."""


def evaluate(
    run: str | Path, test: str = "", decode: DecodeConfig | None = None, *, by_position: bool = False
) -> Evaluation:
    """Score a run on its held-out test split, or on another test set, beside floors that need no training of ours.

    Writes evaluation.json, a picture of what is scored by number (errors after k examples), and, for a translator,
    translations.tsv (source, reference, translation) and for its own test split attention.png into the run folder;
    another test set gets files of its own name.

    Args:
        run: the run folder.
        test: another test set: files (pairs.tsv, pairs.jsonl, a.de,a.en) or a TFDS dataset, used in full.
        decode: search settings, instead of the experiment's; for translators only.
        by_position: of a language model, also the loss by how many tokens stood before, to by_position.json and .png.

    Raises:
        UserError: no readable checkpoint, absent or malformed data, or `by_position` of a run that predicts no next
            token.
    """
    run = run_path(run)
    experiment, tokenizer_json = load_meta(run)
    if by_position:
        next_tokens(experiment)
    suffix = f"-{Path(test).name}" if test else ""
    if not isinstance(experiment.data, ParallelText):
        report = held_out(run, test, positions=by_position)
        placed = []
        if by_position:
            placed = _write_positions(report["by_position"], run / f"by_position{suffix}.json")
            report |= {"by_position": report["by_position"]["groups"]}
        path = run / f"evaluation{suffix}.json"
        _write_json(path, report)
        beside = {"model": report["scores"], **report["floors"]}
        drawn = draw_numbered({name: [scores] for name, scores in beside.items()}, path.with_suffix(".png"))
        return Evaluation(run, report, [path, *placed, *drawn])
    decode = decode or experiment.decode
    own = parallel_text(experiment)
    pairs = read_test(own, test) if test else None
    translator = Translator.open(run, decode.average)
    data = own.open(experiment.model.vocab_size, tokenizer_json)
    pairs = data.pairs("test") if pairs is None else pairs
    scored = score(translator, data.pairs("train"), pairs, decode)
    report = {
        "run": str(run),
        "experiment": experiment.name,
        "checkpoints": translator.steps,
        "test": test or f"{own.dataset} (test)",
        "decode": vars(decode),
        "scores": scored.scores,
        "data": data.summary(),
        "provenance": provenance(),
    }
    files = [run / f"evaluation{suffix}.json", run / f"translations{suffix}.tsv"]
    _write_json(files[0], report)
    rows = zip(scored.translations, scored.references, strict=True)
    lines = ["\t".join((t.source, reference, t.text)).replace("\n", " ") + "\n" for t, reference in rows]
    files[1].write_text("".join(lines), encoding="utf-8")
    # The same sentences every time, from all over the test set.
    samples = sorted(random.Random(0).sample(range(len(pairs)), min(SAMPLES, len(pairs))))
    if not test and "cross" in _attention_sizes(experiment):
        lengths = [(abs(len(scored.translations[i].source.split()) - 8), i) for i in samples]
        shown = scored.translations[min(lengths)[1]]
        files.append(draw_attention(translator, shown.source, shown.text, run / "attention.png"))
    return Evaluation(run, report, files, scored, samples)


def _write_positions(found: dict[str, Any], path: Path) -> list[Path]:
    """Write the loss by position, and draw its groups at their geometric middles (positions counted from 1)."""
    path.write_text(compact_json(found), encoding="utf-8")
    middles = [math.sqrt((group["first"] + 1) * (group["last"] + 1)) for group in found["groups"]]
    line = Curve("held out", middles, [[group["nll"] for group in found["groups"]]])
    picture = path.with_suffix(".png")
    curves([line], picture, "token of its text", "nats a token", log=True)
    return [path, picture]


def translate(
    run: str | Path, sentences: str | Iterable[str], decode: DecodeConfig | None = None
) -> Iterator[Translation]:
    """Translate sentences with a trained run, in order, a batch at a time.

    Raises:
        UserError: the folder holds no readable checkpoint.
    """
    translator = Translator.open(run_path(run), decode.average if decode else None)
    return translator.translate([sentences] if isinstance(sentences, str) else sentences, decode)


def draw_attention(translator: Translator, source: str, target: str, path: Path) -> Path:
    """Draw where each target token looks in the source: cross-attention, averaged over heads, per decoder layer.

    Raises:
        UserError: the model has no attention.
    """
    weights, columns, rows = translator.attention(source, target)
    if "cross" not in weights:
        raise UserError(f"'{translator.experiment.name}' has no attention: there is nothing to draw.")
    panels = {f"decoder layer {i + 1}": layer_TS for i, layer_TS in enumerate(weights["cross"].mean(1))}
    attention_grid(panels, rows, columns, path, f"{source} → {target}")
    return path


LONGEST_DRAWN = 128
"""Tokens on a side of an attention picture: more, and nobody can read it."""


@dataclass(frozen=True)
class AttentionPictures:
    """What `attention` looked at, and where it drew it."""

    source: str
    target: str
    maps: list[AttentionMap]
    """Every kind, layer and head, whatever was drawn of them."""
    files: list[Path]


def attention(
    run: str | Path,
    source: str,
    target: str = "",
    out: str | Path | None = None,
    *,
    kinds: Iterable[str] = (),
    layers: Iterable[int] = (),
    heads: Heads = "mean",
) -> AttentionPictures:
    """Draw what a trained run looks at while it reads `source` and writes `target`.

    Writes one PNG for each kind of attention, and attention.html, a page on which to explore all of them.

    Args:
        run: the run folder.
        source: the sentence to read.
        target: the text to write, instead of the model's own translation.
        out: folder for the files; `run`/attention unless given.
        kinds: of attention, to draw as PNG; all that the model has unless given.
        layers: to draw as PNG, numbered from 1; all unless given.
        heads: to draw as PNG: their mean, "all", or numbers from 1.

    Raises:
        UserError: nothing to read, a choice that the model does not have, no readable checkpoint, or no translator.
    """
    run = run_path(run)
    out = run_path(out or run / "attention")
    if not source.strip():
        raise UserError("there is nothing to look at: the sentence is empty.")
    if out.suffix in (".png", ".html") or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: the pictures are several files; name a folder for them.")
    choice = Choice(tuple(kinds), tuple(layers), heads)
    experiment = load_meta(run)[0]
    parallel_text(experiment)
    choice.check(_attention_sizes(experiment))

    translator = Translator.open(run)
    for text in (source, target):
        if (tokens := len(translator.tokenizer.encode_batch([text])[0])) > LONGEST_DRAWN:
            raise UserError(f"{tokens} tokens are too many for a picture; at most {LONGEST_DRAWN} can be read.")
    note = "" if target.strip() else "The second line is the model's own translation."
    target = target if target.strip() else next(translator.translate([source])).text
    weights, read, written = translator.attention(source, target)
    past = [*translator.tokenizer.tokens(translator.specials[:1]), *written[:-1]]
    sides = {"encoder": (read, read), "decoder": (written, past), "cross": (written, read)}
    maps = [AttentionMap(kind, weights_LNTS, *sides[kind]) for kind, weights_LNTS in weights.items()]

    page = attention_page(source, target, note, maps, choice)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "attention.html"]
    for shown in maps:
        if not choice.kinds or shown.kind in choice.kinds:
            files.append(out / f"{shown.kind}.png")
            shown.draw(choice, files[-1], f"{shown.kind} attention: {source} → {target}")
    files[0].write_text(page, encoding="utf-8")
    return AttentionPictures(source, target, maps, files)


def _attention_sizes(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Return layers and heads of each kind of attention that a model has, without its parameters."""
    skeleton = Skeleton.of(experiment.model, replace(experiment.compute, layers="unrolled", attention="xla"))
    ids = jax.ShapeDtypeStruct((1, 1), np.int32)
    maps = jax.eval_shape(
        lambda params, source_BS, target_BT: skeleton.bind(params).attention_maps(source_BS, target_BT),
        *(skeleton.abstract, ids, ids),
    )
    return {kind: (weights_LBNTS.shape[0], weights_LBNTS.shape[2]) for kind, weights_LBNTS in maps.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
