"""Laws of muP (Yang 2022): nothing grows with the width but the width; at the base width it is the standard."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.gpt import gpt2_demo
from transformer_jax.config import ComputeConfig, OptimConfig, ScheduleConfig
from transformer_jax.errors import UserError
from transformer_jax.interop.families import writer_of
from transformer_jax.kernels.attention import Mask
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.bert_seq2seq import BertSeq2SeqConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.objectives import cross_entropy
from transformer_jax.optim import optimizer
from transformer_jax.train import Trainer

PLAIN = ComputeConfig(layers="unrolled")
OPTIM = OptimConfig(schedule=ScheduleConfig(peak=0.01, warmup=0), b2=0.95, eps=1e-12)
GPT = GPTConfig(vocab_size=23, context=9, layers=2, heads=4, init_std=0.1)
BERT = BertConfig(vocab_size=23, context=9, layers=2, heads=4, init_std=0.1, dropout=0.0, task="mlm")
TOKENS_BT = jax.random.randint(jax.random.key(1), (7, 9), 0, 23)
LABELS_BT = jnp.roll(TOKENS_BT, -1, 1)


def streams(model, tokens_BT):
    """Return what each block leaves in the stream, and the logits."""
    seen = {}
    if isinstance(model.config, BertConfig):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = model.embeddings(tokens_BT, positions_BT, 0 * tokens_BT, model.dtype)
        layers, mask = model.encoder.layers, Mask()
    else:
        x_BTD = model.placed(model.embedding(tokens_BT, model.dtype), None)
        layers, mask = model.decoder.layers, Mask(causal=True)
    for i, block in enumerate(layers):
        before_BTD = x_BTD
        x_BTD, _ = block(x_BTD, mask)
        seen[f"block {i}"] = x_BTD if isinstance(model.config, BertConfig) else x_BTD - before_BTD
        h_BTD = block.attention_residual.enter(before_BTD)
        q_BTNH = block.attention.q(h_BTD) * block.attention.query_scale
        seen[f"scores {i}"] = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, block.attention.k(h_BTD)) * q_BTNH.shape[-1] ** -0.5
    if isinstance(model.config, BertConfig):
        seen["logits"] = model.pretraining.tokens(x_BTD, model.embeddings.tokens)
    else:
        seen["logits"] = model.logits(model.normed(x_BTD))
    return seen


def trained(config, steps):
    """Return parameters before and after a few steps, and a function that looks inside."""
    skeleton = Skeleton.of(config, PLAIN)
    first = skeleton.init(jax.random.key(0))
    tx = optimizer(OPTIM, skeleton.letters, config.width_multiplier)

    def loss(params):
        return cross_entropy(streams(skeleton.bind(params), TOKENS_BT)["logits"], LABELS_BT).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = first, tx.init(first)
    for _ in range(steps):
        params, state = step(params, state)
    look = jax.jit(lambda params: streams(skeleton.bind(params), TOKENS_BT))
    return first, params, look


def growth(config, widths, steps=4):
    """Return, for each place, the exponent of the size of its change in training against the width."""
    sizes = []
    for width in widths:
        first, last, look = trained(replace(config, width=width), steps)
        moved = jax.tree.map(lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2))), look(last), look(first))
        sizes.append(moved)
    return {place: np.polyfit(np.log(widths), np.log([s[place] for s in sizes]), 1)[0] for place in sizes[0]}


@pytest.mark.slow
@pytest.mark.parametrize("config", [GPT, BERT], ids=["decoder", "encoder"])
def test_coordinate_check(config):
    """After a few steps, every activation has moved as far in a wide model as in a narrow one; without muP, farther."""
    config, widths = replace(config, layers=1), (32, 96, 256)
    mup, standard = growth(replace(config, base_width=32), widths), growth(config, widths)
    # Scores fall at first: queries and keys are still independent, and 8 / H is made for when they no longer are.
    assert mup.pop("scores 0") < 0.25
    assert max(abs(exponent) for exponent in mup.values()) < 0.25, mup
    assert standard["logits"] > 0.4, standard
    assert standard["block 0"] > mup["block 0"] + 0.3, (mup, standard)


def test_at_the_base_width_it_is_the_standard():
    """With heads of 64 channels: the same values drawn, the same logits, the same steps."""
    for config in (replace(GPT, width=128, heads=2), replace(BERT, width=128, heads=2)):
        standard, mup = trained(config, 2), trained(replace(config, base_width=128), 2)
        for a, b in zip(standard[:2], mup[:2], strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)
        look = jax.tree.map(np.testing.assert_array_equal, standard[2](standard[1]), mup[2](mup[1]))
        assert look.keys() >= {"logits", "block 1"}


def test_initial_sizes_follow_the_layout():
    """Matrices between hidden layers are drawn smaller by the root of the multiplier; tables and norms are not."""
    drawn = [
        Skeleton.of(c, PLAIN).init(jax.random.key(0))
        for c in (replace(GPT, width=64), replace(GPT, width=64, base_width=16))
    ]
    standard, mup = (dict(jax.tree_util.tree_leaves_with_path(params)) for params in drawn)
    letters = dict(jax.tree_util.tree_leaves_with_path(Skeleton.of(replace(GPT, width=64), PLAIN).letters))
    for path, leaf in standard.items():
        hidden = letters[path] in ("DNH", "DKH", "NHD", "DF", "FD")
        np.testing.assert_allclose(mup[path], leaf / 2 if hidden else leaf, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [replace(GPT, tied=False), replace(BERT, task="pretrain"), replace(GPT, task="classify", labels=5)],
    ids=["decoder", "encoder", "classifier"],
)
def test_rates_follow_the_letters(config):
    """Divided is what reads the width: matrices that grow on both sides, and heads; nothing else, scanned or not."""
    narrow, wide = (Skeleton.of(replace(config, width=width), PLAIN).abstract for width in (32, 64))
    for layers in ("unrolled", "scan"):
        skeleton = Skeleton.of(replace(config, width=32), ComputeConfig(layers=layers))
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), skeleton.abstract)
        updates = []
        for multiplier in (1.0, 4.0):
            tx = optimizer(OPTIM, skeleton.letters, multiplier)
            updates.append(tx.update(params, tx.init(params), params)[0])
        ratio = jax.tree.map(lambda a, b: float((a / b).mean()), *updates)
        if layers == "unrolled":
            grown = jax.tree.map(lambda a, b: sum(x != y for x, y in zip(a.shape, b.shape, strict=True)), narrow, wide)
            heads = jax.tree.map(lambda names: names == "DZ", skeleton.letters)
            expected = jax.tree.map(lambda axes, head: 4.0 if axes == 2 or head else 1.0, grown, heads)
            assert sum(jax.tree.leaves(heads)) == (config.task != "lm")
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ratio, expected)
            divided = sum(r > 2 for r in jax.tree.leaves(ratio["decoder" if "decoder" in ratio else "encoder"]))
        else:
            stack = ratio["decoder" if "decoder" in ratio else "encoder"]
            assert 2 * sum(r > 2 for r in jax.tree.leaves(stack)) == divided


def test_decay_times_rate_does_not_depend_on_the_width():
    config = replace(OPTIM, weight_decay=0.1)
    skeleton = Skeleton.of(replace(GPT, width=32), PLAIN)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), skeleton.abstract)
    still = jax.tree.map(jnp.zeros_like, params)
    plain, mup = (optimizer(config, skeleton.letters, m) for m in (1.0, 8.0))
    a, b = (tx.update(still, tx.init(params), params)[0] for tx in (plain, mup))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert min(float(leaf.min()) for leaf in jax.tree.leaves(a)) < 0


def test_what_mup_does_not_know_is_refused():
    demo = gpt2_demo()
    wide = replace(demo, model=replace(demo.model, base_width=32))
    Trainer.of(wide)
    with pytest.raises(UserError, match=r"rates of muP are known for optim\.kind=adam, not for lamb"):
        Trainer.of(replace(wide, optim=replace(wide.optim, kind="lamb")))
    with pytest.raises(UserError, match="base_width must not be negative"):
        replace(GPT, base_width=-1).check()
    with pytest.raises(UserError, match="an encoder or a decoder alone"):
        BertSeq2SeqConfig(base_width=64).check()
    for config in (replace(GPT, base_width=GPT.width), replace(BERT, base_width=32)):
        with pytest.raises(UserError, match=r"no config\.json can say"):
            writer_of(config)
