"""Plain attention's own softmax is JAX's, in value and gradient, and hidden places count for nothing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.kernels import plain
from transformer_jax.kernels.mask import Mask


def test_softmax_and_its_gradient_are_those_of_jax():
    x, dy = (jax.random.normal(jax.random.key(i), (3, 5, 7)) for i in range(2))
    ours, pull = jax.vjp(partial(plain.softmax, dtype=jnp.float32), x)
    theirs, pull_theirs = jax.vjp(jax.nn.softmax, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(pull(dy)[0], pull_theirs(dy)[0], atol=1e-7)


def test_what_is_hidden_may_be_as_large_as_it_likes():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    mask = Mask(causal=True)
    out, weights = plain.attend(q, k, v, mask, 0.0, None)
    large = k.at[:, 3].mul(1e6)
    again, _ = plain.attend(q, large, v, mask, 0.0, None)
    np.testing.assert_array_equal(out[:, :3], again[:, :3])
    assert not jnp.triu(weights, 1).any()


@pytest.mark.parametrize("window", [0, 70])
def test_a_row_in_pieces_is_the_row_as_a_whole(monkeypatch, window):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 300, n, 8)) for i, n in enumerate((4, 2, 2)))
    segments = jnp.asarray([[1] * 90 + [2] * 200 + [0] * 10, [1] * 300])
    mask = Mask(segments, segments, causal=True, window=window)
    real = (segments != 0)[..., None, None]

    def run(q, k, v):
        out, weights = plain.attend(q, k, v, mask, 0.0, None)
        return ((out * real) ** 2).sum(), (out * real, weights * real[:, :, 0, 0][:, None, :, None])

    pieces = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setattr(plain, "PIECES", 1)
    whole = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), pieces, whole)
