"""Laws of the recurrent cells and of the scan over time, and their equality with PyTorch's."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer_jax.nn.recurrent import GRU, LSTM, RNN, RecurrentLayer, recur

CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
B, T, INPUTS, D = 5, 11, 6, 10
LENGTHS = (11, 4, 7, 1, 9)
MASK = np.arange(T) < np.asarray(LENGTHS)[:, None]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles():
    """These tests compile many small programs and run each once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=CELLS)
def cell(request):
    return drawn(lambda: CELLS[request.param](jax.random.key(0), INPUTS, D))


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(B, T, INPUTS)).astype(np.float32)


def drawn(build):
    """The module that `build()` describes, with random parameters and no zeros among them, which hide mistakes."""
    graph, state = nnx.split(jax.eval_shape(build))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), state))


def layer_of(cell, inputs):
    return RecurrentLayer(jax.random.key(0), cell, inputs, D, bidirectional=True)


def run(cell, x, mask=None, **options):
    return jax.jit(lambda x: recur(cell, cell.project(x), cell.zeros(len(x)), mask, **options))(x)


def from_pytorch(weights, name, suffix):
    """Reshape one direction of one layer of PyTorch's to our parameters; it has two biases where we may have one."""
    gates = CELLS[name].gates

    def weight(key):
        return jnp.asarray(weights[f"{name}/weight_{key}_{suffix}"].T.reshape(-1, gates, D))

    read, recalled = (weights[f"{name}/bias_{key}_{suffix}"].reshape(gates, D) for key in ("ih", "hh"))
    if name == "gru":
        recurrent = {"weight": weight("hh"), "bias": jnp.asarray(recalled)}
        return {"project": {"weight": weight("ih"), "bias": jnp.asarray(read)}, "recurrent": recurrent}
    return {
        "project": {"weight": weight("ih"), "bias": jnp.asarray(read + recalled)},
        "recurrent": {"weight": weight("hh")},
    }


@pytest.mark.parametrize("name", CELLS)
def test_two_bidirectional_layers_equal_pytorch(name):
    reference = np.load(Path(__file__).parent.parent / "fixtures" / "recurrent_reference.npz")
    mask = np.arange(T) < reference["lengths_B"][:, None]
    h_BTD = reference["x_BTD"]
    for i, inputs in enumerate((INPUTS, 2 * D)):
        graph, state = nnx.split(jax.eval_shape(lambda n=inputs: layer_of(CELLS[name], n)))
        params = {
            "forwards": from_pytorch(reference, name, f"l{i}"),
            "backwards": from_pytorch(reference, name, f"l{i}_reverse"),
        }
        assert jax.tree.structure(params) == jax.tree.structure(nnx.to_pure_dict(state))
        layer = nnx.merge(graph, params)
        h_BTD, last = jax.jit(layer)(h_BTD, mask)
        for part, ours in zip("hc", last, strict=False):
            theirs = np.concatenate(reference[f"{name}/{part}"][2 * i : 2 * i + 2], axis=-1)
            np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(h_BTD[mask], reference[f"{name}/out_BTD"][mask], atol=2e-6)


def test_a_layer_is_its_two_directions(cell, x):
    layer = drawn(lambda: layer_of(type(cell), INPUTS))
    both = jax.jit(layer)(x, MASK)
    directions = run(layer.forwards, x, MASK), run(layer.backwards, x, MASK, reverse=True)
    expected = jax.tree.map(lambda *two: np.concatenate(two, -1), *directions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both, expected)


def test_reverse_equals_reversed_input(cell, x):
    backwards, last = run(cell, x, MASK, reverse=True)
    for row, length in enumerate(LENGTHS):
        expected, expected_last = run(cell, x[row : row + 1, :length][:, ::-1])
        np.testing.assert_allclose(backwards[row, :length], expected[0, ::-1], atol=1e-6)
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0], atol=1e-6), last, expected_last)


def test_state_of_a_padded_row_is_the_one_at_its_last_token(cell, x):
    _, last = run(cell, x, MASK)
    for row, length in enumerate(LENGTHS):
        _, expected = run(cell, x[row : row + 1, :length])
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0], atol=1e-6), last, expected)


@pytest.mark.parametrize("cut", [1, 4])
def test_a_scan_in_chunks_carries_the_state_exactly(cell, x, cut):
    gates = cell.project(x)
    whole, last = recur(cell, gates, cell.zeros(B), MASK)
    head, state = recur(cell, gates[:, :cut], cell.zeros(B), MASK[:, :cut])
    tail, state = recur(cell, gates[:, cut:], state, MASK[:, cut:])
    np.testing.assert_array_equal(np.concatenate([head, tail], 1), whole)
    jax.tree.map(np.testing.assert_array_equal, state, last)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(cell, x, remat):
    def loss(x, remat):
        return jnp.square(recur(cell, cell.project(x), cell.zeros(B), MASK, remat=remat)[0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(x, remat), gradient(x, "none"), atol=1e-5)


def test_state_stays_float32_in_bfloat16(cell, x):
    out, state = run(cell, jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert {part.dtype for part in state} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out.astype(jnp.float32), run(cell, x)[0], atol=0.05)
