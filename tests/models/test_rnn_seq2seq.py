"""Laws of the recurrent encoder-decoders, for every cell and every way from the source to the decoder."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_train import ONE, assert_same, batch, steps  # noqa: F401
from tests.tiny import deterministic, tiny
from transformer_jax.config import ComputeConfig, MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.nn.module import Skeleton, parameter_count

# Pairwise different sizes: a transposed axis cannot pass.
CONFIG = RNNSeq2SeqConfig(vocab_size=37, width=24, embedding=20, encoder_layers=2, decoder_layers=2, dropout=0.3)
B, S, T = 5, 11, 7
LENGTHS = (11, 4, 7, 1, 9)

VARIANTS = {
    "sutskever": {"reverse_source": True},
    "cho": {"cell": "gru", "bidirectional": True, "feed_context": True, "maxout": 14},
    "bahdanau": {"cell": "gru", "bidirectional": True, "attention": "additive", "encoder_layers": 1, "maxout": 14},
    "luong": {"cell": "rnn", "attention": "dot", "decoder_layers": 1},
    "luong_feeding": {"attention": "general", "input_feeding": True, "decoder_layers": 3, "reverse_source": True},
    "tied": {"cell": "rnn", "bidirectional": True, "attention": "general", "embedding": 24, "tied": True},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles():
    """These tests compile many small programs and run each once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def built(**changes):
    """A model with random parameters and no zeros among them, which hide mistakes."""
    config = replace(CONFIG, **changes)
    config.check()
    skeleton, rng = Skeleton.of(config, ComputeConfig()), np.random.default_rng(0)
    return skeleton.bind(
        jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), skeleton.abstract)
    )


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return built(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def sentences():
    rng = np.random.default_rng(0)
    source, target = rng.integers(3, 37, (B, S)), rng.integers(3, 37, (B, T))
    for row, length in enumerate(LENGTHS):
        source[row, length:] = 0
    return source, target


def test_causality(model, sentences):
    source, target = sentences
    forward = jax.jit(model.__call__)
    plain = forward(source, target)
    for t in (0, 3, T - 1):
        changed = target.copy()
        changed[:, t] = 1 + changed[:, t] % 36
        other = forward(source, changed)
        np.testing.assert_array_equal(other[:, :t], plain[:, :t])
        assert np.all(np.any(other[:, t:] != plain[:, t:], axis=-1))


def test_padding_changes_nothing(model, sentences):
    source, target = sentences
    plain = jax.jit(model.__call__)(source, target)
    wider = np.pad(source, ((0, 0), (0, 6))), np.pad(target, ((0, 0), (0, 3)))
    np.testing.assert_allclose(jax.jit(model.__call__)(*wider)[:, :T], plain, atol=1e-5)
    # Nor does it matter what else is in the batch.
    np.testing.assert_allclose(jax.jit(model.__call__)(source[2:3], target[2:3]), plain[2:3], atol=1e-5)


WAYS = [
    {"attention": "none"},
    {"attention": "none", "feed_context": True, "maxout": 14},
    {"attention": "additive", "maxout": 14},
    *({"attention": a, "input_feeding": f} for a in ("dot", "general") for f in (False, True)),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_decoding_step_by_step_equals_full_forward(sentences, cell, way):
    source, target = sentences
    model = built(cell=cell, decoder_layers=2, reverse_source=True, **way)
    with jax.disable_jit():  # many models, each run once
        full = model(source, target)
        state, memory = model.start(source, T)
        assert {len(leaf) for leaf in jax.tree.leaves((state, memory))} == {B}
        for t in range(T):
            logits, state = model.step(state, memory, target[:, t])
            np.testing.assert_allclose(logits, full[:, t], atol=1e-5)


def test_the_source_matters_and_every_parameter_has_a_gradient(model, sentences):
    from flax import nnx

    source, target = sentences
    graph, params = nnx.split(model)

    def loss(params):
        return jnp.square(nnx.merge(graph, params)(source, target, key=jax.random.key(7))).mean()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.any(gradient != 0), jax.tree_util.keystr(path)


def test_attention_maps_are_distributions_that_ignore_padding(model, sentences):
    source, target = sentences
    maps = jax.jit(model.attention_maps)(source, target)
    if model.config.attention == "none":
        assert maps == {}
        return
    weights = np.asarray(maps["cross"])
    assert weights.shape == (1, B, 1, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.all(weights[np.broadcast_to((source == 0)[None, :, None, None], weights.shape)] == 0)
    assert np.all(weights[np.broadcast_to((source != 0)[None, :, None, None], weights.shape)] > 0)


@pytest.mark.parametrize("attention", ["none", "general"])
def test_reversal_equals_reversed_input(sentences, attention):
    source, target = sentences
    backwards = source.copy()
    for row, length in enumerate(LENGTHS):
        backwards[row, :length] = source[row, :length][::-1]
    reversing = built(attention=attention, reverse_source=True)
    plain = built(attention=attention)
    np.testing.assert_allclose(
        jax.jit(reversing.__call__)(source, target), jax.jit(plain.__call__)(backwards, target), atol=1e-5
    )
    if attention == "general":
        # Columns of the map are in the order of the source, whichever way it was read.
        ours, theirs = (
            jax.jit(m.attention_maps)(x, target)["cross"][0, :, 0] for m, x in ((reversing, source), (plain, backwards))
        )
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length][:, ::-1], atol=1e-5)


def test_bahdanau_by_hand(sentences):
    """One step of RNNsearch in NumPy, from the equations of appendix A.2."""
    source, target = sentences
    model = built(cell="gru", encoder_layers=1, decoder_layers=1, bidirectional=True, attention="additive", maxout=14)
    memory = jax.tree.map(np.asarray, jax.jit(model.encode)(source))
    decoder, E = model.decoder, np.asarray(model.target_embedding.table[...])

    def weight(linear):
        return np.asarray(linear.weight[...])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    row, length = 1, LENGTHS[1]
    h = memory.x_BSD[row, :length]
    s = np.tanh(h[0, 24:] @ weight(decoder.bridge)[:, 0] + decoder.bridge.bias[0])
    e = np.tanh(s @ weight(decoder.attention.query) + h @ weight(decoder.attention.keys))
    a = np.exp(e @ weight(decoder.attention.energy))
    c = (a / a.sum()) @ h
    y = E[target[row, 0]]
    cell = decoder.cells[0]
    read = np.einsum("d,dzf->zf", y, weight(cell.project)) + cell.project.bias[...]
    read = read + np.einsum("d,dzf->zf", c, weight(decoder.feed))
    recalled = np.einsum("d,dzf->zf", s, weight(cell.recurrent)) + cell.recurrent.bias[...]
    r, z = sigmoid(read[0] + recalled[0]), sigmoid(read[1] + recalled[1])
    s = (1 - z) * np.tanh(read[2] + r * recalled[2]) + z * s
    pairs = np.einsum("d,dfz->fz", np.concatenate([s, y, c]), weight(model.maxout)) + model.maxout.bias[...]
    logits = np.asarray(model.output.table[...]) @ pairs.max(-1)
    np.testing.assert_allclose(jax.jit(model.__call__)(source, target)[row, 0], logits, atol=1e-5)


def test_luong_by_hand(sentences):
    """Two steps of one layer of plain RNN with input feeding in NumPy, from section 3."""
    source, target = sentences
    model = built(cell="rnn", encoder_layers=1, decoder_layers=1, attention="general", input_feeding=True)
    memory = jax.tree.map(np.asarray, jax.jit(model.encode)(source))
    decoder = model.decoder
    cell, E = decoder.cells[0], np.asarray(model.target_embedding.table[...])
    row, length = 2, LENGTHS[2]
    source_h = memory.x_BSD[row, :length]
    h, attentional = source_h[-1], np.zeros(24)
    expected = jax.jit(model.__call__)(source, target)[row]
    for t in range(2):
        x = E[target[row, t]] @ cell.project.weight[:, 0] + cell.project.bias[0]
        h = np.tanh(x + attentional @ decoder.feed.weight[:, 0] + h @ cell.recurrent.weight[:, 0])
        a = np.exp(source_h @ (decoder.attention.keys.weight[...] @ h))
        c = (a / a.sum()) @ source_h
        attentional = np.tanh(np.concatenate([c, h]) @ decoder.combine.weight[...])
        np.testing.assert_allclose(expected[t], model.output.table[...] @ attentional, atol=1e-5)


def test_bfloat16_stays_near_float32_and_remat_equals_none(sentences):
    config = replace(CONFIG, encoder_layers=1, attention="general", input_feeding=True)
    plain = Skeleton.of(config, ComputeConfig())
    half = Skeleton.of(config, ComputeConfig(dtype="bfloat16"))
    params = plain.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.abstract)} == {jnp.dtype("float32")}
    exact, rounded = (jax.jit(s.bind(params).__call__)(*sentences) for s in (plain, half))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() / np.abs(exact).max() < 0.05

    def gradient(remat):
        skeleton = Skeleton.of(config, ComputeConfig(remat=remat))

        def loss(params):
            return jnp.square(skeleton.bind(params)(*sentences, key=jax.random.key(7))).mean()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient("full"), gradient("none"))


