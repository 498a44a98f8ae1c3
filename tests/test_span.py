"""Span question answering: windows, places of answers, decoding, no answer; mistakes in one line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import unicodedata
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.tiny import tiny
from transformer_jax.config import Experiment
from transformer_jax.data.span import SpanQA
from transformer_jax.data.span_data import SpanData
from transformer_jax.data.span_decode import decode_spans
from transformer_jax.data.span_windows import SpanWindows
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.task_metrics import squad

SPLITS = ("train", "validation", "test")
WORDS = ["서울은", "대한민국의", "수도이다", "Café", "naïve", "İstanbul", "x-ray", "don't", "(1990)", "a", "☃☃"]
WORDS += ["🙂", "👩\u200d👩\u200d👧", "🇰🇷", "고양이🐈"]
WORDS += [unicodedata.normalize("NFD", word) for word in ("Zürich", "한국")]


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | list[dict[str, Any]]) -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Tokenizer:
    """WordPiece of single characters, without the snowman: words are many tokens, or unknown."""
    seen = sorted({c for c in " ".join(WORDS).lower() + "abcdefghijklmnopqrstuvwxyz?" if c not in " ☃"})
    path = tmp_path_factory.mktemp("letters") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *seen, *(f"##{c}" for c in seen)]
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    path.with_name("tokenizer_config.json").write_text('{"strip_accents": false}', encoding="utf-8")
    return Tokenizer.load(path)


def question(id: str, context: str, answer: str | None, start: int = -1, asked: str = "What?") -> dict[str, Any]:
    answers = [] if answer is None else [answer]
    starts = [] if answer is None else [context.index(answer) if start < 0 else start]
    return {"id": id, "context": context, "question": asked, "answers": {"text": answers, "answer_start": starts}}


def same(file: str) -> dict[str, str]:
    return dict.fromkeys(SPLITS, file)


def opened(file: str, tokenizer: Tokenizer, **fields: Any) -> SpanData:
    fields = {"max_length": 40, "doc_stride": 9, "max_query_length": 6, "batch_rows": 8} | fields
    return SpanQA(file, **same(file) | fields).open(400, tokenizer.to_json())


def gold_logits(data: SpanData, windows: SpanWindows, height: float = 9.0) -> tuple[list[Any], list[Any]]:
    """Logits that are high where the batches say that the answers are."""
    starts = [np.zeros(40) for _ in range(len(windows))]
    ends = [np.zeros(40) for _ in range(len(windows))]
    for batch in windows.batches(data.encoder.buckets):
        for example, start, end in zip(batch["example"], batch["start"], batch["end"], strict=True):
            if example >= 0:
                starts[example][start] = ends[example][end] = height
    return starts, ends


def random_questions(count: int, answers: int = 3) -> list[dict[str, Any]]:
    """Answers are whole words; blanks are of several kinds."""
    rng = random.Random(7)
    found = []
    for number in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 30))]
        first = rng.randrange(len(words))
        last = min(first + rng.randint(1, answers), len(words))
        blanks = [rng.choice([" ", "  ", "\n", " \u3000"]) for _ in words]
        begin = sum(len(w) + len(b) for w, b in zip(words[:first], blanks[:first], strict=True))
        context = "".join(w + b for w, b in zip(words, blanks, strict=True))
        length = sum(len(w) + len(b) for w, b in zip(words[first:last], blanks[first:last], strict=True))
        found.append(question(str(number), context, context[begin : begin + length].strip(), begin))
    return found


def test_answers_survive_tokenization_windows_and_decoding(write, letters) -> None:
    """For Korean, emoji of several characters, decomposed accents: what comes out is the text of the answer."""
    asked = random_questions(150)
    data = opened(write("x.jsonl", asked), letters)
    windows = data.windows("validation")
    assert len(windows) > 600
    decoded = decode_spans(*gold_logits(data, windows), windows)
    assert data.references("validation") == {row["id"]: row["answers"]["text"] for row in asked}
    for row, answer in zip(asked, decoded, strict=True):
        assert [answer.text] == row["answers"]["text"]
        assert row["context"][answer.candidates[0].begin : answer.candidates[0].end] == answer.text
        assert answer.null_difference == -18


def test_the_tokens_of_a_batch(write, letters) -> None:
    context = "서울은 대한민국의 수도이다 🙂 a"
    rows = [question("q", context, "수도이다", asked="what comes after"), question("n", context, None)]
    file = write("x.jsonl", rows)
    data = opened(file, letters, max_length=80, bucket_lengths=(80,))
    (batch,) = data.validation_batches()
    row = batch["example"].tolist().index(0)
    tokenizer, length = data.tokenizer, int(batch["segments"][row].sum())
    (asked,), (read,) = tokenizer.encode_batch(["what comes after"]), tokenizer.encode_batch([context])
    expected = [tokenizer.cls, *asked[:6], tokenizer.sep, *read, tokenizer.sep]
    assert batch["tokens"][row].tolist() == expected + [0] * (80 - len(expected))
    assert batch["types"][row].tolist() == [0] * 8 + [1] * (len(read) + 1) + [0] * (80 - length)
    start, end = int(batch["start"][row]), int(batch["end"][row])
    assert tokenizer.decode(batch["tokens"][row, start : end + 1]) == "수도이다"
    for name in ("start", "end"):
        assert sorted(np.delete(batch[name], row)) == [-1] * 6 + [0]
        assert batch[name][batch["example"].tolist().index(1)] == 0
    assert (batch["segments"].sum(axis=1) == 0).sum() == 6
    assert data.text(0) == f"what comes after\t{context}"
    assert data.summary()["unanswerable"] == dict.fromkeys(SPLITS, 1)
    assert "2 train (2 windows), 2 validation (2 windows), 2 test (2 windows) questions, 1 training" in data.describe()
    assert json.loads(json.dumps(data.summary()))["windows_with_answer"]["train"] == 1


def test_windows_are_those_of_devlins_loop(write, letters) -> None:
    for stride, words in itertools.product((1, 7, 50), (1, 9, 40)):
        context = " ".join(WORDS[i % len(WORDS)] for i in range(words))
        data = opened(write("x.jsonl", [question("q", context, None)]), letters, doc_stride=stride)
        arrays = data.windows("train").arrays
        (read,), (asked,) = letters.encode_batch([context]), letters.encode_batch(["What?"])
        room, start, expected = 40 - len(asked) - 3, 0, []
        while start < len(read):
            length = min(len(read) - start, room)
            expected.append((start, length))
            if start + length == len(read):
                break
            start += min(length, stride)
        assert list(zip(arrays.first.tolist(), arrays.count.tolist(), strict=True)) == expected
        assert arrays.lengths.max() <= 40


def test_decoding_compares_every_span_of_every_window(write, letters) -> None:
    """Against a search over all windows and spans; each span is scored where it has the most context."""
    data = opened(write("x.jsonl", random_questions(12)), letters, doc_stride=5)
    windows = data.windows("train")
    rng = np.random.default_rng(0)
    starts, ends = rng.normal(size=(2, len(windows), 40)).astype(np.float32)
    decoded = decode_spans(starts, ends, windows, n_best=4, max_answer_length=3, null_threshold=-2.5)
    arrays = windows.arrays
    for number, answer in enumerate(decoded):
        ours = np.flatnonzero(arrays.question_of_window == number)
        spans: dict[tuple[int, int], tuple[float, float]] = {}
        for window in ours:
            first, count = int(arrays.first[window]), int(arrays.count[window])
            shift = int(arrays.context_position[window])
            for i in range(count):
                for j in range(i, min(i + 3, count)):
                    context = min(i, count - 1 - j) + 0.01 * count
                    score = float(starts[window, shift + i]) + float(ends[window, shift + j])
                    if context > spans.get((first + i, first + j), (-1.0, 0.0))[0]:
                        spans[first + i, first + j] = (context, score)
        offset = int(arrays.context_offsets[arrays.context_of_question[number]])
        by_text: dict[tuple[int, int], float] = {}
        for (i, j), (_, score) in spans.items():
            place = int(arrays.begin[offset + i]), int(arrays.end[offset + j])
            by_text[place] = max(score, by_text.get(place, -np.inf))
        best = sorted(by_text.items(), key=lambda item: -item[1])[:4]
        assert [(c.begin, c.end) for c in answer.candidates] == [place for place, _ in best]
        assert [c.score for c in answer.candidates] == pytest.approx([score for _, score in best])
        null = min(float(starts[w, 0]) + float(ends[w, 0]) for w in ours)
        assert answer.null_difference == pytest.approx(null - best[0][1])
        assert (answer.text == "") == (answer.null_difference > -2.5)
        odds = np.exp([score for _, score in best] + [null])
        assert [c.probability for c in answer.candidates] == pytest.approx((odds / odds.sum())[:-1].tolist())
    assert {answer.text == "" for answer in decoded} == {True, False}
    assert all(answer.text for answer in decode_spans(starts, ends, windows))


def test_the_best_threshold_of_validation_tells_who_has_no_answer(write, letters) -> None:
    asked = [question(str(i), f"{word} 서울은 a", word if i % 2 else None) for i, word in enumerate(WORDS)]
    data = opened(write("x.jsonl", asked), letters)
    windows, references = data.windows("validation"), data.references("validation")
    starts, ends = gold_logits(data, windows, height=3.0)
    for logits in (*starts, *ends):
        logits[0] += 4.0  # a model that says "none" too often, at a threshold of 0
    timid = decode_spans(starts, ends, windows, null_threshold=0.0)
    assert {answer.text for answer in timid} == {""}
    raw = decode_spans(starts, ends, windows)
    differences = {answer.id: answer.null_difference for answer in raw}
    scores = squad({answer.id: answer.text for answer in raw}, references, differences)
    assert scores["best_f1"] == 100 > scores["f1"]
    tuned = decode_spans(starts, ends, windows, null_threshold=scores["best_f1_thresh"])
    assert squad({answer.id: answer.text for answer in tuned}, references)["exact"] == 100


def test_every_layout_gives_the_same_questions(write, letters) -> None:
    flat = [question("a", "서울은 수도이다", "서울은"), question("b", "서울은 수도이다", None)]
    flat.append(question("c", "a 🙂", "🙂"))
    articles: list[dict[str, Any]] = []
    for row in flat:
        answers = [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]
        asked = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.append({"title": "t", "paragraphs": [{"context": row["context"], "qas": [asked]}]})
    nested = write("x.json", json.dumps({"version": "v2.0", "data": articles}, indent=1))

    def examples(builder: Any, split: str, **_: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": row["id"].encode(),
                "title": b"t",
                "context": row["context"].encode(),
                "question": row["question"].encode(),
                "answers": {
                    "text": np.asarray([text.encode() for text in row["answers"]["text"]], object),
                    "answer_start": np.asarray(row["answers"]["answer_start"], np.int32),
                },
                "plausible_answers": {"text": np.asarray([b"x"], object), "answer_start": np.asarray([0], np.int32)},
                "is_impossible": np.bool_(not row["answers"]["text"]),
            }
            for row in flat
        ]

    with tfds.testing.mock_data(as_data_source_fn=examples):
        fields = {"max_length": 40, "max_query_length": 6, "batch_rows": 8}
        published = SpanQA("squad/v2.0", **fields).open(400, letters.to_json())
        assert published.summary()["data"]["test"].endswith(":validation")
        found = [published, opened(write("x.jsonl", flat), letters), opened(nested, letters)]
        assert [data.references("train") for data in found] == [{"a": ["서울은"], "b": [], "c": ["🙂"]}] * 3
        batches = [next(iter(data.validation_batches())) for data in found]
    for batch in batches[1:]:
        assert all(np.array_equal(batch[name], batches[0][name]) for name in batch)


def test_contexts_and_titles_are_held_out_whole(write, letters) -> None:
    asked = [question(str(i), f"{WORDS[i % 9]} {i // 4}", WORDS[i % 9]) for i in range(240)]
    for title in (False, True):
        rows = [row | ({"title": f"t{int(row['id']) // 8}"} if title else {}) for row in asked]
        file = write("x.jsonl", rows)
        data = SpanQA(file, max_length=40, max_query_length=6, batch_rows=8).open(400, letters.to_json())
        held = [{q.title if title else q.context for q in data.windows(split).questions()} for split in SPLITS]
        assert sum(map(len, held)) == len(set.union(*held))
        assert all(held)


def test_epochs_are_complete_and_do_not_depend_on_the_number_of_hosts(write, letters) -> None:
    data = opened(write("x.jsonl", random_questions(40)), letters, bucket_lengths=(16, 40))
    count, steps = data.summary()["windows"]["train"], data.summary()["batches_per_epoch"]
    alone = data.train_iterator(3)
    expected = [next(alone) for _ in range(steps + 4)]
    seen = np.concatenate([batch["example"] for batch in expected[:steps]])
    assert sorted(seen[seen >= 0]) == list(range(count))
    hosts = [data.train_iterator(3, i, 2) for i in range(2)]
    for step, whole in enumerate(expected):
        parts = [next(host) for host in hosts]
        assert all(np.array_equal(np.concatenate([p[name] for p in parts]), whole[name]) for name in whole)
        if step == steps - 2:
            resumed = [data.train_iterator(3, i, 2) for i in range(2)]
            for old, new in zip(hosts, resumed, strict=True):
                new.set_state(old.get_state())
            hosts = resumed
    seen = np.concatenate([batch["example"] for batch in data.test_batches()])
    assert sorted(seen[seen >= 0]) == list(range(count))


def test_batch_shapes_are_those_of_the_longest_batch(write, letters) -> None:
    file = write("x.jsonl", random_questions(20))
    config = SpanQA(file, **same(file), max_length=40, max_query_length=6, batch_rows=16, bucket_lengths=(20, 40))
    batches = config.open(400, letters.to_json()).test_batches()
    shapes = [{name: (values.shape, str(values.dtype)) for name, values in batch.items()} for batch in batches]
    assert shapes[-1] == config.batch_shapes()
    assert shapes[0] != config.batch_shapes()
    experiment = dataclasses.replace(tiny(), data=config)
    assert Experiment.from_json(experiment.to_json()).data == config


def test_new_questions_need_no_data(write, letters) -> None:
    asked = random_questions(6)
    data = opened(write("x.jsonl", asked), letters)
    encoder = SpanQA("absent.json", max_length=40, doc_stride=9, max_query_length=6, batch_rows=8).encoder(letters)
    windows = encoder.windows([(row["question"], row["context"]) for row in asked])
    for ours, theirs in zip(encoder.batches(windows), data.validation_batches(), strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ("tokens", "types", "segments", "example"))
        assert ours["start"].tolist() == ours["end"].tolist() == np.minimum(ours["example"], 0).tolist()
    decoded = decode_spans(*gold_logits(data, data.windows("test")), windows)
    assert [answer.id for answer in decoded] == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(UserError, match="the context of question 2 is empty"):
        encoder.windows([("a", "b"), ("a", " ")])
    with pytest.raises(UserError, match="the tokenizer has no special token for cls, sep"):
        SpanQA("x.json").encoder(Tokenizer.train(["a"], 260))


def test_misplaced_answers_are_an_error_or_left_out_and_counted(write, letters) -> None:
    rows = [question("good", "a 서울은 b", "서울은"), question("bad", "a 서울은 b", "서울은", start=1)]
    file = write("x.jsonl", rows)
    message = r"x\.jsonl:2: question 'bad': its context does not read '서울은' at character 1; it is at 2"
    with pytest.raises(UserError, match=message):
        opened(file, letters)
    data = opened(file, letters, misplaced="drop")
    assert data.summary()["misplaced"] == dict.fromkeys(SPLITS, 1)
    assert list(data.references("test")) == ["good"]
    assert "3 questions left out" in data.describe()
    with pytest.raises(UserError, match=r"no question whose answer is at its offset"):
        opened(write("y.jsonl", rows[1:]), letters, misplaced="drop")


GOOD = question("a", "a b", "a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", [GOOD, GOOD], r"x\.jsonl:2: the id 'a' occurs twice"),
        ("x.jsonl", [GOOD | {"context": " "}], r"x\.jsonl:1: 'context' is empty"),
        ("x.jsonl", [{"context": "a"}], r"x\.jsonl:1: 'question' is missing"),
        ("x.jsonl", [GOOD | {"is_impossible": True}], r"x\.jsonl:1: question 'a' is_impossible and has an answer"),
        (
            "x.jsonl",
            [GOOD | {"answers": {"text": ["a"]}}],
            r"x\.jsonl:1: 'answers' needs as many 'text' as 'answer_start'",
        ),
        ("x.jsonl", [GOOD | {"answers": ["a"]}], r"x\.jsonl:1: an answer needs 'text' and 'answer_start', got a"),
        ("x.jsonl", [question("a", "a b", "zz", 0)], r"question 'a': its context does not read 'zz' .* nowhere in it"),
        ("x.jsonl", "{\n", r"x\.jsonl:1: not JSON"),
        ("x.jsonl", "[]\n", r"x\.jsonl:1: expected an object"),
        ("x.json", '{"data":\n [}', r"x\.json:2: not JSON"),
        ("x.json", "{}", r"x\.json: no list 'data'; SQuAD's layout is data, paragraphs, qas"),
        ("x.json", '{"data": [{"paragraphs": [{}]}]}', r"x\.json: article 1, paragraph 1: no list 'qas'"),
        ("x.json", '{"data": []}', r"x\.json: there is no question in it"),
        (
            "x.json",
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "7"}]}]}]}',
            r"x\.json: article 1, paragraph 1, question 1: 'question' is missing",
        ),
        ("x.parquet", "PAR1", r"x\.parquet: cannot tell the format from the name; give squad\.json"),
    ],
)
def test_a_bad_file_is_named_with_its_place(write, letters, name, content, message) -> None:
    with pytest.raises(UserError, match=message):
        opened(write(name, content), letters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": ""}, r"data\.dataset is empty"),
        ({"doc_stride": 0}, r"data\.doc_stride must be at least 1, got 0"),
        ({"max_query_length": 0}, r"data\.max_query_length must be at least 1"),
        ({"max_length": 60}, r"data\.max_length must be at least 68, got 60"),
        ({"batch_rows": 4}, r"data\.batch_rows must be a positive multiple of data\.rows_multiple = 8"),
    ],
)
def test_contradictory_values_are_refused(fields, message) -> None:
    SpanQA("x.json").check()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SpanQA("x.json"), **fields).check()


def test_the_bundled_questions(letters) -> None:
    data = SpanQA("tjax_tasks/wordnet_qa", max_length=128, batch_rows=8).open(300, letters.to_json())
    assert data.summary()["questions"] == {"train": 1800, "validation": 100, "test": 100}
    asked = [{q.question for q in data.windows(split).questions()} for split in SPLITS]
    assert sum(map(len, asked)) == len(set.union(*asked))
