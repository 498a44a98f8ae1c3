"""Products of half precision with a float32 result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def widened(contract: Callable[..., jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """Return contract(a, b) in float32; its gradient's products are, like itself, of a's precision.

    Left to themselves, the gradients of what is float32 are products of float32, at half the speed or less.

    Args:
        contract: a product, linear in both, that takes `preferred_element_type`.
        a: of one precision,
        b: of the same.
    """
    return contract(a, b, preferred_element_type=jnp.float32)


def _forward(contract: Callable[..., jax.Array], a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return widened(contract, a, b), (a, b)


def _backward(contract: Callable[..., jax.Array], kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = kept
    g = g.astype(a.dtype)
    (da,) = jax.linear_transpose(lambda a: contract(a, b), a)(g)
    (db,) = jax.linear_transpose(lambda b: contract(a, b), b)(g)
    return da, db


widened.defvjp(_forward, _backward)
