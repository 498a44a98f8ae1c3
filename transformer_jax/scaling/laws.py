"""What a form of the loss L(N, D) is, and the compute-optimal split it implies.

Every form is an increasing function of one trade-off term T(N, D) = A/N^x + B/D^y. So at a budget C = 6ND all of them
are least at the same kind of point, N* = G (C/6)^(y/(x+y)) with G = (xA / yB)^(1/(x+y)); and they differ in how T
becomes a loss.

Parameters are kept as a vector theta, sizes by their logarithm: A can be 1e3 or 1e30, log A is tame. Everything is
evaluated in float64 on the CPU, inside `float64()`; the rest of the library keeps its 32 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from transformer_jax.errors import UserError
from transformer_jax.scaling.groups import SAME, within

Theta = Any
"""Parameters of a form, [..., P]; the leading axes are resamples."""
Tradeoff = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(log A, x, log B, y) of T = A/N^x + B/D^y."""

_ONE_LINE = 0.9999  # correlation of log N and log D from which on they are one quantity


@dataclass(frozen=True)
class Law:
    """One form L(N, D), in the coordinates of a table centred at its geometric means.

    Those of the papers are in `forms.py`.
    """

    name: str
    formula: str
    """For people, in the parameters that `describe` returns."""
    parameters: int
    log_loss: Callable[[Theta, jax.Array, jax.Array], jax.Array]
    """(theta [P], log N, log D) -> log L, all scalars."""
    shift: Callable[[Theta, float, float, float], Theta]
    """(theta, n, d, l) -> theta of the same surface after log N, log D and log L were increased by n, d, l."""
    tradeoff: Callable[[Theta], Tradeoff]
    """theta [..., P] -> the trade-off term."""
    describe: Callable[[Theta], dict[str, np.ndarray]]
    """theta [..., P] -> the parameters by their names in the paper."""
    starts: Callable[[], np.ndarray]
    """Centred starting points [S, P]."""
    sizes: int
    """Different N, and different D, without which the form is not determined."""

    def missing(self, N: np.ndarray, D: np.ndarray) -> str:
        """Say in one line what these runs lack for this form, "" if nothing."""
        short = self.parameters + 1 - len(N)
        if short > 0:
            return (
                f"{self.name} has {self.parameters} parameters and needs {self.parameters + 1} runs: "
                f"there are {len(N)}, so {short} more"
            )
        for values, what in ((N, "model sizes N"), (D, "numbers of tokens D")):
            found = len(np.unique(within(np.log(values), SAME)))
            if found < self.sizes:
                return f"{self.name} needs {self.sizes} different {what}: there {_are(found)}"
        if abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) > _ONE_LINE:
            return f"{self.name} cannot tell N from D: in all runs D is the same power of N; add runs at other D/N"
        return ""


def _are(count: int) -> str:
    return "is 1 only" if count == 1 else f"are {count}"


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Compute in 64 bits on the CPU inside the block, whatever accelerator the rest uses."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "Fits need float64 on the CPU, and JAX was started without it: add it, as JAX_PLATFORMS=tpu,cpu."
        ) from error
    with jax.enable_x64(True), jax.default_device(cpu):
        yield


def predict(law: Law, theta: np.ndarray, N: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Return log L of every parameter vector [B, P]: at the same points N, D [M], or each at its own [B, M]."""
    shape = (len(theta), np.shape(N)[-1])
    with np.errstate(divide="ignore"):  # log 0 of a resample that determines nothing
        n, d = (np.broadcast_to(np.log(values), shape) for values in (N, D))
    with float64():
        return np.asarray(_log_losses(law, theta, n, d))


@partial(jax.jit, static_argnums=0)
def _log_losses(law: Law, theta_BP: jax.Array, n_BM: jax.Array, d_BM: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(law.log_loss, (None, 0, 0)))(theta_BP, n_BM, d_BM)


@dataclass(frozen=True)
class Frontier:
    """The compute-optimal split, for every resample [B]: N* = k C^a, and D* = C / (6 N*) with exponent 1 - a."""

    a: np.ndarray
    log_k: np.ndarray

    def N(self, C: float) -> np.ndarray:
        """Return the best number of parameters at budget C = 6ND."""
        with np.errstate(over="ignore"):  # a resample without an optimum to speak of
            return np.exp(self.log_k + self.a * np.log(C))


def frontier(law: Law, theta: np.ndarray) -> Frontier:
    """Minimise the trade-off term at C = 6ND (Hoffmann 2022, equation 4); NaN where an exponent is not positive."""
    log_A, x, log_B, y = law.tradeoff(theta)
    with np.errstate(all="ignore"):
        a = np.where((x > 0) & (y > 0), y / (x + y), np.nan)
        log_G = (np.log(x) + log_A - np.log(y) - log_B) / (x + y)
        return Frontier(a, log_G - a * np.log(6))


def wasted(law: Law, theta: np.ndarray, N: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Return the share of C = 6ND that a run at (N, D) wastes: the optimum reaches the same loss with the rest."""
    log_A, x, log_B, y = law.tradeoff(theta)
    log_C = np.log(6 * N * D)
    best = frontier(law, theta)
    n_best = best.log_k + best.a * log_C

    def log_T(log_N: np.ndarray, log_D: np.ndarray) -> np.ndarray:
        return np.logaddexp(log_A - x * log_N, log_B - y * log_D)

    with np.errstate(all="ignore"):
        excess = log_T(np.log(N), np.log(D)) - log_T(n_best, log_C - np.log(6) - n_best)
        return 1 - np.exp(-excess * (x + y) / (x * y))  # along the frontier, T falls as C^(-xy/(x+y))
