"""What a model that learns functions in context has to beat: estimators of statistics (Garg 2022, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transformer_jax.data.linear_functions import FunctionData

Numbers = NDArray[np.float64]
Estimator = Callable[[Numbers, Numbers, Numbers], Numbers]
"""(inputs [B, K, Z], values [B, K], input [B, Z]) -> what the value of that input is, [B]."""

NEIGHBOURS: Final = 3


def least_squares(inputs_BKZ: Numbers, values_BK: Numbers, input_BZ: Numbers) -> Numbers:
    """Answer by the smallest weights of the least squared error; without noise nothing is better."""
    return np.einsum("BZ,BZK,BK->B", input_BZ, np.linalg.pinv(inputs_BKZ), values_BK)


def ridge(inputs_BKZ: Numbers, values_BK: Numbers, input_BZ: Numbers) -> Numbers:
    """Answer by ridge regression of penalty 1: the best there is for noise of variance 1 (Bayes)."""
    gram_BZZ = np.einsum("BKZ,BKY->BZY", inputs_BKZ, inputs_BKZ) + np.eye(inputs_BKZ.shape[2])
    w_BZ = np.linalg.solve(gram_BZZ, np.einsum("BKZ,BK->BZ", inputs_BKZ, values_BK)[..., None])[..., 0]
    return np.einsum("BZ,BZ->B", input_BZ, w_BZ)


def nearest_neighbours(inputs_BKZ: Numbers, values_BK: Numbers, input_BZ: Numbers) -> Numbers:
    """Answer by the mean value of the 3 nearest inputs."""
    distance_BK = np.square(inputs_BKZ - input_BZ[:, None]).sum(-1)
    nearest_BK = np.argsort(distance_BK, axis=1)[:, :NEIGHBOURS]
    return np.take_along_axis(values_BK, nearest_BK, axis=1).mean(1)


def averaging(inputs_BKZ: Numbers, values_BK: Numbers, input_BZ: Numbers) -> Numbers:
    """Answer by the mean of y x as weights: right on average, and slow to get there."""
    return np.einsum("BZ,BZ->B", input_BZ, np.einsum("BKZ,BK->BZ", inputs_BKZ, values_BK) / values_BK.shape[1])


ESTIMATORS: Final[dict[str, Estimator]] = {
    "least squares": least_squares,
    "ridge (1)": ridge,
    "3 nearest": nearest_neighbours,
    "averaging": averaging,
}


def function_baselines(data: FunctionData) -> dict[str, dict[str, float]]:
    """Score every estimator on the test functions, as `InContextRegression` scores a model.

    Returns:
        By estimator "nll", the squared error over all values, and "error_after_k", that after k examples over that of
        answering 0.
    """
    batches = list(data.test_batches())
    real_B = np.concatenate([batch["segments"][:, 0] for batch in batches]) != 0
    inputs_BPZ, values_BP = (
        np.concatenate([batch[name] for batch in batches])[real_B].astype(np.float64) for name in ("inputs", "values")
    )
    power_P = np.square(values_BP).sum(0)
    scores = {}
    for name, estimate in ESTIMATORS.items():
        # Without an example all of them answer 0.
        error_P = [power_P[0]] + [
            np.square(estimate(inputs_BPZ[:, :k], values_BP[:, :k], inputs_BPZ[:, k]) - values_BP[:, k]).sum()
            for k in range(1, values_BP.shape[1])
        ]
        digits = len(str(len(power_P) - 1))
        after = {f"error_after_{k:0{digits}}": float(error / power_P[k]) for k, error in enumerate(error_P)}
        scores[name] = {"nll": float(np.sum(error_P) / values_BP.size)} | after
    return scores
