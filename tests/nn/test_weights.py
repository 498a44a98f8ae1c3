"""Matrices as 8-bit integers: what is rounded, what it costs, and that it is the same on every mesh."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny import deterministic, tiny
from tests.tiny_gpt import CHARACTERS, GPT2, MODERN, random_params, run_folder
from transformer_jax.cli import main
from transformer_jax.completion import Completer
from transformer_jax.config import ComputeConfig, MeshConfig
from transformer_jax.decoding import Decoding
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.nn.module import Skeleton, parameter_count
from transformer_jax.nn.moe import ExpertsConfig
from transformer_jax.nn.stack import stack_layers
from transformer_jax.nn.weights import hold, holding
from transformer_jax.objectives import cross_entropy
from transformer_jax.sampling import Sampling
from transformer_jax.sharding import make_mesh, parameter_shardings

UNROLLED = ComputeConfig(layers="unrolled")
LETTERS = replace(MODERN, vocab_size=90)
FAMILIES = {
    "gpt": LETTERS,
    "moe": replace(LETTERS, layers=1, windows=(), experts=ExpertsConfig(count=3)),
    "transformer": deterministic(tiny()).model,
    "bert2bert": BertSeq2SeqConfig(vocab_size=58, context=32, width=24, layers=2, heads=6, feedforward=40, dropout=0.0),
    "rnn": RNNSeq2SeqConfig(vocab_size=58, width=24, encoder_layers=1, decoder_layers=1, dropout=0.0),
}


def alone():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def tokens(vocabulary, rows=3, length=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(4, vocabulary, (rows, length)), jnp.int32)


def logits(skeleton, params):
    vocabulary = skeleton.config.vocab_size
    sides = (
        [tokens(vocabulary)]
        if isinstance(skeleton.config, GPTConfig)
        else [tokens(vocabulary), tokens(vocabulary, 3, 5, 1)]
    )
    return jax.jit(lambda params, *ids: skeleton.bind(params)(*ids))(params, *sides)


def unpacked(held):
    """The float matrices that integers and scales stand for, in a tree as trained."""

    def convert(node):
        if not isinstance(node, dict):
            return node
        node = {name: convert(part) for name, part in node.items()}
        for name in ("weight", "table"):
            if name in node and "scale" in node:
                matrix, scale = np.asarray(node[name], np.float32), np.asarray(node.pop("scale"))
                spread = (
                    scale[:, None] if name == "table" or len(scale) == len(matrix) else scale
                )  # of a row, an expert
                node[name] = matrix * spread
        return node

    return convert(held)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_integers_are_those_of_the_rounded_matrices(family):
    skeleton = Skeleton.of(FAMILIES[family], UNROLLED)
    params = skeleton.init(jax.random.key(0))
    held = hold(skeleton, params, "int8", alone())
    rounded = unpacked(held)
    assert jax.tree.structure(rounded) == jax.tree.structure(params)
    found = logits(holding(skeleton, "int8"), held)
    np.testing.assert_allclose(found, logits(skeleton, rounded), rtol=1e-4, atol=1e-4)
    assert not np.array_equal(found, logits(skeleton, params))


def test_each_channel_is_rounded_by_its_own_scale():
    skeleton, params = random_params(LETTERS)
    params["embedding"]["table"] = params["embedding"]["table"].at[5].set(0.0).at[6].multiply(1000.0)
    held = hold(skeleton, params, "int8", alone())
    table, scale = (np.asarray(held["embedding"][name]) for name in ("table", "scale"))
    assert table.dtype == np.int8
    assert not table[5].any()
    assert (np.abs(table).max(1) == 127)[np.arange(90) != 5].all()
    assert np.all(np.abs(table * scale[:, None] - params["embedding"]["table"]) <= scale[:, None] / 2 * 1.001)
    out = held["decoder"]["layers"][0]["attention"]["out"]  # "NHD": heads and their channels are summed over
    assert out["scale"].shape == (24,)
    assert np.array_equal(np.abs(np.asarray(out["weight"], int)).max((0, 1)), np.full(24, 127))


def test_integers_take_a_quarter_and_bfloat16_half():
    skeleton, params = random_params(replace(LETTERS, width=96, feedforward=160))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    held = hold(skeleton, params, "int8", alone())
    matrices = sum(leaf.size for leaf in jax.tree.leaves(held) if leaf.dtype == jnp.int8)
    assert matrices > 0.97 * parameter_count(skeleton.abstract)
    assert size(held) == matrices + 4 * (parameter_count(held) - matrices)
    assert size(held) < 0.3 * size(params)
    half = Skeleton.of(skeleton.config, replace(UNROLLED, dtype="bfloat16"))
    halved = hold(half, params, "float", alone())
    assert size(halved) < 0.52 * size(params)
    assert np.array_equal(logits(half, halved), logits(half, params))  # to the bit: products read bfloat16 anyway
    assert hold(skeleton, params, "float", alone()) is params


def test_scanned_layers_are_rounded_alike():
    skeleton, params = random_params(replace(LETTERS, windows=()))
    scanned = Skeleton.of(skeleton.config, ComputeConfig(layers="scan"))
    expected = stack_layers(hold(skeleton, params, "int8", alone()))
    found = hold(scanned, stack_layers(params), "int8", alone())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_scales_lie_beside_their_channels():
    skeleton, params = random_params(LETTERS)
    new = holding(skeleton, "int8")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(skeleton.abstract, skeleton.letters, mesh))
    held = hold(skeleton, placed, "int8", mesh)
    q = held["decoder"]["layers"][0]["attention"]["q"]
    assert q["scale"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor", None)), 2)
    assert held["embedding"]["scale"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor")), 1)
    jax.tree.map(np.testing.assert_array_equal, held, hold(skeleton, params, "int8", alone()))
    with jax.set_mesh(mesh):
        found = logits(new, held)
    np.testing.assert_allclose(found, logits(new, hold(skeleton, params, "int8", alone())), rtol=1e-4, atol=1e-4)


def test_a_trained_model_writes_nearly_the_same():
    model = replace(GPT2, vocab_size=31, init_std=0.1, layers=2)
    skeleton, params = random_params(model)
    rows = jnp.asarray((np.arange(20)[:, None] * 7 + np.arange(30) * (1 + np.arange(20)[:, None] % 3)) % 31)

    def loss(params):
        return cross_entropy(skeleton.bind(params)(rows[:, :-1]), rows[:, 1:]).mean()

    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=150)

    (params, _), losses = train(params)
    assert losses[-1] < 0.3
    exact = skeleton.bind(params)(rows)
    found = holding(skeleton, "int8").bind(hold(skeleton, params, "int8", alone()))(rows)
    assert np.abs(found - exact).max() < 0.05 * (exact.max() - exact.min())
    assert (found.argmax(-1) == exact.argmax(-1)).mean() > 0.97


def test_integers_stay_integers_in_the_loop():
    """Turned into floats before the loop, they would take more memory than without."""
    model = replace(GPT2, vocab_size=90, layers=6, width=120, heads=4, feedforward=480)
    skeleton, params = random_params(model)
    decoding = Decoding((holding(skeleton, "int8"),), alone(), model.context, eos=-1, pad=0)
    held, greedy = (hold(skeleton, params, "int8", alone()),), Sampling(temperature=0.0).filters()
    writing = decoding.prefill(held, [[5, 6, 7]], [0], sample_R=[0], limit_R=[9], seed=0, filters=greedy)
    with jax.set_mesh(decoding.mesh):
        lowered = decoding._write.lower(held, writing, jnp.zeros(1, bool), greedy, 9, alternatives=0)
    floats = 4 * parameter_count(skeleton.abstract)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < floats / 3


def test_a_run_writes_with_integers(tmp_path, capsys):
    run = run_folder(tmp_path / "run", GPT2)
    completer = Completer.open(run, weights="int8")
    assert completer.load()["embedding"]["table"].dtype == jnp.int8
    assert completer.config.vocab_size == CHARACTERS.vocab_size
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(run), "Was ever", "--weights", "int8", "--max-tokens", "5", "--temperature", "0"])
    assert "5 tokens in" in capsys.readouterr().err
