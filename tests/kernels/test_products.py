"""Products with a float32 result: their gradients are products of half precision, and right."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.kernels.products import widened

CONTRACT = partial(jnp.einsum, "BTD,DV->BTV")


def given(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [(2, 5, 8), (8, 6), (2, 5, 6)], strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_result_and_gradient(dtype):
    a, b, weight = given(dtype)
    out, pull = jax.vjp(partial(widened, CONTRACT), a, b)
    exact, pull_exact = jax.vjp(CONTRACT, a.astype(jnp.float32), b.astype(jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, atol=1e-5)
    for ours, right in zip(pull(weight.astype(jnp.float32)), pull_exact(weight.astype(jnp.float32)), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), right, rtol=2**-7, atol=1e-5 if dtype == "float32" else 3e-2
        )


def test_no_product_of_float32_is_left_in_the_gradient():
    a, b, weight = given("bfloat16")
    loss = lambda a, b: (widened(CONTRACT, a, b) * weight).sum()  # noqa: E731
    products = [e for e in jax.make_jaxpr(jax.grad(loss, (0, 1)))(a, b).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert {v.aval.dtype.name for e in products for v in e.invars} == {"bfloat16"}
