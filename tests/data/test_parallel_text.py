from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import transformer_jax.data.examples as examples_module
from transformer_jax.data import ParallelText
from transformer_jax.data.parallel import ParallelData
from transformer_jax.data.sources import open_splits
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
WORDS = tuple("red green blue small large old new cat dog house tree river 고양이 개 집 나무 강".split())  # noqa: SIM905


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, 9)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ParallelText:
    rng = np.random.default_rng(0)
    rows = [f"{_sentence(rng)} {i}\t{_sentence(rng)} {i}\tpage {i // 5}\n" for i in range(300)]
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(rows), encoding="utf-8")
    return ParallelText(str(path), max_length=24, bucket_lengths=(8, 16, 24), batch_tokens=24 * 8, rows_multiple=4)


@pytest.fixture(scope="module")
def data(config: ParallelText) -> ParallelData:
    return config.open(vocab_size=400)


def test_an_epoch_holds_every_training_pair_once_as_text(data: ParallelData) -> None:
    seen: list[str] = []
    batches = data.train_iterator(seed=1)
    for _ in range(data.summary()["batches_per_epoch"]):
        batch = next(batches)
        rows, length = batch["source"].shape
        assert (rows, length, batch["target"].shape[1] - 1) in data.example_shapes()
        for source, target, example in zip(batch["source"], batch["target"], batch["example"], strict=True):
            if example < 0:
                assert not source.any()
                assert not target.any()
            else:
                assert data.text(example) == f"{data.tokenizer.decode(source)}\t{data.tokenizer.decode(target)}"
                assert (source == 2).sum() == (target == 2).sum() == 1
                assert (target == 1).tolist() == [True] + [False] * length
                seen.append(data.text(example))
    assert sorted(seen) == sorted("\t".join(pair) for pair in data.pairs("train"))


def test_validation_shows_every_pair_once(data: ParallelData) -> None:
    for processes in (1, 2, 4):
        seen = [
            data.tokenizer.decode(row)
            for i in range(processes)
            for batch in data.validation_batches(i, processes)
            for row, example in zip(batch["source"], batch["example"], strict=True)
            if example >= 0
        ]
        assert sorted(seen) == sorted(source for source, _ in data.pairs("validation"))


def test_the_test_batches_hold_every_pair_however_long(config: ParallelText, write: Write) -> None:
    long = write("long.tsv", "red\tgreen\n" + "cat " * 90 + "\tdog\n" + "tree\triver\n")
    data = dataclasses.replace(config, test=str(long)).open(400)
    batches = list(data.test_batches())
    assert [batch["target"].shape for batch in batches] == [(24, 9), (4, 129)]
    seen = [data.tokenizer.decode(row) for batch in batches for row in batch["source"] if row.any()]
    assert sorted(seen) == sorted(source for source, _ in data.pairs("test"))


def test_the_shapes_of_the_longest_batch_are_known_without_data(config: ParallelText) -> None:
    longest = next(dataclasses.replace(config, bucket_lengths=(24,)).open(400).train_iterator(seed=0))
    shapes = dataclasses.replace(config, dataset="absent.tsv").batch_shapes()
    assert {name: (array.shape, array.dtype.name) for name, array in longest.items()} == shapes


def test_the_log_line_counts(data: ParallelData) -> None:
    assert data.describe() == f"data: 270 train, 15 validation, 15 test pairs, vocabulary {data.tokenizer.vocab_size}"


def test_a_bert_vocabulary_can_translate_but_padding_must_be_0(config: ParallelText, write: Write) -> None:
    specials = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for mark in ("", "##")]
    bert = write("vocab.txt", "\n".join([*specials, *letters]))
    data = dataclasses.replace(config, tokenizer=str(bert), max_length=60, bucket_lengths=(), batch_tokens=600).open(80)
    batch = next(data.train_iterator(0))
    assert set(batch["target"][:, 0]) <= {3, 0}
    assert all((row == 4).sum() == 1 for row in batch["source"] if row.any())
    shifted = write("shifted.txt", "\n".join(["x", *specials, *letters]))
    with pytest.raises(UserError, match=r"shifted\.txt pads with id 1, but batches of parallel text are padded with 0"):
        dataclasses.replace(config, tokenizer=str(shifted)).open(80)
    without = write("without.txt", "\n".join(["[PAD]", "[UNK]", *letters]))
    with pytest.raises(
        UserError, match=r"without\.txt has no special token for bos, eos \(it would be written bos: <bos>"
    ):
        dataclasses.replace(config, tokenizer=str(without)).open(80)


def test_the_order_does_not_depend_on_the_number_of_hosts_even_if_it_changes(data: ParallelData) -> None:
    alone = data.train_iterator(seed=5)
    expected = [next(alone) for _ in range(40)]
    step, state = 0, None
    for processes in (4, 1, 2):  # a run that is stopped and goes on with another number of hosts
        hosts = [data.train_iterator(5, i, processes) for i in range(processes)]
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(10):
            parts = [next(host) for host in hosts]
            for name, whole in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)
            step += 1
        states = [json.dumps(host.get_state()) for host in hosts]
        assert len(set(states)) == 1
        state = json.loads(states[0])


