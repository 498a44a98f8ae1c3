"""The optimiser: a vmapped Levenberg-Marquardt in float64, over all starts or all resamples at once.

What is minimised is the sum of Huber(delta) over log-loss residuals (Hoffmann 2022, equation 3). The sum, not the
mean: with a mean the gradients are so small that the default tolerances of an optimiser end the search early, which
is how published exponents went wrong (Besiroglu 2024). Here the tolerance is relative to the objective, so a
constant factor cannot matter.

The step: inside delta Huber's loss is a parabola; outside it has no curvature, and the parabola of weight delta/|r|
bounds it from above (iteratively reweighted least squares). That bound is safe but slow, so it is treated as part of
the damping: it fades out with it while steps succeed, which leaves Gauss-Newton on the runs inside, and comes back when
one fails. Starts take some 50 evaluations, resamples some 15, where L-BFGS takes some 120.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from transformer_jax.logs import console
from transformer_jax.scaling.laws import Law, float64

_CHUNK = 128  # problems solved together: their intermediate arrays stay in the cache of a core
_LARGEST = 2**15  # problems times runs in a chunk
_ROWS = 64  # runs are filled up to a multiple of it with runs of weight 0, so that few shapes are compiled
_STEPS = 12  # steps between looks at which problems are done
_ROUNDS = 60  # looks before a problem is given up
_TOLERANCE = 1e-13  # relative
FLOOR = 1e-26
"""Objectives below it are rounding: data without noise."""
_FIRST_DAMPING, _LAST_DAMPING = 1e-2, 1e8
_BOUND = 1e3  # the bound counts in full from a damping of 1/_BOUND


@dataclass(frozen=True)
class Solutions:
    """What the optimiser found, one row per problem."""

    theta: np.ndarray
    """[S, P], centred."""
    objective: np.ndarray
    """[S], sum of Huber."""
    converged: np.ndarray
    """[S]: the step the model proposes would not lower the objective by more than rounding."""


class _State(NamedTuple):
    theta: jax.Array
    damping: jax.Array
    objective: jax.Array
    gradient: jax.Array
    inside: jax.Array
    """Curvature [P, P] of the runs within delta."""
    outside: jax.Array
    """That of the parabolas above the others."""


def _expand(law: Law, theta: jax.Array, data: tuple[jax.Array, ...], delta: float) -> tuple[jax.Array, ...]:
    """Objective, gradient, and the two curvatures of `_State`."""
    n, d, y, weight = data
    r = jax.vmap(law.log_loss, (None, 0, 0))(theta, n, d) - y
    jacobian_RP = jax.vmap(jax.grad(law.log_loss), (None, 0, 0))(theta, n, d)
    size = jnp.abs(r)
    objective = jnp.sum(weight * jnp.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)))
    gradient = (weight * jnp.clip(r, -delta, delta)) @ jacobian_RP

    def curvature(weight: jax.Array) -> jax.Array:
        return jacobian_RP.T @ (jacobian_RP * weight[:, None])

    within = size <= delta
    outside = jnp.where(within, 0.0, delta / jnp.where(within, 1.0, size))
    return objective, gradient, curvature(weight * within), curvature(weight * outside)


def _step(law: Law, state: _State, data: tuple[jax.Array, ...], delta: float) -> tuple[_State, jax.Array]:
    scale = jnp.diag(state.inside + state.outside)
    curvature = state.inside + jnp.minimum(1.0, _BOUND * state.damping) * state.outside
    damped = curvature + jnp.diag(state.damping * scale + 1e-14 * scale.max() + 1e-300)
    step = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), state.gradient)
    theta = state.theta + step
    expansion = _expand(law, theta, data, delta)
    better = expansion[0] < state.objective
    tiny = -state.gradient @ step <= _TOLERANCE * state.objective + FLOOR
    done = (tiny & (state.damping <= _FIRST_DAMPING)) | (state.damping > _LAST_DAMPING)
    after = _State(theta, jnp.maximum(state.damping / 5, 1e-12), *expansion)
    before = state._replace(damping=state.damping * 4)
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), after, before), done


@partial(jax.jit, static_argnums=0)
def _advance(
    law: Law, theta_SP: jax.Array, damping_S: jax.Array, data: tuple[jax.Array, ...], delta: float
) -> tuple[_State, jax.Array]:
    """Take some steps on every problem of a chunk; one that is done stays where it is."""

    def one(theta: jax.Array, damping: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[_State, jax.Array]:
        own = (data[0], data[1], y, weight)

        def body(_: int, carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
            state, done = carry
            new, finished = _step(law, state, own, delta)
            return jax.tree.map(lambda a, b: jnp.where(done, a, b), state, new), done | finished

        begin = _State(theta, damping, *_expand(law, theta, own, delta))
        return jax.lax.fori_loop(0, _STEPS, body, (begin, jnp.asarray(False)))

    return jax.vmap(one)(theta_SP, damping_S, data[2], data[3])


def minimise(
    law: Law,
    starts_SP: np.ndarray,
    n_R: np.ndarray,
    d_R: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    delta: float,
    progress: str = "",
) -> Solutions:
    """Solve S problems at once: each its own start, and its own losses and weights where those are [S, R].

    Args:
        law: the form.
        starts_SP: where each begins, centred.
        n_R: log N, centred.
        d_R: log D, centred.
        y: log L, centred: [R] or [S, R].
        weight: how often each run counts: [R] or [S, R].
        delta: Huber's.
        progress: what the bar says; "" for none.
    """
    S, R = len(starts_SP), len(n_R)
    extra = -R % _ROWS
    n_R, d_R = (np.pad(array, (0, extra)) for array in (n_R, d_R))
    y_SR, weight_SR = (np.broadcast_to(array, (S, R)) for array in (y, weight))
    theta, objective = np.array(starts_SP, float), np.full(S, np.inf)
    done = np.zeros(S, bool)
    with float64(), Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(progress, total=S)
        damping = np.full(S, _FIRST_DAMPING)
        for _ in range(_ROUNDS):
            for rows in _chunks(np.flatnonzero(~done), R + extra):
                own = (np.pad(array[rows].astype(float), [(0, 0), (0, extra)]) for array in (y_SR, weight_SR))
                data = (n_R, d_R, *own)
                state, finished = _advance(law, theta[rows], damping[rows], data, delta)
                theta[rows], damping[rows], objective[rows] = state.theta, state.damping, state.objective
                done[rows] = finished
                bar.update(task, completed=int(done.sum()))
            if done.all():
                break
    return Solutions(theta, objective, done)


def _chunks(problems: np.ndarray, runs: int) -> Iterator[np.ndarray]:
    """Cut into equal chunks, the last filled up with repetitions: one shape, compiled once."""
    size = min(max(_LARGEST // runs, 2), _CHUNK)
    for first in range(0, len(problems), size):
        yield np.resize(problems[first : first + size], size)
