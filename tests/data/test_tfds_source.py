from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from transformer_jax.data import ParallelText, bundled_dataset, bundled_parallel
from transformer_jax.data.holdout import Split
from transformer_jax.data.sources import open_splits
from transformer_jax.errors import UserError

DEFAULT: dict[Split, str] = {"train": "", "validation": "", "test": ""}


ROWS = {"help_en_ko": 13_935, "help_en_de": 26_029, "bible_en_es": 4_501, "emoji_en_ko": 1_911}


@pytest.mark.parametrize("name", list(ROWS))
def test_bundled_texts_prepare_themselves(tfds_dir: str, capfd: pytest.CaptureFixture[str], name: str) -> None:
    dataset, rows = f"tjax_parallel/{name}", ROWS[name]
    languages = name.split("_")[1:]
    splits = open_splits(dataset, languages[0], languages[1], DEFAULT, tfds_dir)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if "Preparing the bundled texts" in line] == err.splitlines()
    sizes = {split: len(pairs) for split, pairs in splits.items()}
    assert sum(sizes.values()) == rows
    assert 0.04 * rows < sizes["validation"] < 0.06 * rows
    assert 0.04 * rows < sizes["test"] < 0.06 * rows
    swapped = open_splits(dataset, languages[1], languages[0], DEFAULT, tfds_dir)
    assert [(b, a) for a, b in swapped["test"].read(0, 9)] == splits["test"].read(0, 9)
    assert capfd.readouterr().err == ""


def test_bundled_chapters_do_not_cross_splits(tfds_dir: str) -> None:
    open_splits("tjax_parallel/bible_en_es", "en", "es", DEFAULT, tfds_dir)
    builder = tfds.builder("tjax_parallel/bible_en_es", data_dir=tfds_dir)
    chapters = [{row["group"] for row in builder.as_data_source(split=s)} for s in ("train", "validation", "test")]
    assert b"Gen 1" in set.union(*chapters)
    assert sum(map(len, chapters)) == len(set.union(*chapters))


def _prepare(data_dir: str) -> None:
    bundled_dataset.prepare(bundled_parallel.TjaxParallel(config="emoji_en_ko", data_dir=data_dir))


def test_two_processes_may_prepare_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_prepare, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [folder.name for folder in (tmp_path / "tjax_parallel" / "emoji_en_ko").iterdir()] == ["1.0.0"]
    assert len(open_splits("tjax_parallel/emoji_en_ko", "en", "ko", DEFAULT, str(tmp_path))["train"]) > 1700


def test_the_loser_of_a_race_leaves_the_winner_alone(tmp_path: Path) -> None:
    final, mine = tmp_path / "1.0.0", tmp_path / "mine"
    for folder, content in ((final, "winner"), (mine, "loser")):
        folder.mkdir()
        (folder / "dataset_info.json").write_text(content)
    bundled_dataset._publish(mine, final)
    assert (final / "dataset_info.json").read_text() == "winner"
    assert not mine.exists()


def test_a_dataset_of_tfds_is_read() -> None:
    with tfds.testing.mock_data(num_examples=30):
        config = ParallelText("wmt14_translate/de-en", source="de", target="en", max_length=128, batch_tokens=4096)
        data = config.open(vocab_size=300)
        assert data.summary()["pairs"] == {"train": 30, "validation": 30, "test": 30}
        assert next(data.train_iterator(0))["source"].dtype == "int32"
        swapped = open_splits("wmt14_translate/de-en", "en", "de", DEFAULT)["test"].read(0, 2)
        assert [(b, a) for a, b in swapped] == open_splits("wmt14_translate/de-en", "de", "en", DEFAULT)["test"].read(
            0, 2
        )
        with pytest.raises(UserError, match=r"wmt14_translate/de-en.* example 0: no key 'ko'; the keys are de, en\."):
            open_splits("wmt14_translate/de-en", "en", "ko", DEFAULT)


def test_what_is_not_prepared_says_at_once_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"pip install tensorflow-cpu h5py, then tfds build wmt14_translate/de-en "
        r"--file_format=array_record --data_dir=",
    ):
        open_splits("wmt14_translate/de-en", "de", "en", DEFAULT, str(tmp_path))


def test_another_prepared_version_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "wmt14_translate" / "de-en" / "0.0.3"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"but in version 0\.0\.3; name it, as wmt14_translate/de-en:0\.0\.3\."):
        open_splits("wmt14_translate/de-en", "de", "en", DEFAULT, str(tmp_path))


def test_tfrecord_says_how_to_convert(tfds_dir: str, tmp_path: Path) -> None:
    open_splits("tjax_parallel/emoji_en_ko", "en", "ko", DEFAULT, tfds_dir)
    folder = tmp_path / "old_set" / "en_ko" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (Path(tfds_dir) / "tjax_parallel" / "emoji_en_ko" / "1.0.0").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"name": "old_set", "fileFormat": "tfrecord", "configName": "en_ko"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        UserError,
        match=r"holds 'old_set/en_ko' as tfrecord.* tfds convert_format --dataset_version_dir=\S+1\.0\.0 --out",
    ):
        open_splits("old_set/en_ko", "en", "ko", DEFAULT, str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "parts", "message"),
    [
        ("wmt14_translat/de-en", {}, r"neither a TFDS dataset nor a file\. Did you mean 'wmt14_translate'\?"),
        (
            "tjax_parallel/help_ko_en",
            {},
            r"has no configuration 'help_ko_en'\. Did you mean 'help_en_ko'\? .*bible_en_es",
        ),
        ("wmt14_translate/de-en:9.9.9", {}, r"TFDS cannot open 'wmt14_translate/de-en:9\.9\.9': .*cannot be loaded at"),
        ("tjax_parallel/emoji_en_ko", {"train": "tran"}, r"data\.train = 'tran' does not fit .*Unknown split 'tran'"),
        ("tjax_parallel/emoji_en_ko", {"test": "test[5"}, r"data\.test = 'test\[5' does not fit"),
    ],
)
def test_wrong_names_are_explained(tfds_dir: str, dataset: str, parts: dict[Split, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_splits(dataset, "en", "ko", DEFAULT | parts, tfds_dir)


def test_a_missing_validation_split_proposes_one(tfds_dir: str, tmp_path: Path) -> None:
    open_splits("tjax_parallel/emoji_en_ko", "en", "ko", DEFAULT, tfds_dir)
    folder = tmp_path / "own_set" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (Path(tfds_dir) / "tjax_parallel" / "emoji_en_ko" / "1.0.0").iterdir():
        (folder / path.name.replace("tjax_parallel", "own_set")).write_bytes(path.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["name"] = "own_set"
    info.pop("configName")
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("tjax_parallel", "{DATASET}")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"no split 'validation', only train\. Cut one off .* = 'train\[99%:\]'"):
        open_splits("own_set", "en", "ko", DEFAULT, str(tmp_path))
    cut = open_splits(
        "own_set",
        "en",
        "ko",
        {"train": "train[:98%]", "validation": "train[98%:99%]", "test": "train[99%:]"},
        str(tmp_path),
    )
    assert sum(map(len, cut.values())) > 1700
