"""fill, classify, answer, embed, summarize: what a model that reads is used for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from transformer_jax.cli.verb import Verb, experiment_of_run, lines_of, out
from transformer_jax.config import DecodeConfig, read_experiment
from transformer_jax.errors import UserError
from transformer_jax.logs import print_json, say
from transformer_jax.models.bert import BertConfig
from transformer_jax.reading import Pooling, Reader
from transformer_jax.storage import run_path
from transformer_jax.translate import Translator


@dataclass(frozen=True)
class FillOptions:
    """Say what may stand at each [MASK] of a text. Without a RUN, the newest pre-trained BERT under runs/ is asked."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The text; without it, texts are read from --file or standard input, one a line."""
    file: str = ""
    """Text file with one text a line."""
    best: int = 5
    """Candidates for each gap."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ClassifyOptions:
    """Label a text, each line of a file, or of standard input: a class, a number, or a tag for each word."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The text; without it, texts are read from --file or standard input, one a line."""
    pair: str = ""
    """The second text, for a model of pairs; in a file it stands after a tab."""
    file: str = ""
    """Text file with one text a line."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class AnswerOptions:
    """Answer questions from a text: the answer is cut out of it."""

    context: str = ""
    """Text file to read; without it, standard input."""
    question: tuple[str, ...] = ()
    """What is asked, one or several."""
    max_answer_length: int = 30
    """Longest answer, in tokens."""
    null_threshold: float | None = None
    """Say "no answer" where that outscores the best span by more than this; unset, always answer."""
    json: bool = False
    """Print one JSON object, with the other candidates."""


@dataclass(frozen=True)
class EmbedOptions:
    """Turn each line of a file into a vector of length 1, and write them as a NumPy array [N, D]."""

    file: Annotated[str, tyro.conf.Positional] = ""
    """Text file with one text a line; without it, standard input."""
    out: str = "vectors.npy"
    """File to write."""
    pooling: Pooling = "mean"
    """Mean over the tokens, or the vector of [CLS]."""
    similar: bool = False
    """Also print the nearest other line of each, by cosine."""
    json: bool = False
    """Print one JSON object with the vectors, and write no file."""


@dataclass(frozen=True)
class SummarizeOptions:
    """Summarize a text file (all of it is one text) with an encoder-decoder that was trained to."""

    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")]
    file: Annotated[str, tyro.conf.Positional] = ""
    """The text file; without it, standard input."""
    json: bool = False
    """Print one JSON object."""


def _fill(target: str, options: FillOptions) -> int:
    run = run_path(target)
    run, text = (run, options.text) if run.is_dir() else (_newest_bert(), target)
    texts = [text] if text else list(lines_of(options.file))
    filled = Reader.open(run).fill(texts, options.best)
    if options.json:
        rows = [{"text": text, "gaps": [vars(gap) for gap in gaps]} for text, gaps in zip(texts, filled, strict=True)]
        print_json({"run": str(run), "texts": rows})
        return 0
    for text, gaps in zip(texts, filled, strict=True):
        out().print(text, markup=False)
        for gap in gaps:
            line = "  ".join(f"{token} {p:.1%}" for token, p in zip(gap.tokens, gap.probabilities, strict=True))
            out().print(f"  {line}", markup=False)
    return 0


def _newest_bert() -> Path:
    """Return the newest run under runs/ that fills gaps, and say so."""
    runs = sorted(Path("runs").glob("*/experiment.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in runs:
        model = read_experiment(file).model
        if isinstance(model, BertConfig) and model.task in ("pretrain", "mlm"):
            say(f"asking {file.parent}")
            return file.parent
    raise UserError(
        "there is no pre-trained BERT under runs/: train one (tjax train bert_small_demo), import one (tjax convert), "
        "or name its folder: tjax fill RUN TEXT."
    )


def _classify(run: str, options: ClassifyOptions) -> int:
    reader = Reader.open(run)
    rows = [(options.text, options.pair)] if options.text else [_split(line) for line in lines_of(options.file)]
    texts, pairs = [text for text, _ in rows], [pair for _, pair in rows]
    outputs = list(reader.classify(texts, pairs if any(pairs) else None))
    if options.json:
        print_json({"run": run, "texts": [{"text": t, **vars(o)} for t, o in zip(texts, outputs, strict=True)]})
        return 0
    for text, output in zip(texts, outputs, strict=True):
        shown = " ".join(output.label) if isinstance(output.label, list) else str(output.label)
        sure = f"  {output.probabilities[shown]:.1%}" if output.probabilities else ""
        sys.stdout.write(f"{shown}{sure}\t{text}\n")
    return 0


def _split(line: str) -> tuple[str, str]:
    text, _, pair = line.partition("\t")
    return text, pair


def _answer(run: str, options: AnswerOptions) -> int:
    if not options.question:
        raise UserError('there is no --question: tjax answer RUN --context FILE --question "What is ...?".')
    if options.max_answer_length < 1:
        raise UserError(f"--max-answer-length must be at least 1, got {options.max_answer_length}.")
    context = "\n".join(lines_of(options.context))
    answers = Reader.open(run).answer(
        context,
        options.question,
        max_answer_length=options.max_answer_length,
        null_threshold=options.null_threshold,
    )
    if options.json:
        rows = [
            {"question": question, "answer": answer.text, "null_difference": answer.null_difference}
            | {"candidates": [candidate._asdict() for candidate in answer.candidates]}
            for question, answer in zip(options.question, answers, strict=True)
        ]
        print_json({"run": run, "context": options.context, "answers": rows})
        return 0
    for answer in answers:
        sys.stdout.write((answer.text or "(no answer)") + "\n")
    return 0


def _embed(run: str, options: EmbedOptions) -> int:
    texts = [line for line in lines_of(options.file) if line.strip()]
    if not texts:
        raise UserError(f"{options.file or 'standard input'}: there is no text.")
    path = Path(options.out)
    if not options.json and not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no such folder.")
    vectors = Reader.open(run).embed(texts, options.pooling)
    if options.json:
        print_json({"run": run, "texts": texts, "vectors": vectors.tolist()})
        return 0
    if options.similar and len(texts) > 1:
        cosine = vectors @ vectors.T - 2 * np.eye(len(texts))
        table = Table("text", "nearest", box=None, pad_edge=False)
        table.add_column("cosine", justify="right")
        for i, j in enumerate(cosine.argmax(1)):
            table.add_row(texts[i], texts[j], f"{cosine[i, j]:.3f}")
        out().print(table)
    np.save(path, vectors)
    say(f"written: {path} (float32 {len(texts)} x {vectors.shape[1]})")
    return 0


def _summarize(run: str, options: SummarizeOptions) -> int:
    text = " ".join(_words(lines_of(options.file)))
    translator = Translator.open(run, options.decode.average)
    (summary,) = translator.translate([text], options.decode)
    if options.json:
        print_json({"run": run, "file": options.file, "summary": summary.text, "score": summary.score})
        return 0
    sys.stdout.write(summary.text + "\n")
    return 0


def _words(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        yield from line.split()


VERBS = {
    "fill": Verb("RUN", "fill the gaps of a text", FillOptions, lambda _: FillOptions(), _fill),
    "classify": Verb(
        "RUN", "label texts: classes, numbers, tags", ClassifyOptions, lambda _: ClassifyOptions(), _classify
    ),
    "answer": Verb("RUN", "answer questions from a text file", AnswerOptions, lambda _: AnswerOptions(), _answer),
    "embed": Verb("RUN", "turn texts into vectors", EmbedOptions, lambda _: EmbedOptions(), _embed),
    "summarize": Verb(
        "RUN",
        "shorten a text file",
        SummarizeOptions,
        lambda run: SummarizeOptions(experiment_of_run(run).decode),
        _summarize,
    ),
}
