from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_jax.data.files import is_files, read_files
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
PAIRS = [("cat", "고양이"), ("dog", "개"), ("line\u2028break", "줄")]


def _tsv(pairs: list[tuple[str, str]]) -> str:
    return "".join(f"{a}\t{b}\n" for a, b in pairs)


def test_every_format_gives_the_same_pairs(write: Write) -> None:
    text = _tsv(PAIRS)
    write("a.en", "".join(f"{a}\n" for a, _ in PAIRS))
    two = f"{write('b.en', ''.join(f'{a}' + chr(10) for a, _ in PAIRS))},"
    two += str(write("b.ko", "".join(f"{b}\n" for _, b in PAIRS)))
    files = [
        str(write("plain.tsv", text)),
        str(write("windows.tsv", "\ufeff" + text.replace("\n", "\r\n"))),
        str(write("zipped.tsv.gz", gzip.compress(text.encode()))),
        str(write("zipped.tsv.xz", lzma.compress(text.encode()))),
        str(write("codes.jsonl", "".join(json.dumps({"en": a, "ko": b}) + "\n" for a, b in PAIRS))),
        str(write("sides.jsonl", "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS))),
        str(write("nested.jsonl", "".join(json.dumps({"translation": {"ko": b, "en": a}}) + "\n" for a, b in PAIRS))),
        two,
    ]
    for name in files:
        assert is_files(name)
        assert read_files(name, "en", "ko").pairs == PAIRS, name


def test_groups_are_read_from_the_third_column_or_the_key(write: Write) -> None:
    tsv = write("g.tsv", "a\tb\tpage 1\nc\td\tpage 2\n")
    jsonl = write("g.jsonl", '{"en": "a", "ko": "b", "group": "page 1"}\n{"en": "c", "ko": "d", "group": "page 2"}\n')
    assert read_files(str(tsv), "en", "ko").groups == ["page 1", "page 2"]
    assert read_files(str(jsonl), "en", "ko").groups == ["page 1", "page 2"]


@pytest.mark.parametrize("name", ["wmt14_translate/de-en", "tjax_parallel/help_en_ko:1.0.0", "set/a=True,b=3"])
def test_tfds_names_are_not_files(name: str) -> None:
    assert not is_files(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "", r"x\.tsv: the file is empty"),
        ("x.tsv", "a\tb\nc\n", r"x\.tsv:2: 1 tab-separated columns; expected 2, as in line 1"),
        ("x.tsv", "a\tb\tg\nc\td\n", r"x\.tsv:2: 2 tab-separated columns; expected 3, as in line 1"),
        ("x.tsv", "a\n", r"x\.tsv:1: 1 tab-separated columns; expected 2, or 3 with a group"),
        ("x.tsv", b"a\tb\nc\t\xff\n", r"x\.tsv:2: not UTF-8 \(byte 3 of the line is 0xff\); convert"),
        ("x.tsv.gz", b"no gzip", r"x\.tsv\.gz: cannot be read \(Not a gzipped file"),
        ("x.tsv.xz", b"no xz", r"x\.tsv\.xz: cannot be read"),
        ("x.jsonl", '{"en": "a", "ko": "b"}\n{"en": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: expected an object with the keys 'en' and 'ko'"),
        ("x.jsonl", '{"en": "a", "de": "b"}\n', r"x\.jsonl:1: no key 'ko'; the keys are de, en\."),
        ("x.jsonl", '{"en": "a", "ko": 7}\n', r"x\.jsonl:1: 'ko' is int, not text"),
        ("x.jsonl", '{"en":"a","ko":"b","group":1}\n{"en":"a","ko":"b"}\n', r"x\.jsonl:2: some rows name a group"),
        ("x.txt", "a b\n", r"x\.txt: cannot tell the format from the name; give pairs\.tsv"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_files(str(write(name, content)), "en", "ko")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tsv: no such file"):
        read_files(str(tmp_path / "none.tsv"), "en", "ko")


def test_parallel_files_of_different_length_are_refused(write: Write) -> None:
    files = f"{write('a.en', 'one' + chr(10) + 'two' + chr(10))},{write('a.ko', '하나' + chr(10))}"
    with pytest.raises(UserError, match=r"a\.en has 2 lines but .*a\.ko has 1: line 2 has no counterpart"):
        read_files(files, "en", "ko")
    with pytest.raises(UserError, match=r"3 files; give one file or two parallel ones"):
        read_files("a.tsv,b.tsv,c.tsv", "en", "ko")
