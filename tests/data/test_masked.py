from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from transformer_jax.data import baselines as baselines_module
from transformer_jax.data.baselines import baselines
from transformer_jax.data.corpus import Corpus
from transformer_jax.data.document_files import FileDocuments
from transformer_jax.data.documents import Part
from transformer_jax.data.masked import MaskedData, MaskedText
from transformer_jax.data.sentence_pairs import _shortened, pairs, runs
from transformer_jax.data.sentences import sentences
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
LENGTH, MOST, ROWS = 40, 7, 12
WORDS = "red green blue small large old new cat dog house tree river sunny rainy 고양이 강아지".split()  # noqa: SIM905


def _documents(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        "\n".join(" ".join(rng.choice(WORDS, rng.integers(2, 14))) + f" {seed}x{d}" for _ in range(rng.integers(1, 12)))
        for d in range(count)
    ]


def _jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MaskedText:
    folder = tmp_path_factory.mktemp("masked")
    train, held = _jsonl(folder / "a.jsonl", _documents(150, 0)), _jsonl(folder / "v.jsonl", _documents(20, 1))
    letters = sorted(set("".join(WORDS)) | set("0123456789x"))
    pieces = ["cat", "dog", "hou", "##se", "ri", "##ver", "gre", "##en", *letters, *("##" + c for c in letters)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[unused]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    shape = {"length": LENGTH, "max_predictions": MOST, "batch_rows": ROWS, "rows_multiple": 3, "threads": 0}
    tokenizer = Tokenizer.load(vocabulary).to_json().replace('"strip_accents":null', '"strip_accents":false')
    (folder / "tokenizer.json").write_text(tokenizer)
    return MaskedText(train, validation=held, test=held, tokenizer=str(folder / "tokenizer.json"), **shape)


@pytest.fixture(scope="module")
def data(config: MaskedText) -> MaskedData:
    return config.open(100)


def _restored(batch: dict[str, np.ndarray]) -> np.ndarray:
    tokens = batch["tokens"].copy()
    row, column = np.nonzero(batch["targets"] >= 0)
    tokens[row, batch["positions_masked"][row, column]] = batch["targets"][row, column]
    return tokens


def _batches(data: MaskedData, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    iterator = data.train_iterator(seed)
    return [next(iterator) for _ in range(count)]


def _segments(batch: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of A and of B, and check what stands around them."""
    for tokens, types, segments in zip(_restored(batch), batch["types"], batch["segments"], strict=True):
        length = int(segments.sum())
        assert segments.tolist() == [1] * length + [0] * (LENGTH - length)
        assert not tokens[length:].any()
        first = int((types[:length] == 0).sum())
        assert types.tolist() == [0] * first + [1] * (length - first) + [0] * (LENGTH - length)
        assert (tokens[0], tokens[first - 1], tokens[length - 1]) == (3, 4, 4)
        yield tokens[1 : first - 1].tolist(), tokens[first : length - 1].tolist()


def _inside(part: list[int], whole: list[int]) -> list[int]:
    return [i for i in range(len(whole)) if whole[i : i + len(part)] == part]


def test_a_pair_is_two_stretches_of_one_document_in_order_or_of_two(data: MaskedData) -> None:
    documents = [data.training[0].tokens(i).tolist() for i in range(len(data.training[0]))]
    random = 0
    for batch in _batches(data, 30):
        for (a, b), follows, example in zip(_segments(batch), batch["next"], batch["example"], strict=True):
            assert a
            assert b
            own = documents[example]
            assert _inside(a, own)
            if follows:
                assert max(_inside(b, own)) >= min(_inside(a, own)) + len(a)
            else:
                random += 1
                assert any(_inside(b, other) for i, other in enumerate(documents) if i != example)
                # Every sentence ends with the number of its document: a stretch with one cannot be from A's.
                marks = [n for n in data.tokenizer.decode(b).split() if n.startswith("0x")]
                assert data.tokenizer.decode(own).split()[-1] not in marks[:-1]
    assert abs(random - 180) < 4 * math.sqrt(90)


def test_every_sentence_but_a_lonely_last_one_is_in_an_example_and_half_of_the_pairs_are_true(data: MaskedData) -> None:
    corpus = data.training[0]
    examples = pairs(corpus, 10_000, 0.0, 5)  # room for whole documents: nothing is cut
    of_document = np.searchsorted(corpus.begin_N, examples.b, "right") - 1
    assert np.array_equal(of_document == examples.document, examples.follows)
    assert np.array_equal((examples.a + examples.a_length)[examples.follows], examples.b[examples.follows])
    for document in range(len(corpus)):
        covered: set[int] = set()
        for i in np.flatnonzero(examples.document == document):
            covered.update(range(examples.a[i], examples.a[i] + examples.a_length[i]))
            if examples.follows[i]:
                covered.update(range(examples.b[i], examples.b[i] + examples.b_length[i]))
        last = corpus.offsets[corpus.last_N[document] - 1]
        assert (
            set(range(corpus.begin_N[document], last)) <= covered
            or corpus.last_N[document] - corpus.first_N[document] == 1
        )


def _truncated(a: int, b: int, room: int) -> tuple[int, int]:
    """The loop of create_pretraining_data.py."""
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


def test_what_exceeds_the_room_is_cut_as_in_the_original(data: MaskedData) -> None:
    corpus = data.training[0]
    long = pairs(corpus, 10_000, 0.0, 7)
    short = _shortened(long, 23, 7)
    lengths = list(zip(long.a_length.tolist(), long.b_length.tolist(), strict=True))
    assert list(zip(short.a_length, short.b_length, strict=True)) == [_truncated(a, b, 23) for a, b in lengths]
    front, cut = short.a - long.a, long.a_length - short.a_length
    assert ((front >= 0) & (front <= cut)).all()
    assert abs(front.sum() - cut.sum() / 2) < 4 * math.sqrt(cut.sum() / 4)
    front, cut = short.b - long.b, long.b_length - short.b_length
    assert ((front >= 0) & (front <= cut)).all()


def test_some_rows_are_shorter_on_purpose(config: MaskedText, data: MaskedData) -> None:
    """Devlin 2018 wants short sequences too: with short=1 the rows are on average far shorter."""
    full = dataclasses.replace(config, short=0.0).open(100)
    short = dataclasses.replace(config, short=1.0).open(100)
    mean = {
        name: np.mean([b["segments"].sum(1).mean() for b in _batches(d, 20)])
        for name, d in (("full", full), ("usual", data), ("short", short))
    }
    assert mean["short"] < mean["usual"] < mean["full"]


def test_the_statistics_of_masking(config: MaskedText) -> None:
    """Over more than 1e5 tokens: 15 % chosen, of which 80 % [MASK], 10 % kept, 10 % any ordinary token."""
    data = dataclasses.replace(config, max_predictions=LENGTH, batch_rows=300).open(100)
    batches = _batches(data, 12)
    tokens = sum(int(batch["segments"].sum()) for batch in batches)
    assert tokens > 1e5
    expected = sum(np.maximum(1, np.rint(b["segments"].sum(1) * 0.15)).sum() for b in batches)
    chosen = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    assert chosen == expected
    assert abs(chosen / tokens - 0.15) < 0.005
    shown, true = [], []
    for batch in batches:
        row, column = np.nonzero(batch["targets"] >= 0)
        shown.append(batch["tokens"][row, batch["positions_masked"][row, column]])
        true.append(batch["targets"][row, column])
    seen, was = np.concatenate(shown), np.concatenate(true)
    assert not set(was.tolist()) & {0, 3, 4, 5}
    masked, kept = seen == 5, seen == was
    other = ~masked & ~kept
    ordinary = data.tokenizer.vocab_size - 5
    for count, share in ((masked, 0.8), (kept, 0.1 + 0.1 / ordinary), (other, 0.1 * (1 - 1 / ordinary))):
        assert abs(count.sum() - share * chosen) < 4 * math.sqrt(chosen * share * (1 - share))
    counts = np.bincount(seen[other], minlength=data.tokenizer.vocab_size)
    assert not counts[[0, 2, 3, 4, 5]].any()
    assert (counts[6:] > 0).all()
    assert counts.max() < 3 * other.sum() / ordinary


def test_positions_ascend_and_are_no_special_tokens(data: MaskedData) -> None:
    for batch in _batches(data, 10):
        true = _restored(batch)
        for row in range(ROWS):
            real = batch["targets"][row] >= 0
            positions = batch["positions_masked"][row]
            assert real.tolist() == sorted(real, reverse=True)
            assert positions[real].tolist() == sorted(set(positions[real]))
            assert not positions[~real].any()
            assert not set(true[row][positions[real]].tolist()) & {0, 3, 4}
            assert 1 <= real.sum() <= MOST


def test_whole_words_are_masked_together(config: MaskedText) -> None:
    data = dataclasses.replace(config, whole_words=True, max_predictions=LENGTH, masked=0.3).open(100)
    partial_words = words = 0
    for batch in _batches(data, 10):
        true = _restored(batch)
        for row in range(ROWS):
            chosen = set(batch["positions_masked"][row][batch["targets"][row] >= 0].tolist())
            assert len(chosen) <= max(1, round(int(batch["segments"][row].sum()) * 0.3))
            labels = data.tokenizer.tokens(true[row])
            word: list[int] = []
            for position, label in enumerate([*labels, "end"]):
                if not label.startswith("##") or (position and labels[position - 1] in ("[CLS]", "[SEP]")):
                    partial_words += 0 < len(chosen & set(word)) < len(word)
                    words += len(word) > 1 and set(word) <= chosen
                    word = []
                word.append(position)
    assert partial_words == 0
    assert words > 100


def test_masks_are_drawn_anew_in_every_epoch_and_those_of_validation_never(data: MaskedData) -> None:
    rows = data.rows_of(data.training[0], 3)
    whole = next(iter(data.validation_batches()))
    again = next(iter(data.validation_batches()))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    first, second = rows.batch(np.arange(4)), rows.batch(np.arange(4) + rows.rows)
    assert not np.array_equal(first["positions_masked"], second["positions_masked"])


def test_a_row_does_not_depend_on_the_batch_it_is_in(config: MaskedText, data: MaskedData) -> None:
    larger = dataclasses.replace(config, batch_rows=30).open(100)
    for name in ("tokens", "targets", "next", "example"):
        small = np.concatenate([batch[name] for batch in _batches(data, 25, seed=2)])
        large = np.concatenate([batch[name] for batch in _batches(larger, 10, seed=2)])
        np.testing.assert_array_equal(small, large)


def test_the_order_does_not_depend_on_the_number_of_hosts_and_resumes_anywhere(data: MaskedData) -> None:
    epoch = -(-data.summary()["mixture"][0]["rows_per_epoch"] // ROWS)
    expected = _batches(data, epoch + 15, seed=5)
    step, state = 0, None
    for processes, steps in ((3, 9), (1, 4), (3, epoch + 2)):
        hosts = [data.train_iterator(5, i, processes) for i in range(processes)]
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(steps):
            parts = [next(host) for host in hosts]
            for name, whole in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)
            step += 1
        state = json.loads(json.dumps(hosts[0].get_state()))


def test_validation_shows_every_row_once_and_fills_up_the_last_batch(data: MaskedData) -> None:
    batches = list(data.validation_batches())
    rows = len(data.rows_of(data._corpora.validation, None)._epoch(0)[0])
    example = np.concatenate([batch["example"] for batch in batches])
    assert (example >= 0).sum() == rows
    padding = np.flatnonzero(batches[-1]["example"] < 0)
    for name, empty in (("segments", 0), ("tokens", 0), ("targets", -1), ("next", -1), ("positions_masked", 0)):
        assert (batches[-1][name][padding] == empty).all()
    split = [list(data.validation_batches(i, 3)) for i in range(3)]
    joined = [np.concatenate([part["tokens"] for part in parts]) for parts in zip(*split, strict=True)]
    assert all(np.array_equal(a, b["tokens"]) for a, b in zip(joined, batches, strict=True))
    assert len(list(data.test_batches())) == len(batches)


def test_without_next_sentence_a_row_is_full_sentences_of_one_document(config: MaskedText) -> None:
    data = dataclasses.replace(config, next_sentence=False, short=0.0).open(100)
    corpus = data.training[0]
    units = {
        tuple(corpus.gather(np.arange(*corpus.offsets[i : i + 2])).tolist()) for i in range(len(corpus.offsets) - 1)
    }
    seen = 0
    for batch in _batches(data, 10):
        assert set(batch["next"]) == {-1}
        assert not batch["types"].any()
        for tokens, segments, example in zip(_restored(batch), batch["segments"], batch["example"], strict=True):
            length = int(segments.sum())
            assert (tokens[0], tokens[length - 1]) == (3, 4)
            text = tokens[1 : length - 1].tolist()
            assert _inside(text, corpus.tokens(example).tolist())
            if length < LENGTH:
                assert any(tuple(text[-n:]) in units for n in range(1, len(text) + 1))
                assert any(tuple(text[:n]) in units for n in range(1, len(text) + 1))
            seen += length
    assert seen / (10 * ROWS) > 0.7 * LENGTH
    every = runs(corpus, 10_000, 0.0, 0)
    assert every.a_length.sum() == corpus.length_N.sum()


def test_runs_hold_as_many_sentences_as_fit(write: Write) -> None:
    documents = FileDocuments(str(write("a.txt", "a b c\nd e\nf g h i\nj\n")), "text", "file")
    tokenizer = Tokenizer.characters(documents)
    corpus = Corpus.of([Part.whole(documents)], tokenizer, lambda text: text.replace(" ", "").split(), "test")
    examples = runs(corpus, 5, 0.0, 0)
    assert [
        tokenizer.decode(corpus.gather(np.arange(a, a + n))) for a, n in zip(examples.a, examples.a_length, strict=True)
    ] == ["abcde", "fghij"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?  Four…", ["One.", "Two!", "Three?", "Four…"]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("Version 2.13 of e.g. that. Next", ["Version 2.13 of e.g. that.", "Next"]),
        ("Mr. J. Smith met Dr. Who. So did I. Yes.", ["Mr. J. Smith met Dr. Who.", "So did I.", "Yes."]),
        ("He came. and went.", ["He came. and went."]),
        ("안녕하세요. 반갑습니다! 네", ["안녕하세요.", "반갑습니다!", "네"]),
        ("今日は。元気？「はい。」では", ["今日は。", "元気？", "「はい。」", "では"]),
        ("A title\n\n  A line. Two\n", ["A title", "A line.", "Two"]),
        (" \n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text, "punctuation") == expected
    assert sentences(text, "lines") == [line.strip() for line in text.split("\n") if line.strip()]


def test_baselines_are_those_of_a_counting_model(config: MaskedText, data: MaskedData) -> None:
    scores = baselines(data)
    texts = [data.training[0].tokens(i).tolist() for i in range(len(data.training[0]))]
    frequent = max(range(100), key=lambda t: sum(text.count(t) for text in texts))
    after: dict[int, dict[int, int]] = {}
    for text in texts:
        for left, right in itertools.pairwise(text):
            after.setdefault(left, {}).setdefault(right, 0)
            after[left][right] += 1
    unigram = bigram = total = 0
    for batch in data.validation_batches():
        true = _restored(batch)
        for row, column in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
            target, position = batch["targets"][row, column], batch["positions_masked"][row, column]
            counts = after.get(int(true[row, position - 1]), {})
            best = {t for t, n in counts.items() if n == max(counts.values())} or {frequent}
            total += 1
            unigram += target == frequent
            bigram += target in best if len(best) == 1 else 0
    assert scores["unigram"] == pytest.approx(unigram / total)
    assert scores["bigram"] == pytest.approx(bigram / total, abs=0.02)  # apart from ties
    assert scores["bigram"] > scores["unigram"]
    assert 0.5 <= scores["next"] < 0.65
    assert baselines_module._stretches(data.training[0], 1) == [(0, int(data.training[0].length_N[0]))]


def test_the_shapes_of_a_batch_are_known_without_data(config: MaskedText, data: MaskedData) -> None:
    shapes = dataclasses.replace(config, dataset="absent.txt").batch_shapes()
    assert {name: (a.shape, a.dtype.name) for name, a in _batches(data, 1)[0].items()} == shapes


def test_wordpiece_is_trained_where_none_is_given(config: MaskedText) -> None:
    data = dataclasses.replace(config, tokenizer="").open(300)
    assert data.tokenizer.tokens([0, 4]) == ["[PAD]", "[MASK]"]
    assert dataclasses.replace(config, tokenizer="").open(300).tokenizer.fingerprint == data.tokenizer.fingerprint
    assert json.loads(json.dumps(data.summary()))["sentences"] > 500
    assert data.describe().startswith("data: 150 documents, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 7}, r"data\.length must be at least 8, got 7"),
        ({"max_predictions": 41}, r"data\.max_predictions must lie in 1 to 40, got 41"),
        ({"short": 1.5}, r"data\.short must lie in \[0, 1\], got 1\.5"),
        ({"masked": 0.0}, r"data\.masked must lie in \(0, 1\), got 0\.0"),
        ({"batch_rows": 10}, r"data\.batch_rows = 10 is no multiple of data\.rows_multiple = 3"),
    ],
)
def test_bad_settings_are_explained(config: MaskedText, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change).open(100)  # type: ignore[arg-type]


def test_too_little_text_for_pairs_is_explained(config: MaskedText, write: Write) -> None:
    one = str(write("one.txt", "a cat\na dog\n"))
    with pytest.raises(
        UserError, match=r"need two validation documents, one of them with two sentences, but there are 1 "
    ):
        dataclasses.replace(config, validation=one).open(100)
    single = dataclasses.replace(config, test=one).open(100)
    with pytest.raises(UserError, match=r"need two test documents"):
        single.test_batches()
    assert dataclasses.replace(config, validation=one, next_sentence=False).open(100).tokenizer


def test_a_tokenizer_without_a_mask_is_refused(config: MaskedText, write: Write) -> None:
    path = write("tokenizer.json", Tokenizer.characters(["abc"]).to_json())
    with pytest.raises(
        UserError, match=r"tokenizer\.json has no special token for cls, sep, mask \(it would be written"
    ):
        dataclasses.replace(config, tokenizer=str(path)).open(100)
