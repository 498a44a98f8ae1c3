"""Laws of the encoder-decoder, and its equality with PyTorch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.config import ComputeConfig
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.nn.module import Skeleton

# Pairwise different sizes: a transposed axis cannot pass.
CONFIG = TransformerConfig(
    vocab_size=37, width=24, heads=3, feedforward=40, encoder_layers=2, decoder_layers=4, dropout=0.3
)
B, S, T = 5, 11, 7
UNROLLED, SCANNED = ComputeConfig(layers="unrolled"), ComputeConfig(layers="scan")


def perturbed(skeleton, seed=0):
    """Random parameters with no zeros and ones, which hide mistakes."""
    params = skeleton.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(params=[False, True], ids=["post", "pre"])
def model(request):
    skeleton = Skeleton.of(replace(CONFIG, pre_norm=request.param), UNROLLED)
    return skeleton.bind(perturbed(skeleton))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    source, target = rng.integers(3, 37, (B, S)), rng.integers(3, 37, (B, T))
    for row, length in enumerate((11, 4, 7, 1, 9)):
        source[row, length:] = 0
    return source, target


def test_logits_equal_pytorch(batch):
    reference = np.load(Path(__file__).parent.parent / "fixtures" / "transformer_reference.npz")
    for variant, pre_norm in (("post", False), ("pre", True)):
        config = TransformerConfig(
            vocab_size=37,
            width=24,
            heads=int(reference["heads"]),
            feedforward=40,
            encoder_layers=2,
            decoder_layers=3,
            pre_norm=pre_norm,
            attention_bias=True,
        )
        skeleton = Skeleton.of(config, UNROLLED)
        weights = {k.removeprefix(f"{variant}/"): v for k, v in reference.items() if k.startswith(f"{variant}/")}
        params = from_pytorch(weights, config)
        assert jax.tree.structure(params) == jax.tree.structure(skeleton.abstract)
        model = skeleton.bind(params)
        source, target = reference["source_BS"], reference["target_in_BT"]
        logits = np.asarray(model(source, target))
        memory = np.asarray(model.encode(source).x_BSD)
        np.testing.assert_allclose(memory[source != 0], weights["encoder_out_BSD"][source != 0], atol=2e-5)
        np.testing.assert_allclose(logits[target != 0], weights["logits_BTV"][target != 0], atol=2e-5)


def from_pytorch(weights, config):
    """Rename and reshape the state dict of PyTorch's layers to our parameters."""
    n, d = config.heads, config.width
    h = d // n

    def attention(name):
        q, k, v = np.split(weights[f"{name}.in_proj_weight"], 3)
        biases = np.split(weights[f"{name}.in_proj_bias"], 3)
        heads = {
            letter: {"weight": w.T.reshape(d, n, h), "bias": b.reshape(n, h)}
            for letter, w, b in zip("qkv", (q, k, v), biases, strict=True)
        }
        out = {
            "weight": weights[f"{name}.out_proj.weight"].T.reshape(n, h, d),
            "bias": weights[f"{name}.out_proj.bias"],
        }
        return heads | {"out": out}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def linear(name):
        return {"weight": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def layer(name, residuals):
        parts = {"attention": attention(f"{name}.self_attn")}
        parts["feedforward"] = {"up": linear(f"{name}.linear1"), "down": linear(f"{name}.linear2")}
        parts |= {f"{r}_residual": {"norm": norm(f"{name}.norm{i + 1}")} for i, r in enumerate(residuals)}
        if "cross" in residuals:
            parts["cross"] = attention(f"{name}.multihead_attn")
        return parts

    params = {"embedding": {"table": weights["embedding"]}}
    for side, depth, residuals in (
        ("encoder", config.encoder_layers, ("attention", "feedforward")),
        ("decoder", config.decoder_layers, ("attention", "cross", "feedforward")),
    ):
        params[side] = {"layers": {i: layer(f"{side}.layers.{i}", residuals) for i in range(depth)}}
        if config.pre_norm:
            params[f"{side}_norm"] = norm(f"{side}.norm")
    return params


def test_causality_by_gradient(model, batch):
    source, target = batch
    x = jnp.asarray(model.embedding(target, jnp.float32))

    def logits_at(x_BTD, t):
        # The embedded target enters through a lookup that is replaced by x itself.
        object.__setattr__(model, "embedding", _Given(model.embedding, x_BTD))
        return model(source, target)[:, t].sum()

    original = model.embedding
    for t in range(T):
        gradient = jax.grad(logits_at)(x, t)
        object.__setattr__(model, "embedding", original)
        assert not np.any(gradient[:, t + 1 :])
        assert np.all(np.any(gradient[:, : t + 1] != 0, axis=-1))


class _Given:
    """An embedding whose target side is given from outside."""

    def __init__(self, inner, x_BTD):
        self.inner, self.x_BTD = inner, x_BTD

    def __call__(self, ids, dtype):
        return self.x_BTD if ids.shape[1] == T else self.inner(ids, dtype)

    def logits(self, x_BTD):
        return self.inner.logits(x_BTD)


def test_padding_changes_nothing(model, batch):
    source, target = batch
    plain = model(source, target)
    padded = model(np.pad(source, ((0, 0), (0, 6))), np.pad(target, ((0, 0), (0, 3))))[:, :T]
    np.testing.assert_allclose(padded, plain, atol=1e-5)
    # Nor does it matter what else is in the batch.
    np.testing.assert_allclose(model(source[2:3], target[2:3]), plain[2:3], atol=1e-5)


def test_cached_decoding_equals_full_forward(model, batch):
    source, target = batch
    full = model(source, target)
    state, memory = model.start(source, T)
    for t in range(T):
        logits, state = model.step(state, memory, target[:, t])
        np.testing.assert_allclose(logits, full[:, t], atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_scan_and_remat_equal_plain(batch, remat, layers):
    from transformer_jax.nn.stack import stack_layers, unstack_layers

    source, target = batch
    plain = Skeleton.of(CONFIG, UNROLLED)
    params = perturbed(plain)
    other = Skeleton.of(CONFIG, ComputeConfig(layers=layers, remat=remat))
    stacked = stack_layers(params)

    def loss(skeleton, params):
        return jnp.square(skeleton.bind(params)(source, target, key=jax.random.key(7))).mean()

    value, gradient = jax.value_and_grad(lambda p: loss(plain, p))(params)
    other_value, other_gradient = jax.value_and_grad(lambda p: loss(other, p))(unstack_layers(stacked, other.abstract))
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(stack_layers(other_gradient)), jax.tree.leaves(stack_layers(gradient)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_attention_maps_are_distributions_that_ignore_padding(model, batch):
    source, target = batch
    maps = model.attention_maps(source, target)
    sizes = {"encoder": (2, B, 3, S, S), "decoder": (4, B, 3, T, T), "cross": (4, B, 3, T, S)}
    assert {name: weights.shape for name, weights in maps.items()} == sizes
    for name, weights in maps.items():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        if name != "decoder":
            hidden = np.broadcast_to((source == 0)[None, :, None, None], weights.shape)
            assert np.all(np.asarray(weights)[hidden] == 0)
    assert not np.any(np.triu(np.ones((T, T)), 1) * np.asarray(maps["decoder"]))


def test_bfloat16_stays_near_float32_and_parameters_stay_float32(batch):
    source, target = batch
    plain, half = Skeleton.of(CONFIG, UNROLLED), Skeleton.of(CONFIG, replace(UNROLLED, dtype="bfloat16"))
    params = plain.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0)))} == {jnp.dtype("float32")}
    exact, rounded = plain.bind(params)(source, target), half.bind(params)(source, target)
    assert rounded.dtype == jnp.float32
    difference = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 0 < difference < 0.05


def test_every_parameter_has_letters():
    from flax import nnx

    class Forgetful(TransformerConfig):
        def build(self, key, compute):
            model = super().build(key, compute)
            model.extra = nnx.Param(jnp.zeros((2, 3)), letters="D")
            return model

    with pytest.raises(TypeError, match=r"parameter extra of shape \(2, 3\) declares the letters 'D'"):
        Skeleton.of(Forgetful(vocab_size=37, width=24, heads=3, feedforward=40), UNROLLED)
