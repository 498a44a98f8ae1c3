"""Cheap functions keep for their gradient what they read, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.nn.layers import ACTIVATIONS, NORMS, looped
from transformer_jax.objectives import cross_entropy


def kept(pull):
    """Elements of the arrays that a backward pass holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_an_activation_keeps_its_input(name):
    x = jax.random.normal(jax.random.key(0), (64, 8))
    theirs = {"gelu": jax.nn.gelu, "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}[name]
    options = {"approximate": name == "gelu_tanh"} if "gelu" in name else {}
    y, pull = jax.vjp(ACTIVATIONS[name], x)
    right, pull_right = jax.vjp(lambda x: theirs(x, **options), x)
    np.testing.assert_allclose(y, right, atol=1e-6)
    np.testing.assert_allclose(pull(x)[0], pull_right(x)[0], atol=1e-6)
    assert kept(pull) == x.size < kept(pull_right)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_keeps_its_input(name):
    x, norm = jax.random.normal(jax.random.key(0), (64, 8)), NORMS[name](8)
    _, pull = jax.vjp(norm, x)
    assert kept(pull) <= x.size + 2 * 8


@pytest.mark.parametrize("inside", [True, False])
def test_a_barrier_stands_between_the_passes_but_in_a_loop(inside):
    def gradient(x):
        return jax.grad(lambda x: ACTIVATIONS["gelu"](x).sum())(x)

    def traced():
        return str(jax.make_jaxpr(gradient)(jnp.ones(4)))

    if inside:
        with looped():
            found = traced()
    else:
        found = traced()
    assert f"prevent_cse={not inside}" in found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_cross_entropy_scatters_nothing(smoothing):
    logits, labels = (
        jax.random.normal(jax.random.key(0), (3, 5, 7)),
        jax.random.randint(jax.random.key(1), (3, 5), 0, 7),
    )

    def plainly(logits):
        target = (1 - smoothing) * jax.nn.one_hot(labels, 7) + smoothing / 7
        return -(target * jax.nn.log_softmax(logits)).sum()

    gradient = jax.grad(lambda logits: cross_entropy(logits, labels, smoothing).sum())
    np.testing.assert_allclose(gradient(logits), jax.grad(plainly)(logits), atol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(gradient)(logits))
