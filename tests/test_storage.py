"""Laws of a run in a bucket: everything of it is there, and nothing beside it on this machine."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from tests.tiny import small, write_pairs
from transformer_jax import checkpoint, logs, verbs
from transformer_jax.cli import main
from transformer_jax.cli.verb import experiment_of
from transformer_jax.errors import UserError
from transformer_jax.logs import MetricsLog, read_metrics
from transformer_jax.storage import folder_here, is_remote, move, run_path, written_here


class Bucket(MemoryFileSystem):
    """Google's object store as far as it matters: no appending, nothing is renamed, folders are only names."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def __init__(self, finalize_on_close=False, **options):
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), "an object cannot be appended to"
        return super()._open(path, mode, **options)

    def mv(self, *_args, **_options):
        raise AssertionError("an object cannot be renamed")

    rename = move = mv


@pytest.fixture
def bucket(monkeypatch):
    """Let gs:// lead to memory."""
    registry = importlib.import_module("fsspec.registry")._registry
    backend.fsspec_backend._get_filesystem.cache_clear()
    for name in ("gcs", "gs"):
        monkeypatch.setitem(registry, name, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    yield Bucket
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_trained_resumed_and_evaluated(bucket, tmp_path, monkeypatch):
    experiment = small(write_pairs(tmp_path / "pairs.tsv"), steps=2, save_every=2, eval_every=2)
    arrays = tmp_path / "arrays"  # TensorStore has its own way into a bucket
    monkeypatch.setattr(checkpoint, "_directory", lambda run: arrays)
    monkeypatch.chdir(tmp_path)
    run = "gs://bucket/runs/tiny"
    outcome = verbs.train(experiment, run)
    assert str(outcome.run) == run
    resumed = replace(experiment, train=replace(experiment.train, steps=4))
    assert verbs.train(resumed, Path(run)).started_at == 2  # a slash short
    assert [r["step"] for r in read_metrics(outcome.run) if r["split"] == "train"] == [1, 2, 3, 4]
    assert experiment_of(run) == resumed
    files = verbs.evaluate(run).files
    assert json.loads((outcome.run / "evaluation.json").read_text())["run"] == run
    assert all(str(file).startswith(f"{run}/") and file.exists() for file in files)
    for name in ("tokenizer.json", "provenance.json", "loss.png", "attention.png"):
        assert (outcome.run / name).exists()
    assert len(list((outcome.run / "tensorboard").iterdir())) == 2  # one of each session
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.tsv", "arrays"}


def test_metrics_are_uploaded_while_the_run_goes_on(bucket, monkeypatch):
    run = run_path("gs://bucket/run")
    log = MetricsLog(run, 0)
    log.write(1, "train", {"loss": 3.0})
    assert read_metrics(run) == []
    monkeypatch.setattr(logs, "BETWEEN_UPLOADS", 0.0)
    log.write(2, "train", {"loss": 2.0})
    assert [record["step"] for record in read_metrics(run)] == [1, 2]
    log.close()
    again = MetricsLog(run, 1)
    again.close()
    assert [record["step"] for record in read_metrics(run)] == [1]


def test_folders_move_and_programs_write_here(bucket, tmp_path):
    for root in (run_path("gs://bucket/run"), tmp_path):
        (root / "a" / "deep").mkdir(parents=True, exist_ok=True)
        (root / "a" / "deep" / "file").write_text("x")
        move(root / "a", root / "broken" / "b")
        assert (root / "broken" / "b" / "deep" / "file").read_text() == "x"
        assert not (root / "a").exists()
        with written_here(root / "picture.png") as file:
            assert not is_remote(file)
            file.write_bytes(b"png")
        assert (root / "picture.png").read_bytes() == b"png"


def test_what_is_no_bucket_of_ours():
    assert run_path("runs/demo") == Path("runs/demo")
    with pytest.raises(UserError, match=r"gss://bucket/run: a run can be in a folder or in gs://.* Did you mean 'gs'"):
        run_path("gss://bucket/run")


@pytest.mark.parametrize("verb", [("sweep", "lstm_against_transformer"), ("compare", "lstm_against_transformer")])
def test_what_keeps_its_table_here_refuses_a_bucket_before_any_work(monkeypatch, tmp_path, capsys, verb):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*verb, "--out", "gs://bucket/runs"])
    assert "--out gs://bucket/runs: a " in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="s3://b/c: a sweep is kept in a folder of this machine"):
        folder_here("s3://b/c", "a sweep")
    assert folder_here("runs/c", "a sweep") == Path("runs/c")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match="gs:// needs gcsfs: pip install gcsfs"):
        run_path("gs://bucket/run")
