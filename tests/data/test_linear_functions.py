"""Laws of the functions that are drawn, and of the estimators that a model is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from transformer_jax.data.function_baselines import function_baselines
from transformer_jax.data.linear_functions import LinearFunctions
from transformer_jax.errors import UserError

SMALL = LinearFunctions(dimension=4, points=9, batch_rows=12, rows_multiple=4, held_out_rows=1000, threads=0)


def test_data_of_one_row_is_a_function_of_seed_and_number():
    whole, halves = SMALL.open(0).train_iterator(3), [SMALL.open(0).train_iterator(3, i, 2) for i in range(2)]
    batches = [next(whole) for _ in range(3)]
    for batch in batches:
        parts = [next(half) for half in halves]
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    resumed = SMALL.open(0).train_iterator(3)
    for _ in range(2):
        next(resumed)
    state = resumed.get_state()
    again = SMALL.open(0).train_iterator(3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["inputs"], batches[2]["inputs"])
    other = next(SMALL.open(0).train_iterator(4))
    assert not np.isin(other["values"], batches[0]["values"]).any()


def test_held_out_functions_are_seen_once_and_never_trained_on():
    data = SMALL.open(0)
    splits = [list(batches) for batches in (data.validation_batches(), data.test_batches())]
    train = next(data.train_iterator(0))["values"]
    for batches in splits:
        numbers = np.concatenate([batch["example"] for batch in batches])
        np.testing.assert_array_equal(np.sort(numbers[numbers >= 0]), np.arange(1000))
        assert all((batch["segments"] == (batch["example"] >= 0)[:, None]).all() for batch in batches)
        assert not any(np.isin(train, batch["values"]).any() for batch in batches)
    assert not np.isin(splits[0][0]["values"], splits[1][0]["values"]).any()


def first(**changes):
    return next(iter(replace(SMALL, batch_rows=1000, **changes).open(0).test_batches()))


def test_kinds_differ_by_what_their_name_says():
    linear, noisy, sparse, scaled = (first(test=kind) for kind in ("linear", "noisy", "sparse", "scaled"))
    x_BPZ, y_BP = linear["inputs"].astype(float), linear["values"].astype(float)
    assert abs(x_BPZ.mean()) < 0.02
    assert abs(x_BPZ.var() - 1) < 0.03
    w_BZ = (np.linalg.pinv(x_BPZ) @ y_BP[..., None])[..., 0]
    np.testing.assert_allclose(np.einsum("BPZ,BZ->BP", x_BPZ, w_BZ), y_BP, atol=1e-4)
    assert abs(w_BZ.var() - 1) < 0.06
    np.testing.assert_array_equal(noisy["inputs"], linear["inputs"])
    assert abs((noisy["values"] - y_BP).var() - 1) < 0.05
    np.testing.assert_allclose(scaled["values"], 3 * y_BP, rtol=1e-5)
    np.testing.assert_allclose(scaled["inputs"], 3 * x_BPZ, rtol=1e-6)
    sparse_BZ = (np.linalg.pinv(x_BPZ) @ sparse["values"][..., None])[..., 0]
    assert ((np.abs(sparse_BZ) > 1e-4).sum(1) == 1).all(), "15 % of 4, at least one"
    kept = np.abs(sparse_BZ).argmax(1)
    np.testing.assert_allclose(sparse_BZ[np.arange(1000), kept], w_BZ[np.arange(1000), kept], atol=1e-4)


def test_a_curriculum_grows_and_leaves_functions_of_what_is_there():
    config = replace(SMALL, dimension=7, points=14, curriculum=2)
    iterator = config.open(0).train_iterator(0)
    sizes = []
    for _ in range(7):
        batch = next(iterator)
        used = (batch["inputs"] != 0).any((0, 1)).sum(), batch["segments"].sum(1).max()
        sizes.append(tuple(map(int, used)))
        w_BZ = (np.linalg.pinv(batch["inputs"].astype(float)) @ batch["values"][..., None])[..., 0]
        np.testing.assert_allclose(np.einsum("BPZ,BZ->BP", batch["inputs"], w_BZ), batch["values"], atol=1e-4)
    assert sizes == [(5, 11), (5, 11), (6, 13), (6, 13), (7, 14), (7, 14), (7, 14)]
    assert next(iter(config.open(0).validation_batches()))["segments"].all()


def test_estimators_err_as_theory_says():
    """Of d numbers after k examples: least squares 1 - k / d and then 0; the mean of y x (d + 1) / k."""
    scores = function_baselines(replace(SMALL, dimension=6, points=15, held_out_rows=4000).open(0))
    for k in range(15):
        error = {name: values[f"error_after_{k:02}"] for name, values in scores.items()}
        assert error["least squares"] == pytest.approx(max(1 - k / 6, 0), abs=0.05), k
        if k:
            assert error["averaging"] == pytest.approx(7 / k, rel=0.2), k
    assert scores["3 nearest"]["error_after_14"] < scores["3 nearest"]["error_after_03"]
    noisy = function_baselines(replace(SMALL, dimension=6, points=15, test="noisy").open(0))
    assert all(noisy["ridge (1)"][f"error_after_0{k}"] < noisy["least squares"][f"error_after_0{k}"] for k in (5, 6, 7))


def test_bad_settings_are_one_clear_line():
    with pytest.raises(UserError, match=r"data\.dimension must be at least 1, got 0"):
        replace(SMALL, dimension=0).check()
    with pytest.raises(UserError, match="Did you mean 'noisy'"):
        replace(SMALL, test="nosy").check()
    with pytest.raises(UserError, match=r"data\.batch_rows = 10 is no multiple"):
        replace(SMALL, batch_rows=10).check()
