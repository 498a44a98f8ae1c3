"""Timings: an interval that holds what it promises, and repeats that know when to stop."""

from __future__ import annotations

import time

import numpy as np
import pytest

from transformer_jax.bench.compare import compare, ratio
from transformer_jax.bench.timing import FEWEST, MOST, Timing, bounds, repeat
from transformer_jax.errors import UserError


@pytest.mark.parametrize("n", [6, 9, 40, 201])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    random, true = np.random.default_rng(n), np.exp(0.0)
    inside = [low <= true <= high for low, high in (bounds(random.lognormal(size=n)) for _ in range(400))]
    assert 0.92 <= np.mean(inside) <= 1.0


def test_few_repeats_say_how_sure_they_are():
    assert Timing((3.0, 1.0, 2.0)).figures()["confidence"] == 0.75
    assert Timing((3.0, 1.0, 2.0)).bounds == (1.0, 3.0)
    assert Timing(tuple(map(float, range(1, 7)))).figures()["confidence"] == 0.95
    assert bounds([5.0] * 5000) == (5.0, 5.0)


def test_repeats_end_with_the_budget_or_when_the_interval_is_narrow(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    steps = iter(np.random.default_rng(0).uniform(1.0, 2.0, 10_000))

    def vary():
        clock[0] += next(steps)

    def alike():
        clock[0] += 1.0

    assert len(repeat(alike, budget=1000).seconds) == 6
    slow = repeat(vary, budget=30, width=1e-9)
    assert 15 < len(slow.seconds) < 30  # two more were for warming up
    assert len(repeat(vary, budget=1e-3).seconds) == FEWEST
    assert len(repeat(vary, budget=1e9, width=1e-9).seconds) == MOST


def test_what_comes_before_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    assert set(repeat(lambda: spend(1), budget=100, before=lambda: spend(7)).seconds) == {1.0}


def result(seconds, **point):
    base = {"variant": "", "rows": 8, "length": 16, "hlo": "a", "step_seconds": Timing(tuple(seconds)).figures()}
    versions = {"versions": {"jax": "1"}, "time": "now", "command": ["tjax"], "load": 1}
    return {"what": "train", "points": [base | point], "provenance": versions, "config": {"x": 1}, "request": {}}


def test_a_difference_is_told_from_chance():
    random = np.random.default_rng(0)
    old, same, faster = (random.normal(m, 0.05, 60) for m in (1.0, 1.0, 0.9))
    assert ratio(faster, old)["medians"] == pytest.approx(1 / 0.9, rel=0.03)
    assert ratio(faster, old)["low"] > 1
    (point,) = compare(result(old), result(same))["points"]
    assert point["verdict"] == "no difference beyond chance"
    (point,) = compare(result(old), result(faster))["points"]
    assert point["verdict"] == "faster"
    (point,) = compare(result(faster), result(old))["points"]
    assert point["verdict"] == "slower"


def test_chance_is_found_as_often_as_it_should():
    random = np.random.default_rng(1)
    p = [ratio(*random.normal(1.0, 0.1, (2, 25)))["p"] for _ in range(60)]
    assert np.mean(np.asarray(p) < 0.05) < 0.15


def test_hints_name_what_was_different():
    new = result([1.0] * 9, hlo="b")
    new["provenance"] = {
        "versions": {"jax": "2"},
        "time": "later",
        "command": ["tjax", "x"],
        "flags": {"XLA_FLAGS": "f"},
    }
    found = compare(result([1.0] * 9), new)
    assert found["changed"] == {
        "provenance.flags.XLA_FLAGS": "(absent) -> f",
        "provenance.versions.jax": "1 -> 2",
    }
    assert found["points"][0]["same_program"] is False


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match=r"no batch and length in common"):
        compare(result([1.0] * 9), result([1.0] * 9, rows=16))
    with pytest.raises(UserError, match=r"one is of 'train' and the other of 'data'"):
        compare(result([1.0] * 9), result([1.0] * 9) | {"what": "data"})
