"""Laws of the fitter: it finds known surfaces at any scale, ends at an optimum, and its intervals cover the truth."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.surface import SURFACES, iso_flops, noisy
from transformer_jax.errors import UserError
from transformer_jax.scaling.bootstrap import interval, weights
from transformer_jax.scaling.fit import Centred, fit, refit
from transformer_jax.scaling.forms import CHINCHILLA
from transformer_jax.scaling.laws import frontier, predict, wasted
from transformer_jax.scaling.minimise import minimise
from transformer_jax.scaling.runs import Points
from transformer_jax.scaling.scipy_loop import scipy_loop
from transformer_jax.scaling.table import TableOptions, read_table

every_form = pytest.mark.parametrize("name", SURFACES)
pytestmark = pytest.mark.optimised  # fits by the hundred

LAW, THETA = SURFACES["A3"]


@every_form
def test_a_surface_without_noise_is_found_exactly(name):
    law, theta = SURFACES[name]
    runs = iso_flops(law, theta, first=1e11, budgets=4, sizes=5)
    found = fit(law, runs.N, runs.D, runs.loss, every=5)
    np.testing.assert_allclose(found.theta, theta, rtol=1e-6)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-9)


def test_the_fit_is_the_same_at_any_scale_and_unit_of_loss():
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6), 0.01, 0)
    here = fit(LAW, runs.N, runs.D, runs.loss, every=9)
    there = fit(LAW, runs.N * 1e7, runs.D * 1e8, runs.loss / np.log(2), every=9)  # 1e26 FLOPs, bits
    np.testing.assert_allclose(there.theta[[1, 3]], here.theta[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(there.theta[4], here.theta[4] - np.log(np.log(2)), rtol=1e-6)
    assert there.reached == here.reached
    np.testing.assert_allclose(there.objective, here.objective, rtol=1e-9)


def test_no_other_optimiser_goes_lower():
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6), 0.01, 1)
    found = fit(LAW, runs.N, runs.D, runs.loss, every=9)
    other = scipy_loop(runs.N, runs.D, runs.loss, timed=6)
    assert found.objective <= other.objective * (1 + 1e-9)
    np.testing.assert_allclose(found.theta, other.theta, rtol=1e-4)
    assert (found.starts, other.starts) == (500, 4500)  # Hoffmann 2022, D.3


def test_the_rest_of_the_library_keeps_its_precision():
    runs = iso_flops(LAW, THETA, first=1e11, budgets=3, sizes=5)
    fit(LAW, runs.N, runs.D, runs.loss, every=99)
    assert jnp.ones(3).dtype == jnp.float32


def test_a_resample_is_a_fit_of_the_repeated_runs():
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6), 0.01, 2)
    found = fit(LAW, runs.N, runs.D, runs.loss, every=9)
    weight = weights(runs, "run", 3, seed=0)
    again = refit(found, runs.N, runs.D, runs.loss, weight)
    repeated = runs.take(np.repeat(np.arange(len(runs)), weight[1].astype(int)))
    np.testing.assert_allclose(again[1], fit(LAW, repeated.N, repeated.D, repeated.loss, every=9).theta, rtol=1e-4)


@every_form
def test_the_frontier_is_the_minimum_and_waste_is_what_the_best_split_saves(name):
    law, theta = SURFACES[name]
    C = 3e13
    best = frontier(law, theta[None]).N(C)

    def loss(N, C):
        return predict(law, theta[None], np.atleast_1d(N), C / 6 / np.atleast_1d(N))[0]

    assert loss(best, C) < min(loss(best * 1.05, C), loss(best / 1.05, C))
    N = 5 * best
    share = wasted(law, theta[None], N, C / 6 / N)[0]
    left = C * (1 - share)
    np.testing.assert_allclose(loss(frontier(law, theta[None]).N(left), left), loss(N, C), rtol=1e-10)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(0, 4), "has 5 parameters and needs 6 runs: there are 4, so 2 more"),
        (slice(0, 24, 6), "so 2 more"),
    ],
)
def test_too_few_runs_say_how_many_more(rows, message):
    runs = iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6).take(np.arange(24)[rows])
    with pytest.raises(UserError, match=message):
        fit(LAW, runs.N, runs.D, runs.loss)


def test_one_size_or_one_ratio_determine_nothing():
    D = np.geomspace(1e6, 1e9, 12)
    with pytest.raises(UserError, match="A3 needs 3 different model sizes N: there is 1 only"):
        fit(LAW, np.full(12, 1e6), D, 2 + 1e3 / D**0.5)
    with pytest.raises(UserError, match="cannot tell N from D"):
        fit(LAW, D / 20, D, 2 + 1e3 / D**0.5)


def test_intervals_cover_the_truth():
    """95 % intervals cover it in at least 90 % of 200 draws of 36 runs."""
    draws, resamples, sigma = 200, 200, 0.005
    runs = iso_flops(LAW, THETA, first=1e11, budgets=6, sizes=6)
    rng = np.random.default_rng(0)
    table = Centred.of(runs.N, runs.D, runs.loss)
    y = table.y + sigma * rng.standard_normal((draws, len(runs)))
    start = np.broadcast_to(table.into(LAW, THETA), (draws, 5))
    points = minimise(LAW, start, table.n, table.d, y, np.ones(len(runs)), 1e-3)
    weight = np.concatenate([weights(runs, "run", resamples, seed) for seed in range(draws)])
    begin, losses = (np.repeat(array, resamples, axis=0) for array in (points.theta, y))
    found = minimise(LAW, begin, table.n, table.d, losses, weight, 1e-3)
    assert found.converged.mean() > 0.999
    C, truth = 100 * runs.C.max(), frontier(LAW, THETA[None])

    def quantities(theta):
        line = frontier(LAW, theta)
        return {
            "alpha": theta[..., 1],
            "beta": theta[..., 3],
            "E": theta[..., 4],
            "a": line.a,
            "log N*": np.log(line.N(C)),
        }

    true = {"alpha": THETA[1], "beta": THETA[3], "E": THETA[4], "a": truth.a[0], "log N*": np.log(truth.N(C)[0])}
    estimates = quantities(table.out(LAW, points.theta))
    for name, samples in quantities(table.out(LAW, found.theta).reshape(draws, resamples, 5)).items():
        low, high = np.array([interval(row) for row in samples]).T
        covered = np.mean((low <= true[name]) & (true[name] <= high))
        assert covered >= 0.90, (name, covered)
        # Nor are they wide for nothing: twice what the scatter of the estimates calls for at most.
        assert np.median(high - low) < 2 * 2 * 1.96 * estimates[name].std(), name


@pytest.fixture(scope="module")
def epoch() -> Points:
    """Chinchilla's runs as Epoch AI read them off its figure 4, the five highest losses dropped."""
    named = os.environ.get("TJAX_EPOCH_POINTS", "data/chinchilla_points_epoch.csv")
    if not Path(named).is_file():
        pytest.skip(
            "TJAX_EPOCH_POINTS does not name Epoch AI's table of Chinchilla's runs (chinchilla_points_epoch.csv)"
        )
    options = TableOptions(n="Model Size", c="Training FLOP", loss="loss", drop_highest_loss=5)
    table = read_table(Path(named), options)
    assert (len(table.rows), len(table.runs)) == (245, 240)
    return table.runs


