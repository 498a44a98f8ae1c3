"""Questions on contexts as they are given: SQuAD's nested JSON, flat JSON lines, or TFDS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from transformer_jax.data.files import Lines, json_object, plain_suffix
from transformer_jax.data.holdout import SPLITS, Split, hold_out
from transformer_jax.data.progress import shown
from transformer_jax.errors import UserError

FORMS: Final = "squad.json (SQuAD's layout) or flat.jsonl (each also .gz or .xz)"
_PROBES: Final = 64

Misplaced = Literal["error", "drop"]


class Question(NamedTuple):
    """One question on one context. The texts are as given: answers are found by character."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Acceptable answers, each with the character of the context where it begins; none if there is no answer."""
    title: str
    where: str
    """Where it stands, for messages."""


class QuestionTable(Protocol):
    """The questions of one split."""

    @property
    def name(self) -> str:
        """What to call the split in messages."""

    @property
    def digest(self) -> str:
        """Hash that differs where the content differs."""

    @property
    def questions(self) -> Sequence[Question]:
        """All questions. Raises `UserError` for one that is malformed."""


def is_question_file(dataset: str) -> bool:
    """Tell the user's own file from the name of a TFDS dataset."""
    return plain_suffix(Path(dataset)) in (".json", ".jsonl") or Path(dataset).expanduser().is_file()


def open_questions(dataset: str, parts: dict[Split, str], data_dir: str) -> dict[Split, QuestionTable]:
    """Open train, validation and test.

    Args:
        dataset: a TFDS name (`squad`, `squad/v2.0`, `tjax_tasks/wordnet_qa`) or a file.
        parts: for each split a TFDS split expression or a file; "" is the split of that name (test: "validation" for
            `squad`, whose test questions are not public), or for a file what is held out of it by title, or by context
            where not every question has a title or there are fewer than three.
        data_dir: where TFDS keeps prepared datasets; "" is its own default.

    Raises `UserError` for whatever is absent or malformed.

    """
    if is_question_file(dataset):
        return _files(dataset, parts)
    from transformer_jax.data.tfds_source import open_tfds  # noqa: PLC0415 - TFDS takes a second to import

    test = "validation" if dataset.partition("/")[0].partition(":")[0] == "squad" else "test"
    names: dict[Split, str] = {"train": "train", "validation": "validation", "test": test}
    info, opened = open_tfds(dataset, {split: parts[split] or names[split] for split in SPLITS}, data_dir, FORMS)
    return {
        split: TfdsQuestions(f"{info.full_name}:{parts[split] or names[split]}", examples)
        for split, examples in opened.items()
    }


class FileQuestions:
    """Questions of a file, in memory."""

    def __init__(self, name: str, questions: list[Question], digest: str) -> None:
        self.name, self.questions, self.digest = name, questions, digest


