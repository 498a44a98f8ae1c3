from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data.packed import PackedData, PackedText
from transformer_jax.data.row_plan import RowPlan, shares
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
T, ROWS = 12, 4


def _jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def _documents(count: int, word: str, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{word}{i} " + "é🙂 " * int(rng.integers(0, 15)) for i in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    folder = tmp_path_factory.mktemp("packed")
    held = _jsonl(folder / "held.jsonl", _documents(7, "d", seed=1))
    train = _jsonl(folder / "train.jsonl", ["", *_documents(40, "d"), " "])
    settings = {"validation": held, "test": held, "tokenizer": "characters"}
    return PackedText(train, context=T, batch_rows=ROWS, rows_multiple=2, threads=0, **settings)


@pytest.fixture(scope="module")
def data(config: PackedText) -> PackedData:
    return config.open(60)


def _epoch(data: PackedData, seed: int, number: int = 0) -> dict[str, np.ndarray]:
    """Return the rows of one epoch, whose number of batches need not be whole."""
    rows = data.summary()["mixture"][0]["rows_per_epoch"]
    batches = data.train_iterator(seed)
    wanted = [next(batches) for _ in range(-(-rows * (number + 1) // ROWS))]
    return {
        name: np.concatenate([batch[name] for batch in wanted])[number * rows : (number + 1) * rows]
        for name in wanted[0]
    }


def _pieces(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (inputs, targets, positions) of every stretch of one document in a row."""
    return [
        tuple(batch[name][row][segments == segment].tolist() for name in ("tokens", "targets", "positions"))
        for row, segments in enumerate(batch["segments"])
        for segment in range(1, segments.max() + 1)
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_every_target_is_seen_exactly_once_per_epoch_and_follows_its_input(data: PackedData, number: int) -> None:
    batch = _epoch(data, seed=3, number=number)
    expected: Counter[tuple[int, int]] = Counter()
    for text in _documents(40, "d"):
        (ids,) = data.tokenizer.encode_batch([text])
        expected.update(zip([2, *ids], [*ids, 2], strict=True))
    assert np.array_equal(batch["targets"] >= 0, batch["segments"] > 0)
    seen = Counter(pair for inputs, targets, _ in _pieces(batch) for pair in zip(inputs, targets, strict=True))
    assert seen == expected
    assert seen.total() == data.summary()["targets"]["train"]
    assert (batch["segments"] == 0).sum() < T  # only the last row of an epoch is filled up
    assert batch["bytes"].sum() == data.summary()["bytes"]["train"] == len("".join(_documents(40, "d")).encode())


def test_no_piece_crosses_a_document_and_positions_begin_anew(data: PackedData) -> None:
    batch = _epoch(data, seed=3)
    spelled = [[2, *ids, 2] for ids in data.tokenizer.encode_batch(_documents(40, "d"))]
    for inputs, targets, positions in _pieces(batch):
        assert positions == list(range(len(inputs)))
        assert inputs[1:] == targets[:-1]
        whole = [inputs[0], *targets]
        assert any(whole == ids[i : i + len(whole)] for ids in spelled for i in range(len(ids)))
        assert 2 not in whole[1:-1]


def test_a_row_names_the_document_it_begins_in(data: PackedData) -> None:
    batch = _epoch(data, seed=1)
    for row, example in enumerate(batch["example"]):
        begins = data.tokenizer.decode(batch["targets"][row][batch["segments"][row] == 1])
        assert begins in data.text(example)


def test_without_separation_a_row_is_one_text(config: PackedText, data: PackedData) -> None:
    together = next(dataclasses.replace(config, separate=False).open(60).train_iterator(5))
    apart = next(data.train_iterator(5))
    assert np.array_equal(together["tokens"], apart["tokens"])
    assert np.array_equal(together["targets"], apart["targets"])
    assert set(together["segments"].ravel()) == {1}
    assert "positions" not in together


def test_one_long_document_is_cut_elsewhere_in_every_epoch(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(5 * T))
    (tmp_path / "a.txt").write_text(text)
    held = str(tmp_path / "a.txt")
    config = PackedText(
        held, context=T, batch_rows=1, rows_multiple=1, tokenizer="characters", validation=held, test=held
    )
    data = config.open(80)
    assert data.summary()["mixture"][0]["rows_per_epoch"] == 6
    batches = data.train_iterator(0)
    starts = [{int(next(batches)["tokens"][0, 0]) for _ in range(6)} for _ in range(5)]
    assert len(set(map(frozenset, starts))) > 2


def test_validation_and_test_show_every_row_once_in_order(config: PackedText, data: PackedData) -> None:
    for processes in (1, 2):
        parts = [list(data.validation_batches(i, processes)) for i in range(processes)]
        rows = [
            row for batches in zip(*parts, strict=True) for b in batches for row in b["targets"] if (row >= 0).any()
        ]
        text = [int(token) for row in rows for token in row if token >= 0]
        assert data.tokenizer.decode(text, stop=False) == "".join(_documents(7, "d", seed=1))
    test = [row for batch in data.test_batches() for row in batch["tokens"]]
    assert np.array_equal(test, [row for batch in data.validation_batches() for row in batch["tokens"]])
    empty = np.concatenate([b["example"] for b in data.validation_batches()]) < 0
    assert not np.concatenate([b["segments"] for b in data.validation_batches()])[empty].any()
    few = list(dataclasses.replace(config, validation_rows=3).open(60).validation_batches())
    assert [batch["tokens"].shape for batch in few] == [(4, T)]
    assert (few[0]["example"] >= 0).sum() == 3


def _mixture(tmp_path: Path, **more: object) -> PackedData:
    names = [
        _jsonl(tmp_path / f"{word}.jsonl", _documents(count, word)) for word, count in (("a", 30), ("b", 50), ("c", 9))
    ]
    dataset = ",".join(f"{name}:{weight}" for name, weight in zip(names, ("0.5", "0.3", "0.2"), strict=True))
    held = {"validation": names[0], "test": names[0]}
    return PackedText(dataset, context=T, batch_rows=10, rows_multiple=2, tokenizer="characters", **held, **more).open(
        60
    )  # type: ignore[arg-type]


def test_the_shares_of_a_mixture_follow_the_weights(tmp_path: Path) -> None:
    data = _mixture(tmp_path)
    batches = data.train_iterator(0)
    seen: Counter[str] = Counter()
    for step in range(1, 31):
        seen.update(data.text(example)[0] for example in next(batches)["example"])
        rows = 10 * step
        assert all(abs(seen[word] - share * rows) <= 1 for word, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**12))
def test_shares_add_up_never_shrink_and_are_within_one_row(weights: list[int], rows: int) -> None:
    exact = [Fraction(weight, sum(weights)) for weight in weights]
    now, after = shares(exact, rows), shares(exact, rows + 1)
    assert sum(now) == rows
    assert sum(after) == rows + 1
    assert all(b >= a for a, b in zip(now, after, strict=True))
    assert all(abs(n - w * rows) < len(weights) for n, w in zip(now, exact, strict=True))


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_the_order_does_not_depend_on_the_number_of_hosts_and_resumes_anywhere(
    data: PackedData, tmp_path: Path, kind: str
) -> None:
    opened = data if kind == "plain" else _mixture(tmp_path, ramp=((4, 3), (6, 9)))
    alone = opened.train_iterator(seed=5)
    expected = [next(alone) for _ in range(40)]
    if kind == "mixture":
        assert [len(batch["example"]) for batch in expected] == [4] * 3 + [6] * 9 + [10] * 28
    step, state = 0, None
    for processes, steps in ((2, 8), (1, 3), (2, 29)):
        hosts = [opened.train_iterator(5, i, processes) for i in range(processes)]
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(steps):
            parts = [next(host) for host in hosts]
            for name, whole in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)
            step += 1
        state = json.loads(json.dumps(hosts[0].get_state()))


def test_a_ramp_is_found_without_iterating() -> None:
    plan = RowPlan([Fraction(1)], 32, ((8, 5), (16, 2)))
    rows = [len(plan[step][1]) for step in range(10)]
    assert rows == [8] * 5 + [16] * 2 + [32] * 3
    assert np.concatenate([plan[step][1] for step in range(10)]).tolist() == list(range(sum(rows)))
    assert plan[10**9][1][0] == 40 + 32 + (10**9 - 7) * 32


def test_seed_and_epoch_change_the_order(data: PackedData) -> None:
    def first(seed: int, number: int) -> tuple[int, ...]:
        return tuple(_epoch(data, seed, number)["example"])

    assert len({first(0, 0), first(1, 0), first(0, 1)}) == 3
    # Pinned: an upgrade of NumPy or of this library must not change the order of a run that resumes.
    assert first(0, 0)[:6] == (20, 0, 10, 9, 19, 17)


def test_the_shapes_of_a_batch_are_known_without_data(config: PackedText, data: PackedData) -> None:
    shapes = dataclasses.replace(config, dataset="absent.txt").batch_shapes()
    assert {name: (a.shape, a.dtype.name) for name, a in next(data.train_iterator(0)).items()} == shapes
    assert dataclasses.replace(config, ramp=((6, 1),)).batch_shapes()["tokens"] == ((6, T), "int32")


def test_the_summary_is_json_and_adds_up(data: PackedData) -> None:
    summary = json.loads(json.dumps(data.summary()))
    assert summary["documents"] == {"train": 40, "validation": 7, "test": 7}
    assert summary["empty"]["train"] == 0  # what has no text never becomes a document
    assert summary["targets"]["train"] == summary["tokens"]["train"] + 40
    assert summary["overlap"] == {"validation": 0, "test": 0}
    assert data.describe().startswith(f"data: 40 documents, {summary['tokens']['train']:,} tokens, ")


def test_held_out_documents_that_are_trained_on_are_counted(config: PackedText) -> None:
    data = dataclasses.replace(config, validation=config.dataset).open(60)
    assert data.summary()["overlap"]["validation"] == 40
    assert data.describe().endswith("; 40 held-out documents are also in training")


def test_bpe_is_trained_on_the_training_documents_alone(config: PackedText) -> None:
    data = dataclasses.replace(config, tokenizer="").open(300)
    assert data.tokenizer.vocab_size <= 300
    assert data.summary()["bytes"]["train"] == len("".join(_documents(40, "d")).encode())
    again = dataclasses.replace(config, tokenizer="", context=5).open(400, tokenizer_json=data.tokenizer.to_json())
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"the tokenizer of the run has \d+ tokens but model\.vocab_size = 100"):
        config.open(100, tokenizer_json=data.tokenizer.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": ""}, r"data\.dataset is empty"),
        ({"context": 0}, r"data\.context must be at least 1, got 0"),
        ({"batch_rows": 7}, r"data\.batch_rows = 7 is no multiple of data\.rows_multiple = 2"),
        ({"ramp": ((3, 5),)}, r"data\.ramp = 3 is no multiple of data\.rows_multiple = 2"),
        ({"ramp": ((2, 0),)}, r"data\.ramp: 2 rows for 0 steps"),
        ({"tokenizer": "none.json"}, r"none\.json: cannot read the tokenizer"),
        ({"test": "absent.txt"}, r"absent\.txt: there is no such file"),
    ],
)
def test_bad_settings_are_explained(config: PackedText, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change).open(60)  # type: ignore[arg-type]
