from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transformer_jax.data import corpus as corpus_module
from transformer_jax.data.corpus import Corpus, pieces
from transformer_jax.data.document_files import FileDocuments
from transformer_jax.data.documents import Part, Splits, open_documents
from transformer_jax.data.holdout import Split
from transformer_jax.data.sources import open_splits
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
DEFAULT: dict[Split, str] = {"train": "", "validation": "", "test": ""}


def _texts(parts: object) -> list[str]:
    return [text for part in parts for text in part.texts()]  # type: ignore[attr-defined]


def _open(dataset: object, data_dir: str = "", **expressions: str) -> Splits:
    return open_documents(str(dataset), "text", "file", DEFAULT | expressions, data_dir)  # type: ignore[arg-type]


def test_every_form_gives_the_same_documents(write: Write) -> None:
    documents = ["one\ntwo 🙂\n", "세 번째\n", "line\u2028break\n"]
    text = "\n\n".join(documents)
    rows = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(documents))
    blank = [
        write("a.txt", text),
        write("windows.txt", "\ufeff" + text.replace("\n", "\r\n")),
        write("a.txt.gz", gzip.compress(text.encode())),
        write("a.txt.xz", lzma.compress(text.encode())),
        write("a.jsonl", rows),
        write("blank.jsonl.gz", gzip.compress(f"\n{rows}\n\n".encode())),
    ]
    for path in blank:
        assert list(FileDocuments(str(path), "text", "blank_line")) == documents, path
    for i, document in enumerate(documents):
        write(f"doc{i}.txt", document)
    write("doc9.txt", " \n")  # no text, no document
    whole = FileDocuments(str(blank[0].parent / "doc*.txt"), "text", "file")
    assert list(whole) == documents
    assert list(whole) == documents  # again
    assert len(whole) == 3


def test_a_changed_file_is_read_again(write: Write) -> None:
    path = write("a.txt", "one")
    before = FileDocuments(str(path), "text", "file")
    write("a.txt", "one two")
    after = FileDocuments(str(path), "text", "file")
    assert before.digest != after.digest
    assert list(after) == ["one two"]


def test_documents_are_held_out_whole_and_equal_ones_together(write: Write) -> None:
    rows = [f"document {i // 2}" for i in range(400)]  # each twice
    path = write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in rows))
    splits = _open(path)
    train, validation, test = _texts(splits.train[0].parts), _texts(splits.validation), _texts(splits.test)
    assert sorted(train + validation + test) == sorted(rows)
    assert (len(train), len(validation), len(test)) == (360, 20, 20)
    assert not set(train) & set(validation + test)
    assert not set(validation) & set(test)
    assert splits.held_out == "whole documents held out"


def test_of_few_documents_the_ends_are_held_out(write: Write) -> None:
    lines = [f"line {i:03}\n" for i in range(200)]
    splits = _open(write("book.txt", "".join(lines)))
    assert _texts(splits.train[0].parts) == ["".join(lines[:180])]
    assert _texts(splits.validation) == ["".join(lines[180:190])]
    assert _texts(splits.test) == ["".join(lines[190:])]
    assert splits.held_out == "the ends of the documents held out"
    one_line = _open(write("line.txt", "0123456789" * 10))
    assert [len(_texts(p)[0]) for p in (one_line.train[0].parts, one_line.validation, one_line.test)] == [90, 5, 5]


def test_own_validation_files_leave_more_to_train_on(write: Write) -> None:
    path = write("a.jsonl", "".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(100)))
    held = write("v.txt", "held out")
    splits = _open(path, validation=str(held))
    assert (_texts(splits.validation), len(_texts(splits.test)), len(_texts(splits.train[0].parts))) == (
        ["held out"],
        5,
        95,
    )
    both = _open(path, validation=str(held), test=str(held))
    assert len(_texts(both.train[0].parts)) == 100