@pytest.mark.slow
def test_chinchilla_refitted_30_times_faster_than_the_loop(epoch):
    """Besiroglu 2024: E 1.8169 (0.0257), alpha 0.3478 (0.0154), beta 0.3658 (0.0206)."""
    found = fit(CHINCHILLA, epoch.N, epoch.D, epoch.loss)
    E, alpha, beta = np.exp(found.theta[4]), found.theta[1], found.theta[3]
    assert (round(E, 3), round(alpha, 3), round(beta, 3)) == (1.817, 0.347, 0.367)
    assert round(float(frontier(CHINCHILLA, found.theta).a), 3) == 0.514
    assert found.objective == pytest.approx(0.00101827, rel=1e-5)
    # 60 of the 4,500 starts are timed, and extrapolated; `tjax fit --scipy-starts 4500` times all.
    loop = scipy_loop(epoch.N, epoch.D, epoch.loss, timed=60)
    assert loop.extrapolated > 30 * found.seconds
    theta = refit(found, epoch.N, epoch.D, epoch.loss, weights(epoch, "run", 4000, seed=0))
    for column, (low, high) in {1: (0.315, 0.371), 3: (0.337, 0.420)}.items():
        assert interval(theta[:, column]) == pytest.approx([low, high], abs=0.008)
    assert interval(np.exp(theta[:, 4])) == pytest.approx([1.773, 1.875], abs=0.008)


@pytest.mark.slow
def test_the_mean_of_huber_at_default_tolerance_stops_elsewhere(epoch):
    """The negative control: what went wrong in print goes wrong here, so the sum and its tolerance matter."""
    found = scipy_loop(epoch.N, epoch.D, epoch.loss, timed=640, mean=True, options={})
    alpha, beta = found.theta[1], found.theta[3]
    assert beta / (alpha + beta) < 0.48
    assert found.objective > 1.03 * 0.00101827
