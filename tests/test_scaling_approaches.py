"""Laws of approaches 1 and 2 and of the resampling: known exponents come out, and no edge passes for an optimum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.surface import SURFACES, iso_flops, noisy
from transformer_jax.errors import UserError
from transformer_jax.scaling.approaches import Settings, estimate
from transformer_jax.scaling.bootstrap import interval, weights
from transformer_jax.scaling.envelope import Envelope
from transformer_jax.scaling.isoflop import IsoFlops
from transformer_jax.scaling.laws import frontier, predict
from transformer_jax.scaling.runs import Points, Table

pytestmark = pytest.mark.optimised  # fits by the hundred

LAW, THETA = SURFACES["A3"]
TRUE_A = float(frontier(LAW, THETA).a)


def table_of(curves: Points) -> Table:
    names = [f"r{i}" for i in range(int(curves.run.max()) + 1)]
    return Table(Path("t.csv"), names, curves, curves.take(curves.last_of_each()), {}, [], [])


def training_curves(sizes: np.ndarray, rows: int = 40) -> Points:
    """One run a size, at a constant learning rate: its loss at every D is that of the surface."""
    N = np.repeat(sizes, rows)
    D = np.concatenate([np.geomspace(2, 400, rows) * size for size in sizes])
    return Points(np.repeat(np.arange(len(sizes)), rows), N, D, 6 * N * D, np.exp(predict(LAW, THETA[None], N, D))[0])


def test_parabolas_find_the_exponent_of_even_grids():
    found = IsoFlops.of(iso_flops(LAW, THETA, first=1e11), width=1.25)
    assert len(found.budgets) == 6
    # A constant bias of N* from the shape of the parabola leaves the exponent alone.
    assert found.line().a[0] == pytest.approx(TRUE_A, abs=1e-9)


def test_budgets_are_not_rounded():
    """1.0e11 and 1.4e11 have the same first digit and are two budgets."""
    runs = iso_flops(LAW, THETA, first=1e11, budgets=1, sizes=7)
    other = iso_flops(LAW, THETA, first=1.4e11, budgets=1, sizes=7)
    both = Points(*(np.concatenate([getattr(p, k) for p in (runs, other)]) for k in ("run", "N", "D", "C", "loss")))
    found = IsoFlops.of(both, width=1.25)
    np.testing.assert_allclose([budget.C for budget in found.budgets], [1e11, 1.4e11])


def test_uneven_flops_within_a_budget_are_allowed_for():
    """As in points read off a figure: without the term for C the minimum would be off."""
    even = iso_flops(LAW, THETA, first=1e11, sizes=9)
    jitter = np.exp(np.random.default_rng(0).uniform(-0.1, 0.1, len(even)))
    D = even.D * jitter
    uneven = Points(even.run, even.N, D, even.C * jitter, np.exp(predict(LAW, THETA[None], even.N, D))[0])
    found = IsoFlops.of(uneven, width=1.25)
    assert len(found.budgets) == 6
    assert found.line().a[0] == pytest.approx(TRUE_A, abs=0.01)


def test_only_interior_minima_count_and_every_rejection_has_its_reason():
    good = iso_flops(LAW, THETA, first=1e11, budgets=2, sizes=5)
    side = iso_flops(LAW, THETA, first=1e14, budgets=1, sizes=5)
    left_of_it = Points(
        side.run, side.N / 30, side.D * 30, side.C, np.exp(predict(LAW, THETA[None], side.N / 30, side.D * 30))[0]
    )
    few = iso_flops(LAW, THETA, first=1e15, budgets=1, sizes=2)
    hill = iso_flops(LAW, THETA, first=1e16, budgets=1, sizes=5)
    hill = Points(hill.run, hill.N, hill.D, hill.C, 5 - hill.loss)
    parts = (good, left_of_it, few, hill)
    runs = Points(*(np.concatenate([getattr(p, k) for p in parts]) for k in ("run", "N", "D", "C", "loss")))
    verdicts = [budget.rejected for budget in IsoFlops.of(runs, width=1.25).budgets]
    assert verdicts[:2] == ["", ""]
    assert "lies outside the sizes trained" in verdicts[2]
    assert verdicts[3] == "2 model sizes; a parabola takes 3"
    assert verdicts[4] == "the parabola opens downward: it has no minimum"
    # The line goes through the accepted ones alone.
    assert IsoFlops.of(runs, 1.25).line().a[0] == pytest.approx(IsoFlops.of(good, 1.25).line().a[0], abs=1e-12)
    with pytest.raises(UserError, match="A2 needs two budgets with an interior minimum: there are none, of 3 groups"):
        IsoFlops.of(runs.take(np.arange(10, 22)), 1.25)


def test_a_resample_of_parabolas_is_a_fit_of_the_repeated_runs():
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=7), 0.003, 0)
    weight = weights(runs, "run", 50, seed=1)
    lines = IsoFlops.of(runs, 1.25).lines(weight)
    for b in (3, 17):
        repeated = runs.take(np.repeat(np.arange(len(runs)), weight[b].astype(int)))
        assert lines.a[b] == pytest.approx(IsoFlops.of(repeated, 1.25).line().a[0], rel=1e-9)


def test_the_envelope_finds_the_exponent():
    found = Envelope.of(table_of(training_curves(np.geomspace(1e4, 1e8, 25))))
    assert found.line().a[0] == pytest.approx(TRUE_A, abs=0.01)
    curves = noisy(training_curves(np.geomspace(1e4, 1e8, 25)), 0.002, 3)
    noisy_one = estimate("A1", table_of(curves), Settings(bootstraps=60))
    assert noisy_one.values["a"] == pytest.approx(TRUE_A, abs=0.03)  # the least of noisy losses is the luckiest
    low, high = noisy_one.intervals("run")["a"]
    assert low < noisy_one.values["a"] < high


def test_edges_of_the_envelope_do_not_count():
    sizes = np.geomspace(1e4, 1e7, 7)
    found = Envelope.of(table_of(training_curves(sizes)))
    assert {float(np.exp(found.log_N[run])) for run in found.best[found.best >= 0]}.isdisjoint({sizes[0], sizes[-1]})
    assert sum(found.rejected.values()) + (found.best >= 0).sum() == len(found.best)
    with pytest.raises(UserError, match="envelope on which at least two sizes are best"):
        Envelope.of(table_of(training_curves(sizes[:2])))
    with pytest.raises(UserError, match="A1 needs training curves"):
        Envelope.of(table_of(iso_flops(LAW, THETA, first=1e11)))


def test_resampling_draws_runs_or_whole_sizes():
    points = iso_flops(LAW, THETA, first=1e11, budgets=3, sizes=4)
    points = Points(points.run, np.tile([1e5, 2e5, 4e5, 8e5], 3), points.D, points.C, points.loss)
    by_run, by_size = (weights(points, kind, 40, seed=0) for kind in ("run", "size"))
    assert (by_run.sum(1) == 12).all()
    assert (by_size.sum(1) == 12).all()
    for size in range(4):
        rows = by_size[:, points.size == size]
        assert (rows == rows[:, :1]).all()
    assert (np.ptp(by_run, axis=1) > 0).any()
    np.testing.assert_array_equal(by_run, weights(points, "run", 40, seed=0))
    assert not np.array_equal(by_run, weights(points, "run", 40, seed=1))


def test_an_interval_needs_half_of_its_resamples():
    assert interval(np.arange(1001.0)) == pytest.approx([25, 975])
    assert interval(np.array([1.0, 2.0, 3.0, np.nan])) is not None
    assert interval(np.array([1.0, np.nan, np.nan])) is None


@pytest.mark.parametrize("name", SURFACES)
def test_every_form_recovers_the_exponent_of_its_own_surface(name):
    law, theta = SURFACES[name]
    runs = noisy(iso_flops(law, theta, first=1e11), 0.002, 5)
    found = estimate(name, table_of(runs), Settings(bootstraps=100))
    truth = float(frontier(law, theta).a)
    low, high = found.intervals("run")["a"]
    assert low - 1e-9 <= truth <= high + 1e-9
    assert found.lost("run") == 0