def test_parameter_counts():
    """RNNsearch-50 and the LSTM of Sutskever 2014, counted from the papers' equations."""

    def count(config):
        return parameter_count(Skeleton.of(config, ComputeConfig()).abstract)

    n, m, k, V = 1000, 620, 500, 30_000
    gru, encoder_bias, decoder_bias = 3 * (m * n + n * n), 2 * 2 * 3 * n, 2 * 3 * n
    attention = n * n + n * 2 * n + n
    first = n * n + n
    deep = (n + m + 2 * n) * 2 * k + 2 * k
    search = 3 * gru + 3 * 2 * n * n + encoder_bias + decoder_bias + attention + first + deep + 2 * V * m + V * k
    rnnsearch = RNNSeq2SeqConfig(
        vocab_size=V,
        width=n,
        embedding=m,
        cell="gru",
        encoder_layers=1,
        decoder_layers=1,
        bidirectional=True,
        attention="additive",
        maxout=k,
    )
    assert count(rnnsearch) == search == 80_421_000
    # 64M in the layers, as the paper says, and three embeddings of 80M; biases are our 32,000.
    assert count(RNNSeq2SeqConfig()) == 64_000_000 + 3 * 80_000_000 + 32_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_feeding": True}, "input_feeding needs attention dot or general"),
        ({"input_feeding": True, "attention": "additive"}, "input_feeding needs attention dot or general"),
        ({"attention": "dot", "bidirectional": True}, "48 channels do not match model.width=24"),
        ({"attention": "general", "maxout": 4}, "model.maxout=4"),
        ({"attention": "general", "feed_context": True}, "feed_context needs attention none"),
        ({"tied": True}, "model.width=24 is projected by the embedding, so it must be model.embedding=20"),
        ({"tied": True, "maxout": 14}, "model.maxout=14 is projected"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes).check()