@pytest.mark.parametrize("threads", [0, 3])
def test_resumed_equals_uninterrupted_across_epochs(config: ParallelText, threads: int) -> None:
    data = dataclasses.replace(config, threads=threads).open(400)
    whole = data.train_iterator(seed=2)
    batches = [next(whole) for _ in range(data.summary()["batches_per_epoch"] + 5)]
    for stop in (0, 1, len(batches) - 3):
        first = data.train_iterator(seed=2)
        for _ in range(stop):
            next(first)
        second = data.train_iterator(seed=2)
        second.set_state(first.get_state())
        for expected in batches[stop:]:
            got = next(second)
            assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_groups_do_not_cross_splits(data: ParallelData) -> None:
    pages = {s: {int(a.split()[-1]) // 5 for a, _ in data.pairs(s)} for s in ("train", "validation", "test")}
    assert not pages["train"] & pages["test"]
    assert not pages["train"] & pages["validation"]
    assert not pages["validation"] & pages["test"]
    with pytest.raises(UserError, match="no split 'dev', only train, validation, test"):
        data.pairs("dev")  # type: ignore[arg-type]


def test_the_summary_is_json_and_adds_up(data: ParallelData) -> None:
    summary = json.loads(json.dumps(data.summary()))
    dropped = sum(sum(reasons.values()) for reasons in summary["dropped"].values())
    assert sum(summary["pairs"].values()) + dropped == 300
    assert sum(bucket["train_pairs"] for bucket in summary["buckets"]) == summary["pairs"]["train"]
    assert summary["overlap"] == {"validation": 0, "test": 0}


def test_filters_drop_and_count_by_reason_and_leave_long_test_pairs(write: Write) -> None:
    lines = ["e\u0301 b\ta b\n", "\tb\n", " \tb\n", "one\ttwo three\n", "a b c d e\ta b\n", "a b\t" + "x" * 50 + " y\n"]
    own = write("x.tsv", "".join(lines))
    good = write("good.tsv", "a b\tc d\n")
    config = ParallelText(
        str(own), train=str(own), validation=str(good), test=str(own), min_words=2, max_words=4, max_length=20
    )
    data = config.open(vocab_size=260)
    assert data.summary()["dropped"]["train"] == {"empty": 2, "words": 2, "length": 1}
    assert data.pairs("train") == [("é b", "a b")]
    assert [target[:3] for _, target in data.pairs("test")] == ["a b", "xxx"]
    assert data.summary()["overlap"] == {"validation": 0, "test": 2}


def test_an_unchanged_dataset_is_not_tokenized_again(
    config: ParallelText, data: ParallelData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(examples_module, "_save", fail)
    assert config.open(400).summary() == data.summary()
    with pytest.raises(AssertionError, match="tokenized again"):
        dataclasses.replace(config, max_words=3).open(400)


def test_the_tokenizer_of_a_run_is_used_and_must_fit(config: ParallelText, data: ParallelData) -> None:
    saved = data.tokenizer.to_json()
    again = dataclasses.replace(config, min_words=2).open(1000, tokenizer_json=saved)
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"the tokenizer of the run has \d+ tokens but model\.vocab_size = 300"):
        config.open(300, tokenizer_json=saved)


def test_nothing_left_after_filtering_is_an_error(config: ParallelText) -> None:
    with pytest.raises(UserError, match=r"pairs\.tsv \(train\): no usable train pairs out of \d+ \(dropped: "):
        dataclasses.replace(config, min_words=50).open(400)


def test_a_given_file_leaves_only_the_other_split_held_out(config: ParallelText, write: Write) -> None:
    valid = str(write("v.tsv", "a\tb\n"))
    sizes = [
        {s: len(p) for s, p in open_splits(config.dataset, "en", "ko", parts).items()}  # type: ignore[arg-type]
        for parts in (
            {"train": "", "validation": "", "test": ""},
            {"train": "", "validation": valid, "test": ""},
            {"train": "", "validation": valid, "test": valid},
        )
    ]
    assert sizes == [
        {"train": 270, "validation": 15, "test": 15},
        {"train": 285, "validation": 1, "test": 15},
        {"train": 300, "validation": 1, "test": 1},
    ]
    with pytest.raises(UserError, match=r"data\.validation = 'train\[99%:\]' is no file"):
        dataclasses.replace(config, validation="train[99%:]").open(400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, r"data\.dataset is empty"),
        ({"target": "en"}, r"data\.source and data\.target are both 'en'"),
        ({"threads": -1}, r"data\.threads must not be negative, got -1"),
        ({"rows_multiple": 0}, r"data\.rows_multiple must be at least 1, got 0"),
        ({"max_length": 1}, r"data\.max_length must be at least 2"),
        ({"min_words": 3, "max_words": 2}, r"data\.max_words = 2 is less than data\.min_words = 3"),
        ({"batch_tokens": 2000}, r"data\.batch_tokens = 2000 has no room .* that takes 2048"),
        ({"bucket_lengths": (16, 8, 256)}, r"data\.bucket_lengths must be positive and ascend"),
        ({"bucket_lengths": (16, 128)}, r"must end with data\.max_length = 256, but the last is 128"),
    ],
)
def test_contradictory_values_are_refused(changes: dict[str, object], message: str) -> None:
    ParallelText("x.tsv").check()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ParallelText("x.tsv"), **changes).check()  # type: ignore[arg-type]