def test_mixtures_have_weights_that_add_up(write: Write) -> None:
    a, b = write("a.txt", "a\n" * 100), write("b.txt", "b\n" * 100)
    mixed = _open(f"{a}:3, {b}:1").train
    assert [(source.name, float(source.weight)) for source in mixed] == [(str(a), 0.75), (str(b), 0.25)]
    joined = _open(f"{a},{b}").train
    assert [(len(source.parts), source.weight) for source in joined] == [(2, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", " \n", r"x\.txt: there is no text in it"),
        ("x.txt", b"a\nb\xff\n", r"x\.txt:2: not UTF-8 \(byte 2 of the line is 0xff\); convert"),
        ("x.txt.gz", b"no gzip", r"x\.txt\.gz: cannot be read after line 0 \(Not a gzipped file"),
        ("x.txt.xz", b"no xz", r"x\.txt\.xz: cannot be read after line 0"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: expected an object with the key 'text'"),
        ("x.jsonl", '{"body": "a", "id": 1}\n', r"x\.jsonl:1: no key 'text': the keys are body, id; set data\.field"),
        ("x.jsonl", '{"text": 7}\n', r"x\.jsonl:1: 'text' is int, not text"),
        ("x.tsv", "a\tb\n", r"x\.tsv: documents are plain text, or \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _open(write(name, content))


def test_wrong_names_are_explained(write: Write, tmp_path: Path, tfds_dir: str) -> None:
    path = write("a.txt", "a\n" * 50)
    for dataset, expressions, message in [
        (tmp_path / "none.txt", {}, r"none\.txt: there is no such file"),
        (tmp_path / "no*.jsonl", {}, r"no\*\.jsonl: there is no such file"),
        (tmp_path, {}, r"is a folder; name the files in it, as '.*/\*\.txt'"),
        (f"{path}:0.5,{path}", {}, r"'.*a\.txt' has no weight and others have"),
        (f"{path}:0,{path}:1", {}, r"a\.txt:0' has the weight 0; leave it out"),
        (f"{path},,{path}", {}, r"nothing between two commas"),
        (path, {"train": "train[:50%]"}, r"data\.train = 'train\[:50%\]' is no file"),
        (path, {"train": str(path)}, r"data\.train = '.*' is a file; training files are named in data\.dataset"),
        ("tjax_text/shakespear", {}, r"no configuration 'shakespear'. Did you mean 'shakespeare'\?"),
        (
            "tjax_txt",
            {},
            r"neither a TFDS dataset nor a file\. Did you mean 'tjax_text'\? Files are given as a\.txt, b",
        ),
        ("lm1b", {}, r"'lm1b' is not prepared in .*: pip install tensorflow-cpu h5py, then tfds build lm1b --file_fo"),
    ]:
        with pytest.raises(UserError, match=message):
            _open(dataset, tfds_dir, **expressions)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"has no text feature 'txt', only text, title\. Did you mean 'text'\?"):
        open_documents("tjax_text/bible_en", "txt", "file", DEFAULT, tfds_dir)


@pytest.mark.parametrize(("name", "count"), [("shakespeare", 84), ("help_en", 2228), ("bible_en", 139)])
def test_bundled_documents_prepare_themselves(tfds_dir: str, name: str, count: int) -> None:
    splits = _open(f"tjax_text/{name}", tfds_dir)
    held = [_texts(parts) for parts in (splits.train[0].parts, splits.validation, splits.test)]
    assert sum(map(len, held)) == count
    sizes = [sum(map(len, texts)) for texts in held]
    assert all(0.04 < size / sum(sizes) < 0.07 for size in sizes[1:])
    assert splits.held_out == ""
    assert all(text.strip() for texts in held for text in texts)


def test_bundled_pages_are_in_the_same_split_as_their_translations(tfds_dir: str) -> None:
    pairs = open_splits("tjax_parallel/help_en_de", "en", "de", DEFAULT, tfds_dir)["test"]
    lines = {line for text in _texts(_open("tjax_text/help_en", tfds_dir).test) for line in text.splitlines()}
    assert lines == {english for english, _ in pairs.read(0, len(pairs))}


def test_a_dataset_of_tfds_is_read() -> None:
    with tfds.testing.mock_data(num_examples=200):
        splits = _open("lm1b", validation="test[:50%]", test="test")
        assert [len(parts[0].rows) for parts in (splits.train[0].parts, splits.validation, splits.test)] == [200] * 3


def test_where_tfds_has_no_validation_split_the_end_of_train_is_held_out(tfds_dir: str, tmp_path: Path) -> None:
    everything = _open("tjax_text/help_en", tfds_dir)
    folder = tmp_path / "own_text" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (Path(tfds_dir) / "tjax_text" / "help_en" / "1.0.0").iterdir():
        (folder / path.name.replace("tjax_text", "own_text")).write_bytes(path.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["name"] = "own_text"
    info.pop("configName")
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("tjax_text", "{DATASET}")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    splits = _open("own_text", str(tmp_path))
    assert splits.held_out == "the last 1 % of train held out"
    assert not splits.test
    assert _texts(splits.train[0].parts) + _texts(splits.validation) == _texts(everything.train[0].parts)
    assert len(_texts(splits.validation)) == 20


def test_a_very_long_document_is_tokenized_as_one(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(corpus_module, "_LONGEST", 50)
    rng = np.random.default_rng(0)
    words = np.array(["cat", "dog ", "고양이", "\n", "\n\n", " \n  ", "the\n", "x", " cat", "  the"])
    text = "".join(rng.choice(words, 900)) + "y" * 120 + "\nend"
    cut = pieces(text)
    assert "".join(cut) == text
    assert len(cut) > 20
    assert max(map(len, cut)) <= 50
    tokenizer = Tokenizer.train([text], 300)
    whole = text[: text.index("y" * 120)]  # a line longer than a piece has to be cut somewhere
    (ids,) = tokenizer.encode_batch([whole])
    assert [i for piece in tokenizer.encode_batch(pieces(whole)) for i in piece] == ids


def test_a_corpus_numbers_the_documents_of_all_its_parts(write: Write) -> None:
    a = FileDocuments(
        str(write("a.jsonl", '{"text": "one two"}\n{"text": "three"}\n{"text": "four"}\n')), "text", "file"
    )
    b = FileDocuments(str(write("b.txt", "five\n\nsix")), "text", "blank_line")
    tokenizer = Tokenizer.characters([*a, *b])
    corpus = Corpus.of([Part(a, np.array([0, 2])), Part.whole(b)], tokenizer, str.split, "words")
    assert [tokenizer.decode(corpus.tokens(i)) for i in range(len(corpus))] == ["onetwo", "four", "five", "six"]
    assert corpus.length_N.tolist() == corpus.bytes_N.tolist() == [6, 4, 4, 3]
    gathered = corpus.gather(np.array([0, 18, 5]))
    assert tokenizer.decode(gathered) == "oeo"
    assert (corpus.last_N - corpus.first_N).tolist() == [2, 1, 1, 1]