def experiment(**changes):
    """The tiny experiment of the house with a recurrent model whose every size 2 divides."""
    tiny_one = deterministic(tiny())
    model = RNNSeq2SeqConfig(vocab_size=306, width=24, embedding=16, encoder_layers=1, decoder_layers=1, init_scale=0.2)
    # A larger eps: Adam divides, so it would blow the rounding of gradients near zero up.
    return replace(tiny_one, model=replace(model, **changes), optim=replace(tiny_one.optim, eps=1e-5), mesh=ONE)


@pytest.mark.parametrize(
    "changes",
    [
        {"cell": "gru", "bidirectional": True, "attention": "additive", "maxout": 32},
        {"attention": "general", "input_feeding": True, "reverse_source": True, "decoder_layers": 2},
        {"cell": "rnn", "bidirectional": True},
    ],
    ids=["bahdanau", "luong", "context"],
)
def test_sharded_equals_single_device(batch, changes):  # noqa: F811
    recurrent = experiment(**changes)
    single = steps(recurrent, batch, devices=jax.devices()[:1])
    assert_same(steps(replace(recurrent, mesh=MeshConfig(2, 2, 2)), batch), single)


def test_accumulation_equals_one_big_batch(batch):  # noqa: F811
    recurrent = experiment(attention="dot", input_feeding=True)
    accumulated = replace(recurrent, train=replace(recurrent.train, accumulate=4))
    one = jax.devices()[:1]
    assert_same(steps(accumulated, batch, devices=one), steps(recurrent, batch, devices=one))
