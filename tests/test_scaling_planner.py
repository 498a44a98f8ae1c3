"""Laws of the planner and of the decisions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.surface import SURFACES, iso_flops, noisy
from tests.test_scaling_approaches import table_of
from transformer_jax.errors import UserError
from transformer_jax.scaling.approaches import Settings, estimate
from transformer_jax.scaling.bootstrap import interval, weights
from transformer_jax.scaling.decide import at_ratios, decision, other_splits
from transformer_jax.scaling.fit import fit, refit
from transformer_jax.scaling.laws import frontier, predict
from transformer_jax.scaling.planner import Belief, cheapest_grid
from transformer_jax.scaling.runs import Points

pytestmark = pytest.mark.optimised  # fits by the hundred

LAW, THETA = SURFACES["A3"]


@pytest.fixture(scope="module")
def runs():
    return noisy(iso_flops(LAW, THETA, first=1e11, budgets=4, sizes=6), 0.004, 0)


@pytest.fixture(scope="module")
def found(runs):
    return estimate("A3", table_of(runs), Settings(bootstraps=800))


def test_the_update_is_that_of_linear_regression():
    """On a linear model the expected variance equals the one computed with the new row in the design."""
    rng = np.random.default_rng(0)
    X, sigma2 = rng.standard_normal((12, 3)), 0.3
    goal, candidates = np.array([1.0, -2.0, 0.5]), rng.standard_normal((4, 3))
    rows = np.vstack([goal, candidates])
    prior = sigma2 * np.linalg.inv(X.T @ X)
    belief = Belief(1.0, rows @ prior @ rows.T, sigma2, np.arange(1.0, 5.0), np.arange(1.0, 5.0))
    for i, row in enumerate(candidates):
        exact = sigma2 * goal @ np.linalg.inv(X.T @ X + np.outer(row, row)) @ goal
        assert belief.after(i).covariance[0, 0] == pytest.approx(exact)
    best = belief.ranking()[0]
    assert best.width == pytest.approx(min(belief.after(i).width for i in range(4)))
    # And after two runs, in either order.
    both = sigma2 * goal @ np.linalg.inv(X.T @ X + candidates[:2].T @ candidates[:2]) @ goal
    assert belief.after(0).after(1).covariance[0, 0] == pytest.approx(both)
    assert belief.after(1).after(0).covariance[0, 0] == pytest.approx(both)


def width_with(runs, new, copies_seed=0):
    """Width of the interval of a once a run (its loss that of the surface) has been added."""
    N, D = np.array([new.N]), np.array([new.D])
    loss = np.exp(predict(LAW, THETA[None], N, D))[0]
    added = Points(
        *(
            np.append(getattr(runs, k), v)
            for k, v in zip(("run", "N", "D", "C", "loss"), (99, N, D, 6 * N * D, loss), strict=True)
        )
    )
    fitted = fit(LAW, added.N, added.D, added.loss, every=9)
    # The new run is in every resample: what is asked is what is known once it is there.
    weight = np.concatenate([weights(runs, "run", 800, copies_seed), np.ones((800, 1))], 1)
    low, high = interval(frontier(LAW, refit(fitted, added.N, added.D, added.loss, weight)).a)
    return high - low


def test_the_first_of_the_ranking_shrinks_the_interval_and_the_last_does_not(runs, found):
    belief = Belief.of(found, runs, "exponent", 0.0, budget=4e13)
    ranking = belief.ranking()
    widths = [candidate.width for candidate in ranking]
    assert (np.diff(widths) > -1e-3 * belief.width).all()  # equal to four digits, the cheaper comes first
    assert ranking[0].shrinks > 0.05
    assert max(candidate.C for candidate in ranking) <= 4e13 * 1.0001
    assert width_with(runs, ranking[0]) < 0.97 * belief.width
    assert width_with(runs, ranking[0]) < width_with(runs, ranking[-1])


def test_a_loss_to_predict_wants_another_run_than_the_exponent(runs, found):
    loss = Belief.of(found, runs, "loss", 1e16, budget=4e13).ranking()[0]
    exponent = Belief.of(found, runs, "exponent", 0.0, budget=4e13).ranking()[0]
    assert (loss.N, loss.D) != (exponent.N, exponent.D)


def test_the_grid_is_paid_for_and_shares_its_trunks(runs, found):
    belief = Belief.of(found, runs, "exponent", 0.0, budget=4e13)
    bought = cheapest_grid(belief, width=0.7 * belief.width, budget=4e13)
    widths = [belief.width, *(run.width for run in bought)]
    assert all(after <= before for before, after in itertools.pairwise(widths))
    assert widths[-1] <= 0.7 * belief.width < widths[-2]
    assert len({(run.N, run.D) for run in bought}) == len(bought)
    assert sum(run.cost for run in bought) <= 4e13
    for i, run in enumerate(bought):
        shared = any(other.N == run.N for other in bought[:i])
        assert run.cost < 6 * run.N * run.D if shared else run.cost == pytest.approx(6 * run.N * run.D)
    assert cheapest_grid(belief, width=2 * belief.width, budget=4e13) == []
    assert sum(run.cost for run in cheapest_grid(belief, width=1e-9, budget=1e13)) <= 1e13


def test_no_plan_without_a_run_near_the_table(runs, found):
    with pytest.raises(UserError, match="buys no run near the table"):
        Belief.of(found, runs, "exponent", 0.0, budget=1e3)
    with pytest.raises(UserError, match="--budget must be positive"):
        Belief.of(found, runs, "exponent", 0.0, budget=0.0)
    tied = estimate("over-training", table_of(runs), Settings(bootstraps=60))
    with pytest.raises(UserError, match="fixes the target by its form"):
        Belief.of(tied, runs, "exponent", 0.0, budget=4e13)


def test_a_decision_spends_the_budget_and_brackets_the_truth(found):
    C = 1e15
    what = decision(found, C)
    assert 6 * what["N"]["value"] * what["D"]["value"] == pytest.approx(C)
    best = frontier(LAW, THETA[None]).N(C)
    loss = float(np.exp(predict(LAW, THETA[None], best, C / 6 / best))[0, 0])
    for value, truth in ((what["N"], best[0]), (what["loss"], loss)):
        assert value["run"][0] < truth < value["run"][1]
    law, one = what["loss"]["run"], what["loss"]["new_run"]
    assert one[1] - one[0] > law[1] - law[0]  # a new run scatters around the law


def test_other_splits_cost_more_the_farther_they_are(found):
    rows = {row["factor"]: row for row in other_splits(found, 1e15)}
    assert rows[0.1]["wasted"]["value"] > rows[0.25]["wasted"]["value"] > rows[0.5]["wasted"]["value"] > 0
    assert rows[10.0]["loss_above_best"] > rows[4.0]["loss_above_best"] > rows[2.0]["loss_above_best"] > 0
    assert all(6 * row["N"] * row["D"] == pytest.approx(1e15) for row in rows.values())


def test_over_trained_runs_lose_more_the_longer_they_are(found):
    rows = at_ratios(found, 1e15)
    best = decision(found, 1e15)["loss"]["value"]
    losses = [row["loss"]["value"] for row in rows if row["tokens_per_parameter"] >= 80]
    assert losses == sorted(losses)
    assert all(loss > best for loss in losses)
    assert all(row["D"] / row["N"] == pytest.approx(row["tokens_per_parameter"]) for row in rows)


def test_settings_that_mean_nothing_are_refused():
    for change in ({"delta": 0.0}, {"bootstraps": 3}, {"isoflop_width": 1.0}):
        with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} must be"):
            replace(Settings(), **change).check()
