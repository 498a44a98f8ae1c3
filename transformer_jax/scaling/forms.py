"""The published forms of L(N, D): Chinchilla's, Kaplan's, and the one for over-training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.scaling.laws import Law, Theta, Tradeoff

REFERENCE_N, REFERENCE_D, REFERENCE_LOSS = 8.7e8, 1.58e10, 2.65
"""Geometric means of Chinchilla's runs (240 points of figure 4): where the published grid of starts lies."""


def _log_sum_exp(*terms: jax.Array) -> jax.Array:
    # By hand: `logsumexp` of stacked terms is four times slower under vmap on a CPU.
    highest = jax.lax.stop_gradient(_max(terms))
    return highest + jnp.log(sum(jnp.exp(term - highest) for term in terms))


def _max(terms: Sequence[jax.Array]) -> jax.Array:
    highest = terms[0]
    for term in terms[1:]:
        highest = jnp.maximum(highest, term)
    return highest


def _columns(theta: Theta) -> list[Any]:
    return [theta[..., i] for i in range(theta.shape[-1])]


def _exp(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a resample that determines nothing
        return np.exp(x)


def _grid(*axes: Sequence[float]) -> np.ndarray:
    return np.array(list(itertools.product(*axes)))


# Hoffmann 2022, appendix D.3: 6 x 5 x 6 x 5 x 5 = 4,500 starts.
_EXPONENTS, _LOGS, _LOG_E = (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 5.0, 10.0, 15.0, 20.0, 25.0), (-1.0, -0.5, 0.0, 0.5, 1.0)


def _to_reference(law_shift: Callable[[Theta, float, float, float], Theta], grid: np.ndarray) -> np.ndarray:
    return law_shift(grid, -np.log(REFERENCE_N), -np.log(REFERENCE_D), -np.log(REFERENCE_LOSS))


def _chinchilla_log_loss(theta: Theta, n: jax.Array, d: jax.Array) -> jax.Array:
    a, alpha, b, beta, e = theta
    return _log_sum_exp(a - alpha * n, b - beta * d, e)


def _chinchilla_shift(theta: Theta, n: float, d: float, loss: float) -> Theta:
    a, alpha, b, beta, e = _columns(theta)
    return np.stack([a + alpha * n + loss, alpha, b + beta * d + loss, beta, e + loss], -1)


def _chinchilla_tradeoff(theta: Theta) -> Tradeoff:
    a, alpha, b, beta, _ = _columns(theta)
    return a, alpha, b, beta


def _chinchilla_describe(theta: Theta) -> dict[str, np.ndarray]:
    a, alpha, b, beta, e = _columns(theta)
    return {"E": _exp(e), "A": _exp(a), "alpha": alpha, "B": _exp(b), "beta": beta}


CHINCHILLA = Law(
    name="A3",
    formula="L = E + A/N^alpha + B/D^beta",
    parameters=5,
    log_loss=_chinchilla_log_loss,
    shift=_chinchilla_shift,
    tradeoff=_chinchilla_tradeoff,
    describe=_chinchilla_describe,
    starts=lambda: _to_reference(_chinchilla_shift, _grid(_LOGS, _EXPONENTS, _LOGS, _EXPONENTS, _LOG_E)),
    sizes=3,
)
"""Approach 3 of Hoffmann 2022 ("Training Compute-Optimal Large Language Models", section 3.3)."""


def _kaplan_log_loss(theta: Theta, n: jax.Array, d: jax.Array) -> jax.Array:
    a, x, b, s = theta
    return s * _log_sum_exp(a - x * n, b - d)


def _kaplan_shift(theta: Theta, n: float, d: float, loss: float) -> Theta:
    a, x, b, s = _columns(theta)
    return np.stack([a + x * n + loss / s, x, b + d + loss / s, s], -1)


def _kaplan_describe(theta: Theta) -> dict[str, np.ndarray]:
    a, x, b, s = _columns(theta)
    return {"N_c": _exp(a / x), "alpha_N": x * s, "D_c": _exp(b), "alpha_D": s}


def _kaplan_tradeoff(theta: Theta) -> Tradeoff:
    a, x, b, _ = _columns(theta)
    return a, x, b, np.ones_like(x)


KAPLAN = Law(
    name="kaplan",
    formula="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
    parameters=4,
    log_loss=_kaplan_log_loss,
    shift=_kaplan_shift,
    tradeoff=_kaplan_tradeoff,
    describe=_kaplan_describe,
    # Around the published alpha_N 0.076 and alpha_D 0.095; at the centre of the table log L is 0.
    starts=lambda: _grid((-8.0, -4.0, -2.0, -0.7), (0.25, 0.5, 1.0, 2.0), (-8.0, -4.0, -2.0, -0.7), (0.05, 0.1, 0.3)),
    sizes=2,
)
"""Kaplan 2020 ("Scaling Laws for Neural Language Models", equation 1.5), without a floor E."""


def _over_training_log_loss(theta: Theta, n: jax.Array, d: jax.Array) -> jax.Array:
    a, b, gamma, e = theta
    return _log_sum_exp(a - gamma * n, b - gamma * d, e)


def _over_training_shift(theta: Theta, n: float, d: float, loss: float) -> Theta:
    a, b, gamma, e = _columns(theta)
    return np.stack([a + gamma * n + loss, b + gamma * d + loss, gamma, e + loss], -1)


def _over_training_tradeoff(theta: Theta) -> Tradeoff:
    a, b, gamma, _ = _columns(theta)
    return a, gamma, b, gamma


def _over_training_describe(theta: Theta) -> dict[str, np.ndarray]:
    log_A, log_B, gamma, e = _columns(theta)
    eta, root = gamma / 2, gamma / 2 * np.log(6)
    return {"E": _exp(e), "lambda_a": _exp(log_A + root), "lambda_b": _exp(log_B + root), "eta": eta}


OVER_TRAINING = Law(
    name="over-training",
    formula="L = E + (lambda_a M^eta + lambda_b M^-eta) C^-eta with M = D/N",
    parameters=4,
    log_loss=_over_training_log_loss,
    shift=_over_training_shift,
    tradeoff=_over_training_tradeoff,
    describe=_over_training_describe,
    starts=lambda: _to_reference(_over_training_shift, _grid(_LOGS, _LOGS, _EXPONENTS, _LOG_E)),
    sizes=2,
)
"""Gadre 2024 ("Language models scale reliably with over-training", equation 4): approach 3 with one exponent,
written in compute C = 6ND and tokens a parameter M, so that lines of equal M are parallel."""

LAWS = (CHINCHILLA, KAPLAN, OVER_TRAINING)
