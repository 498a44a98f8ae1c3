"""Labelled texts: what is read, how it is laid out, held out, batched; each mistake is one line with file and line."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

import transformer_jax.data.labelled_encoded as encoded_module
from tests.tiny import tiny
from transformer_jax.config import Experiment
from transformer_jax.data import ParallelText
from transformer_jax.data.labelled import LabelledText
from transformer_jax.data.labelled_data import LabelledData
from transformer_jax.data.labelled_layout import longest_first
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

SPLITS = ("train", "validation", "test")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789고양이강집개"


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Path:
    """A WordPiece vocabulary of single characters: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then letters."""
    path = tmp_path_factory.mktemp("letters") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    # Stripping accents, as BERT's own does, would take Hangul apart.
    path.with_name("tokenizer_config.json").write_text('{"strip_accents": false}', encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write_file


def rows(count=60, classes=("good", "bad", "mixed")) -> list[tuple[str, str]]:
    return [(f"text {'ab cd ' * (i % 4)}{i}", classes[i % len(classes)]) for i in range(count)]


def tsv(lines: list[tuple[str, ...]]) -> str:
    return "".join("\t".join(line) + "\n" for line in lines)


def data_of(dataset: str, letters: Path, **fields: Any) -> LabelledData:
    fields = {"tokenizer": str(letters), "max_length": 24, "batch_rows": 8, "bucket_lengths": (12, 24)} | fields
    return LabelledText(dataset, **fields).open(200)


def same(file: str) -> dict[str, str]:
    """The same file for all splits."""
    return dict.fromkeys(SPLITS, file)


def by_example(batches: Any) -> dict[int, dict[str, Any]]:
    """The rows of all batches by "example"."""
    return {
        int(example): {name: values[row] for name, values in batch.items()}
        for batch in batches
        for row, example in enumerate(batch["example"])
    }


def everything(data: LabelledData) -> list[tuple[str, Any]]:
    return sorted((e.text, e.label) for split in SPLITS for e in data.examples(split))


def test_every_format_gives_the_same_examples(write, letters) -> None:
    pairs = rows()
    plain = tsv(pairs)
    quoted = "".join(f'"{text}","{label}"\n' for text, label in pairs)
    files = {
        "text_first.tsv": plain,
        "label_first.tsv": tsv([(label, text) for text, label in pairs]),
        "header.tsv": "label\ttext\n" + tsv([(label, text) for text, label in pairs]),
        "windows.tsv": "\ufefftext\tlabel\r\n" + plain.replace("\n", "\r\n"),
        "packed.tsv.gz": gzip.compress(plain.encode()),
        "packed.tsv.xz": lzma.compress(plain.encode()),
        "plain.csv": quoted,
        "header.csv": "text,label\n" + quoted,
        "keys.jsonl": "".join(json.dumps({"label": label, "text": text, "more": 1}) + "\n" for text, label in pairs),
    }
    found = [everything(data_of(write(name, content), letters)) for name, content in files.items()]
    assert found[0] == sorted(pairs)
    assert all(other == found[0] for other in found)
    own = write("own.tsv", "stars\tid\treview\n" + tsv([(label, "7", text) for text, label in pairs]))
    assert everything(data_of(own, letters, text="review", label="stars")) == found[0]
    bare = write("bare.tsv", tsv([(label, "7", text) for text, label in pairs]))
    assert everything(data_of(bare, letters, text="3", label="1")) == found[0]


def test_what_was_guessed_is_said(write, letters) -> None:
    data = data_of(write("x.tsv", tsv([(label, text) for text, label in rows()])), letters)
    assert "54 train, 3 validation, 3 test examples (no header: label in column 1, text in 2)" in data.describe()
    assert "3 classes: bad, good, mixed" in data.describe()
    assert data.labels == ["bad", "good", "mixed"] == data.summary()["labels"]
    summary = json.loads(json.dumps(data.summary()))
    assert sum(n for counts in summary["label_counts"].values() for n in counts.values()) == 60
    assert sum(bucket["train_examples"] for bucket in summary["buckets"]) == summary["examples"]["train"] == 54


def test_longest_first_is_devlins_loop() -> None:
    for a in range(9):
        for b in range(9):
            for room in range(1, 12):
                kept = [a, b]
                while sum(kept) > room:
                    kept[0 if kept[0] > kept[1] else 1] -= 1
                assert longest_first(a, b, room) == tuple(kept)


def test_the_layout_of_bert(write, letters) -> None:
    lines = [("ab", "cd e", "yes"), ("a", "b" * 30, "no"), ("고양이", "강", "no"), ("c" * 30, "d" * 30, "yes")]
    header = [("text", "text_pair", "label")]
    file = write("x.tsv", tsv(header + lines))
    data = data_of(file, letters, **same(file))
    ids = {c: i for i, c in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])}
    on = {c: ids[c] + len(LETTERS) for c in LETTERS}
    found = by_example(data.validation_batches())
    short = found[0]
    assert short["tokens"].tolist() == [2, ids["a"], on["b"], 3, ids["c"], on["d"], ids["e"], 3, 0, 0, 0, 0]
    assert short["types"].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert short["segments"].tolist() == [1] * 8 + [0] * 4
    assert short["label"] == data.labels.index("yes") == 1
    long = found[1]
    assert long["tokens"].tolist() == [2, ids["a"], 3, ids["b"], *[on["b"]] * 19, 3]
    assert found[2]["tokens"][:8].tolist() == [2, ids["고"], on["양"], on["이"], 3, ids["강"], 3, 0]
    both = found[3]["tokens"].tolist()
    assert (both.count(on["c"]), both.count(on["d"]), len(both)) == (10, 9, 24)
    assert data.summary()["truncated"] == dict.fromkeys(SPLITS, 2)
    assert data.text(0) == "ab\tcd e"
    assert found[-1]["label"] == -1
    assert not found[-1]["segments"].any()


def test_the_layout_of_gpt_ends_with_the_extract_token(write, letters) -> None:
    lines = [{"text": "ab", "text_pair": "c", "label": True}, {"text": "a", "text_pair": "d", "label": False}]
    file = write("x.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = Tokenizer.train(["ab c d", "a b c d"] * 9, 260)
    config = LabelledText(file, layout="gpt", **same(file), max_length=12, batch_rows=8)
    data = config.open(260, tokenizer.to_json())
    assert data.labels == ["false", "true"]
    found = by_example(data.validation_batches())
    bos, eos = tokenizer.bos, tokenizer.eos
    a, b, c = (tokenizer.encode_batch([letter])[0][0] for letter in "abc")
    # The tokenizer has no `sep`: `eos` is the delimiter too.
    assert found[0]["tokens"].tolist() == [bos, a, b, eos, c, eos, 0, 0, 0, 0, 0, 0]
    assert found[0]["targets"].tolist() == [a, b, eos, c, eos, -1, -1, -1, -1, -1, -1, -1]
    assert (found[-1]["targets"] == -1).all()
    for row in found.values():
        length = int(row["segments"].sum())
        assert length == 0 or row["tokens"][length - 1] == eos
    marked = LabelledText(file, layout="gpt", **same(file), tokenizer=str(letters), max_length=16, batch_rows=8).open(
        99
    )
    tokens = by_example(marked.validation_batches())[0]["tokens"]
    assert marked.tokenizer.tokens(tokens[:6]) == ["[CLS]", "a", "##b", "[SEP]", "c", "[SEP]"]


def test_both_orders_are_the_same_tokens_with_the_texts_exchanged(write, letters) -> None:
    texts = [("ab", "c"), ("a", "d"), ("c", "a b c d"), ("a b c d a b c d", "d c b a")]
    there = tsv([("text", "text_pair", "label"), *((a, b, "xy"[i % 2]) for i, (a, b) in enumerate(texts * 6))])
    back = tsv([("text", "text_pair", "label"), *((b, a, "xy"[i % 2]) for i, (a, b) in enumerate(texts * 6))])

    def rows(name: str, text: str, layout: str) -> dict:
        file = write(name, text)
        config = LabelledText(file, layout=layout, **same(file), tokenizer=str(letters), max_length=12, batch_rows=8)
        return by_example(config.open(99).validation_batches())

    both, swapped = rows("there.tsv", there, "gpt_both"), rows("back.tsv", back, "gpt")
    assert len(both) == len(swapped) > 20
    for example, row in both.items():
        assert row["swapped"].tolist() == swapped[example]["tokens"].tolist()
        assert row["segments"].tolist() == swapped[example]["segments"].tolist()
    single = write("single.tsv", tsv([("text", "label"), *(("a", "x"), ("b", "y")) * 9]))
    config = LabelledText(single, layout="gpt_both", **same(single), max_length=12, batch_rows=8)
    with pytest.raises(UserError, match=r"gpt_both reads pairs of texts, .* has single ones; set gpt"):
        config.open(260)


TAGGED = [
    (["고양이", "abc", "강"], ["B-X", "O", "B-Y"]),
    (["a", "\u200b", "bc"], ["O", "B-X", "I-X"]),
    (["New York", "d"], ["B-Y", "O"]),
    (["abcd"] * 7, ["O"] * 6 + ["B-X"]),
]


@pytest.fixture(params=["wordpiece", "bytes"])
def tagger(request, write, letters) -> str:
    """The letters, or byte-level BPE with the specials that the layout wants."""
    if request.param == "wordpiece":
        return str(letters)
    trained = Tokenizer.train([" ".join(words) for words, _ in TAGGED] * 3, 300).to_json()
    return write("tokenizer.json", trained.replace("<bos>", "[CLS]").replace("<eos>", "[SEP]"))


def test_a_tag_stands_at_the_first_token_of_its_word(write, tagger) -> None:
    file = write("x.jsonl", "".join(json.dumps({"text": words, "label": tags}) + "\n" for words, tags in TAGGED))
    config = LabelledText(file, kind="tags", **same(file), tokenizer=tagger, max_length=24, batch_rows=8)
    data = config.open(400)
    assert data.labels == ["B-X", "B-Y", "I-X", "O"]
    assert data.references("validation") == [tuple(tags) for _, tags in TAGGED]
    found = by_example(data.validation_batches())
    for number, (words, tags) in enumerate(TAGGED):
        row, end = found[number], int(found[number]["segments"].sum()) - 1
        begins = np.flatnonzero(row["label"] >= 0)
        assert [data.labels[i] for i in row["label"][begins]] == tags[: len(begins)]
        for word, begin, stop in zip(words, begins, [*begins[1:], end], strict=False):
            decoded = data.tokenizer.decode(row["tokens"][begin:stop], stop=False).strip()
            if "New" not in word and word != "\u200b":  # the letters have no capitals, and no blank of no width
                assert decoded == word[: len(decoded)]
                assert decoded == word or stop == end
    assert (found[-1]["label"] == -1).all()
    cut = sum(len(tags) - (found[number]["label"] >= 0).sum() for number, (_, tags) in enumerate(TAGGED))
    assert (cut > 0) == ("vocab" in tagger)  # in letters the last sentence has 28 tokens
    assert data.summary()["truncated"]["train"] == (1 if cut else 0)
    assert sum(data.summary()["label_counts"]["train"].values()) == 15 - cut
    predicted = by_example(data.encoder.batches(["고양이 abc 강"]))[0]
    assert predicted["tokens"].tolist() == found[0]["tokens"].tolist()
    assert ((predicted["label"] == 0) == (found[0]["label"] >= 0)).all()
    assert ((predicted["label"] == -1) == (found[0]["label"] == -1)).all()


def test_conll_files_and_words_with_blanks_between(write, letters) -> None:
    conll = "-DOCSTART- X O\n\nab NN B-X\ncd NN O\n\n\ne NN B-X\n"
    spaced = "ab cd\tB-X O\ne\tB-X\n"
    for name, content in {"x.conll": conll, "x.tsv": spaced}.items():
        file = write(name, content)
        data = data_of(file, letters, kind="tags", **same(file))
        assert data.references("train") == [("B-X", "O"), ("B-X",)]
        assert data.text(0) == "ab cd"
    file = write("x.conll", conll.replace("cd NN O", "cd O"))
    with pytest.raises(UserError, match=r"x\.conll:4: 2 columns; expected 3\."):
        data_of(file, letters, kind="tags", **same(file))


def test_numbers(write, letters) -> None:
    lines = [(f"{i / 4}", f"text {i}") for i in range(60)]
    file = write("x.tsv", tsv(lines))
    data = data_of(file, letters, kind="number")
    assert data.labels == []
    found = {}
    for batch in data.validation_batches():
        assert batch["label"].dtype == np.float32
        found |= {int(e): float(label) for e, label in zip(batch["example"], batch["label"], strict=True) if e >= 0}
    assert [found[i] for i in sorted(found)] == data.references("validation").tolist()
    assert {float(e.text.split()[1]) / 4: e.label for e in data.examples("train")} == {
        e.label: e.label for e in data.examples("train")
    }


def test_equal_texts_are_held_out_together(write, letters) -> None:
    lines = [(f"{'Same ' * (i % 2)} Text {i // 4} ", "good" if i % 3 else "bad") for i in range(400)]
    lines = [(text.upper() if i % 5 else text, label) for i, (text, label) in enumerate(lines)]
    data = data_of(write("x.tsv", tsv(lines)), letters)
    texts = {s: {" ".join(e.text.casefold().split()) for e in data.examples(s)} for s in SPLITS}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    assert data.summary()["overlap"] == {"validation": 0, "test": 0}
    assert 15 <= data.summary()["examples"]["validation"] <= 20


def test_groups_are_held_out_together(write, letters) -> None:
    lines = [("text", "label", "group"), *((f"text {i}", "ab"[i % 2], f"page {i // 7}") for i in range(420))]
    data = data_of(write("x.tsv", tsv(lines)), letters)
    pages = {s: {int(e.text.split()[1]) // 7 for e in data.examples(s)} for s in SPLITS}
    assert sum(map(len, pages.values())) == len(set.union(*pages.values())) == 60


@pytest.fixture(scope="module")
def data(tmp_path_factory, letters) -> LabelledData:
    path = tmp_path_factory.mktemp("rows") / "x.tsv"
    path.write_text(tsv(rows(200)), encoding="utf-8")
    return data_of(str(path), letters)


def test_an_epoch_holds_every_example_once(data) -> None:
    labels = data.references("train")
    seen = []
    batches = data.train_iterator(seed=1)
    for _ in range(data.summary()["batches_per_epoch"]):
        batch = next(batches)
        for tokens_T, label, example in zip(batch["tokens"], batch["label"], batch["example"], strict=True):
            if example >= 0:
                assert label == labels[example]
                assert data.tokenizer.decode(tokens_T).replace(" ", "") == data.text(example).replace(" ", "")
                seen.append(int(example))
    assert sorted(seen) == list(range(len(labels)))


def test_the_order_does_not_depend_on_the_number_of_hosts_and_resumes(data) -> None:
    alone = data.train_iterator(seed=5)
    expected = [next(alone) for _ in range(data.summary()["batches_per_epoch"] + 6)]
    step, state = 0, None
    for processes in (4, 1, 2):
        hosts = [data.train_iterator(5, i, processes) for i in range(processes)]
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(len(expected) // 3):
            parts = [next(host) for host in hosts]
            for name, whole in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)
            step += 1
        state = hosts[0].get_state()
    for batches in (data.validation_batches, data.test_batches):
        whole = [batch["example"] for batch in batches()]
        halves = zip(batches(0, 2), batches(1, 2), strict=True)
        assert [np.concatenate([a["example"], b["example"]]).tolist() for a, b in halves] == [w.tolist() for w in whole]
        examples = np.concatenate(whole)
        assert sorted(examples[examples >= 0]) == list(range(10))


@pytest.mark.parametrize(
    ("kind", "layout", "labels"),
    [("classes", "bert", "ab"), ("number", "gpt", "12"), ("tags", "bert", "ab"), ("classes", "gpt", "ab")],
)
def test_batch_shapes_are_those_of_the_longest_batch(write, letters, kind, layout, labels) -> None:
    lines = [("text", "label")]
    for i in range(30):
        words = 40 if i % 3 else 1
        lines.append((" ".join(["ab"] * words), " ".join([labels[i % 2]] * (words if kind == "tags" else 1))))
    file = write("x.tsv", tsv(lines))
    config = LabelledText(
        file, kind=kind, layout=layout, **same(file), tokenizer=str(letters), max_length=20, batch_rows=16
    )
    shapes = [{k: (v.shape, str(v.dtype)) for k, v in b.items()} for b in config.open(200).validation_batches()]
    assert shapes[-1] == config.batch_shapes()
    assert [shape["tokens"][0] for shape in shapes] == [(16, 16), (16, 20), (16, 20)]


def test_new_texts_are_laid_out_as_in_training_without_the_data(data, letters) -> None:
    config = LabelledText("absent.tsv", max_length=24, batch_rows=8, bucket_lengths=(12, 24))
    encoder = config.encoder(Tokenizer.load(letters))
    texts = [example.text for example in data.examples("validation")]
    expected = {int(e): t for b in data.validation_batches() for t, e in zip(b["tokens"], b["example"], strict=True)}
    found = {int(e): t for b in encoder.batches(texts) for t, e in zip(b["tokens"], b["example"], strict=True)}
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}
    (pair,) = encoder.batches(["ab"], ["cd"])
    assert pair["types"][0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert pair["label"].tolist() == [-1] * 8
    with pytest.raises(UserError, match="text 2 is empty"):
        list(encoder.batches(["a", " "]))
    with pytest.raises(UserError, match="1 texts but 2 second texts"):
        list(encoder.batches(["a"], ["b", "c"]))


def test_what_was_tokenized_comes_from_the_cache(data, letters, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(encoded_module, "_save", fail)
    file = data.summary()["data"]["train"].removesuffix(" (train)")
    assert data_of(file, letters).summary() == data.summary()
    with pytest.raises(AssertionError, match="tokenized again"):
        data_of(file, letters, max_length=20, bucket_lengths=(20,))


def test_an_own_tokenizer_is_trained_for_each_layout(write) -> None:
    file = write("x.tsv", tsv(rows(90)))
    wordpiece = LabelledText(file, max_length=16).open(300)
    assert wordpiece.tokenizer.cls is not None
    assert LabelledText(file, max_length=16).open(300).tokenizer.fingerprint == wordpiece.tokenizer.fingerprint
    bytes_ = LabelledText(file, max_length=16, layout="gpt").open(300)
    assert (bytes_.tokenizer.bos, bytes_.tokenizer.cls) == (1, None)
    with pytest.raises(UserError, match="the tokenizer of the run has no special token for cls, sep"):
        LabelledText(file, max_length=16).open(300, tokenizer_json=bytes_.tokenizer.to_json())
    with pytest.raises(UserError, match=r"the tokenizer of the run has \d+ tokens but model\.vocab_size = 20"):
        LabelledText(file, max_length=16).open(20, tokenizer_json=wordpiece.tokenizer.to_json())


GOOD = "text\tlabel\na\tx\nb\ty\n"


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("x.tsv", GOOD + "c\n", {}, r"x\.tsv:4: 1 columns; line 1 has 2\."),
        ("x.tsv", GOOD + "\tx\n", {}, r"x\.tsv:4: the text in 'text' is empty\."),
        ("x.tsv", GOOD + "c\t \n", {}, r"x\.tsv:4: the label in 'label' is empty\."),
        ("x.tsv", GOOD, {"text": "sentense"}, r"x\.tsv:1: no column 'sentense'; the line reads 'text', 'label'"),
        ("x.tsv", GOOD, {"text_pair": "txt"}, r"x\.tsv:1: no column 'txt'.* Did you mean 'text'\?"),
        ("x.tsv", GOOD, {"kind": "number"}, r"x\.tsv:2: 'label' is 'x', not a number\."),
        ("x.tsv", "text\tlabel\na b\tO\n", {"kind": "tags"}, r"x\.tsv:2: 2 words but 1 tags\."),
        ("x.tsv", "text\tlabel\n", {}, r"x\.tsv: nothing but a header\."),
        ("x.tsv", "label\ttext\tlabel\na\tb\tc\n", {}, r"x\.tsv:1: a column name occurs twice"),
        ("x.tsv", "a\tb\tc\n", {}, r"x\.tsv:1: 3 columns without the header text, label; say which is which"),
        ("x.tsv", "a\tb\n", {}, r"x\.tsv: cannot tell which of the two columns is the label; say data\.text=1"),
        ("x.tsv", "1\t2\n3\t4\n", {"kind": "number"}, r"x\.tsv: cannot tell which of the two columns"),
        ("x.tsv", "a\tb\n", {"text": "3"}, r"x\.tsv: no column '3'; without a header they are 1, 2\."),
        (
            "x.tsv",
            "review\tstars\n" + tsv(rows()),
            {},
            r"x\.tsv:1: a header\? 'stars' is a label in this row only\. If so, say data\.text='review' da",
        ),
        ("x.tsv", "a\tscore\nb\t1\nc\t2\n", {"kind": "number"}, r"x\.tsv:1: a header\? 'score' is a label in this row"),
        ("x.tsv", "text\tlabel\na\tx\nb\tx\n", {}, r"x\.tsv: every label is 'x'; there must be at least two classes\."),
        ("x.csv", 'text,label\n"a,x\n', {}, r"x\.csv:2: not CSV"),
        ("x.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', {}, r"x\.jsonl:2: no 'label'; there are text\."),
        ("x.jsonl", '{"text": 7, "label": "x"}\n', {}, r"x\.jsonl:1: 'text' is int, not text\."),
        ("x.jsonl", '{"text": "a", "label": null}\n', {}, r"x\.jsonl:1: 'label' is null"),
        ("x.jsonl", '{"text": "a", "label": ["x"]}\n', {}, r"x\.jsonl:1: 'label' is list, not a class\."),
        (
            "x.jsonl",
            '{"text": "a", "class": "x"}\n',
            {},
            r"x\.jsonl: no column 'label'; there are class, text.*data\.label",
        ),
        ("x.jsonl", '{"text": "a"\n', {}, r"x\.jsonl:1: not JSON"),
        ("x.jsonl", "[]\n", {}, r"x\.jsonl:1: expected an object"),
        ("x.parquet", "PAR1", {}, r"x\.parquet: cannot tell the format from the name; give rows\.tsv"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write, letters, name, content, fields, message) -> None:
    file = write(name, content)
    with pytest.raises(UserError, match=message):
        data_of(file, letters, **same(file), **fields)


def test_labels_outside_the_classes_are_named_with_their_line(write, letters) -> None:
    train = write("train.tsv", "text\tlabel\na\tgood\nb\tbad\n")
    odd = write("odd.tsv", "text\tlabel\na\tgood\nb\tgod\n")
    with pytest.raises(
        UserError, match=r"odd\.tsv:3: the label 'god' is not among the 2 classes bad, good\. Did you mean 'good'\?"
    ):
        data_of(train, letters, train=train, validation=odd, test=train)
    chosen = data_of(train, letters, **same(train), labels=("good", "bad", "other"))
    assert chosen.labels == ["good", "bad", "other"]
    assert chosen.references("train").tolist() == [0, 1]
    with pytest.raises(UserError, match=r"train\.tsv:3: the label 'bad' is not among the 2 classes good, other"):
        data_of(train, letters, **same(train), labels=("good", "other"))
    with pytest.raises(UserError, match=r"data\.validation = 'train\[99%:\]' is no file"):
        data_of(train, letters, train=train, validation="train[99%:]", test=train)
    with pytest.raises(UserError, match=r"train\.tsv: 2 rows in 2 groups cannot be split"):
        data_of(train, letters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": ""}, r"data\.dataset is empty"),
        ({"max_length": 4}, r"data\.max_length must be at least 8, got 4"),
        ({"batch_rows": 20}, r"data\.batch_rows must be a positive multiple of data\.rows_multiple = 8, got 20"),
        ({"rows_multiple": 0}, r"data\.rows_multiple must be at least 1"),
        ({"threads": -1}, r"data\.threads must not be negative"),
        ({"bucket_lengths": (16, 32)}, r"data\.bucket_lengths must .* end with data\.max_length = 128"),
        ({"labels": ("a",)}, r"data\.labels must be at least two different names"),
        ({"labels": ("a", "b"), "kind": "number"}, r"data\.kind = number has none"),
        ({"kind": "tags", "layout": "gpt"}, r"data\.kind = tags takes one text in the layout bert"),
        ({"dataset": "glue/stsb"}, r"the labels of glue/stsb are of kind 'number': set data\.kind=number"),
    ],
)
def test_contradictory_values_are_refused(fields, message) -> None:
    LabelledText("x.tsv").check()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LabelledText("x.tsv"), **fields).check()


def test_an_experiment_with_it_survives_json() -> None:
    config = LabelledText("glue/mnli", labels=("a", "b"), bucket_lengths=(64, 128), kind="classes", layout="gpt")
    experiment = dataclasses.replace(tiny(), data=config)
    assert Experiment.from_json(experiment.to_json()).data == config


@pytest.mark.parametrize(
    ("task", "kind", "columns", "splits"),
    [
        ("cola", "classes", ("sentence", ""), ("validation", "validation")),
        ("mrpc", "classes", ("sentence1", "sentence2"), ("validation", "validation")),
        ("qqp", "classes", ("question1", "question2"), ("validation", "validation")),
        ("stsb", "number", ("sentence1", "sentence2"), ("validation", "validation")),
        ("mnli", "classes", ("premise", "hypothesis"), ("validation_matched", "validation_mismatched")),
        ("qnli", "classes", ("question", "sentence"), ("validation", "validation")),
    ],
)
def test_glue_works_by_name_alone(letters, task, kind, columns, splits) -> None:
    with tfds.testing.mock_data(num_examples=9):
        data = data_of(f"glue/{task}", letters, kind=kind)
    summary = data.summary()
    assert (summary["columns"]["text"], summary["columns"]["pair"]) == columns
    assert [summary["data"][s].split(":")[1] for s in SPLITS] == ["train", *splits]
    assert summary["examples"] == dict.fromkeys(SPLITS, 9)
    if kind == "classes":
        assert data.labels == list(tfds.builder(f"glue/{task}").info.features["label"].names)
    assert next(data.validation_batches())["types"].any() == bool(columns[1])


def test_the_test_splits_of_glue_have_no_labels(letters) -> None:
    def examples(builder: Any, split: str, **_: Any) -> list[dict[str, Any]]:
        label = -1 if split == "test" else 1
        return [{"sentence": f"text {i}".encode(), "label": np.int64(label), "idx": np.int32(i)} for i in range(9)]

    with tfds.testing.mock_data(as_data_source_fn=examples):
        data = data_of("glue/sst2", letters, test="test")
        assert data.references("validation").tolist() == [1] * 9
        assert [label for batch in data.test_batches() for label in batch["label"]] == [-1] * 16
        with pytest.raises(UserError, match=r"glue/sst2/2\.0\.0:test has examples without a label; set data\.test"):
            data.references("test")
        with pytest.raises(UserError, match=r"kind 'classes': set data\.kind=classes"):
            data_of("imdb_reviews", letters, kind="number")
        with pytest.raises(UserError, match=r"glue/sst2/2\.0\.0: no column 'sentnce'.* Did you mean 'sentence'\?"):
            data_of("glue/sst2", letters, text="sentnce")


def test_bundled_tasks_prepare_themselves(letters) -> None:
    data = data_of("tjax_tasks/sentiment", letters)
    assert data.labels == ["negative", "positive"]
    assert data.summary()["examples"] == {"train": 3600, "validation": 200, "test": 200}
    titles = ParallelText("tjax_tasks/titles", source="text", target="title", max_length=512).open(400)
    assert titles.summary()["pairs"]["test"] > 60
    heads = {s: {title.casefold() for _, title in titles.pairs(s)} for s in SPLITS}
    assert not heads["train"] & heads["test"]
    with pytest.raises(UserError, match=r"has no configuration 'sentiments'\. Did you mean 'sentiment'\?"):
        data_of("tjax_tasks/sentiments", letters)