class TfdsQuestions:
    """The questions of one split of a prepared TFDS dataset; they are read when they are asked for."""

    def __init__(self, name: str, examples: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self._examples = examples
        probes = range(0, len(examples), max(1, len(examples) // _PROBES))
        content = [name, len(examples), [_question(_plain(examples[i]), "", f"{name} example {i}") for i in probes]]
        self.digest = hashlib.sha256(repr(content).encode()).hexdigest()

    @cached_property
    def questions(self) -> Sequence[Question]:
        """All questions."""
        contexts: dict[str, str] = {}  # many questions share one
        questions = []
        for row in shown(range(len(self._examples)), f"Reading {self.name}", len(self._examples)):
            question = _question(_plain(self._examples[row]), "", f"{self.name} example {row}")
            questions.append(question._replace(context=contexts.setdefault(question.context, question.context)))
        return questions


def _files(dataset: str, parts: dict[Split, str]) -> dict[Split, QuestionTable]:
    whole = read_questions(Path(dataset).expanduser())
    held: list[Split] = ["train"] * len(whole.questions)
    if not (parts["validation"] and parts["test"]):
        titles = [question.title for question in whole.questions]
        groups = titles if all(titles) and len(set(titles)) > 2 else [q.context for q in whole.questions]
        held = [split if not parts[split] else "train" for split in hold_out(groups, where=dataset)]
    splits: dict[Split, QuestionTable] = {}
    for split in SPLITS:
        if parts[split]:
            if not is_question_file(parts[split]):
                raise UserError(f"data.{split} = '{parts[split]}' is no file; split expressions are for TFDS datasets.")
            splits[split] = read_questions(Path(parts[split]).expanduser())
        else:
            rows = [row for row, owner in enumerate(held) if owner == split]
            digest = hashlib.sha256(f"{whole.digest} {rows}".encode()).hexdigest()
            splits[split] = FileQuestions(f"{dataset} ({split})", [whole.questions[row] for row in rows], digest)
    return splits


def read_questions(path: Path) -> FileQuestions:
    """Read a file. Raises `UserError` for what is malformed, for a repeated id, and for a file without a question."""
    suffix = plain_suffix(path)
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: cannot tell the format from the name; give {FORMS}.")
    lines = Lines(path)
    questions = list(_flat(lines) if suffix == ".jsonl" else _nested(lines))
    if not questions:
        raise UserError(f"{path}: there is no question in it.")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{question.where}: the id '{question.id}' occurs twice.")
        seen.add(question.id)
    return FileQuestions(str(path), questions, lines.digest)


def _flat(lines: Lines) -> Iterator[Question]:
    for number, line in lines:
        where = f"{lines.path}:{number}"
        row = json_object(line, where, "an object with the keys question, context and answers")
        yield _question(row, str(number), where)


def _nested(lines: Lines) -> Iterator[Question]:
    try:
        content = json.loads("\n".join(line for _, line in lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{lines.path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}).") from error
    for a, article in enumerate(_listed(content, "data", str(lines.path)), start=1):
        in_article = f"{lines.path}: article {a}"
        for p, paragraph in enumerate(_listed(article, "paragraphs", in_article), start=1):
            where = f"{in_article}, paragraph {p}"
            for q, asked in enumerate(_listed(paragraph, "qas", where), start=1):
                if not isinstance(asked, dict):
                    raise UserError(f"{where}, question {q}: expected an object.")
                row = {"context": paragraph.get("context"), "title": article.get("title", ""), **asked}
                yield _question(row, f"{a}.{p}.{q}", f"{where}, question {q}")


def _listed(node: Any, key: str, where: str) -> list[Any]:
    if not isinstance(node, dict) or not isinstance(node.get(key), list):
        raise UserError(f"{where}: no list '{key}'; SQuAD's layout is data, paragraphs, qas.")
    return node[key]


def _question(row: Mapping[str, Any], number: str, where: str) -> Question:
    for key in ("question", "context"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: '{key}' is {'empty' if isinstance(row.get(key), str) else 'missing'}.")
    answers = tuple(_answers(row.get("answers") or (), where))
    if row.get("is_impossible") and answers:
        raise UserError(f"{where}: question '{row.get('id', number)}' is_impossible and has an answer.")
    return Question(
        str(row.get("id", number)), row["question"], row["context"], answers, str(row.get("title", "")), where
    )


def _answers(answers: Any, where: str) -> Iterator[tuple[str, int]]:
    """Read {"text": [...], "answer_start": [...]}, or a list of {"text": ..., "answer_start": ...}."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError(f"{where}: 'answers' needs as many 'text' as 'answer_start'.")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    for answer in answers:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(start, int) or not text.strip():
            raise UserError(f"{where}: an answer needs 'text' and 'answer_start', got {answer}.")
        yield text, start


def misplaced_answer(question: Question) -> str | None:
    """Say which answer is not at its offset in the context, or None."""
    for text, start in question.answers:
        if start < 0 or question.context[start : start + len(text)] != text:
            found = question.context.find(text)
            there = "it is nowhere in it" if found < 0 else f"it is at {found}"
            return (
                f"{question.where}: question '{question.id}': its context does not read '{text[:60]}' at character "
                f"{start}; {there}."
            )
    return None


def _plain(value: Any) -> Any:
    """Return what TFDS gives as plain Python: text instead of bytes, lists instead of arrays."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
