"""Laws of the decoder, in every dialect, and its equality with transformers' GPT-2, Llama, Mistral and Qwen 3."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exchange import CASES, imported, reference
from tests.sharded import assert_same_step_on_a_mesh
from tests.test_bench import products_of
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn import attention
from transformer_jax.nn.module import Skeleton, parameter_count
from transformer_jax.nn.stack import stack_layers, unstack_layers
from transformer_jax.objectives import CausalLM, label_scores, means
from transformer_jax.recipes import find_recipe

B, T, V = 5, 13, 38
UNROLLED, SCANNED = ComputeConfig(layers="unrolled"), ComputeConfig(layers="scan")
GPT2 = GPTConfig(vocab_size=V, context=47, width=24, layers=2, heads=4, feedforward=40)
LLAMA = GPTConfig(
    vocab_size=V,
    context=47,
    width=24,
    layers=2,
    heads=6,
    kv_heads=3,
    head_size=8,
    feedforward=40,
    activation="silu",
    gated=True,
    norm="rmsnorm",
    bias=False,
    positions="rope",
    tied=False,
)
DIALECTS = {
    "gpt1": replace(GPT2, pre_norm=False),
    "gpt2": GPT2,
    "gpt3": replace(GPT2, windows=(0, 5)),
    "llama": LLAMA,
    "sliding": replace(LLAMA, kv_heads=1, windows=(4,), qk_norm=True),
}
dialect = pytest.mark.parametrize("config", DIALECTS.values(), ids=DIALECTS)


def perturbed(skeleton, seed=0):
    """Random parameters with no zeros and ones, which hide mistakes; drawn by NumPy, which need not compile."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        return jax.device_put((0.25 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32))

    return jax.tree_util.tree_map_with_path(one, skeleton.abstract)


def model_of(config, compute=UNROLLED):
    skeleton = Skeleton.of(config, compute)
    return skeleton.bind(perturbed(skeleton))


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bert")])
def test_logits_equal_transformers(case, tmp_path):
    model, config = imported(case, tmp_path, SCANNED)
    batch, expected = reference(case)
    logits_BTV = np.asarray(jax.jit(model)(batch["tokens"], batch["segments"]))
    real_BT = batch["segments"] != 0
    assert logits_BTV.shape[-1] == config.vocab_size
    np.testing.assert_allclose(logits_BTV[real_BT], expected["next"][real_BT], atol=2e-5)


class _Given:
    """An embedding whose input side is given from outside."""

    def __init__(self, inner, x_BTD):
        self.inner, self.x_BTD = inner, x_BTD

    def __call__(self, _ids, _dtype):
        return self.x_BTD

    def logits(self, x_BTD):
        return self.inner.logits(x_BTD)


@dialect
def test_causality_by_gradient(config, tokens):
    model = model_of(config, SCANNED)
    embedding = model.embedding

    def logit(x_BTD, t):
        object.__setattr__(model, "embedding", _Given(embedding, x_BTD))
        return model(tokens[:1])[0, t].sum()

    gradient, x_BTD = jax.jit(jax.grad(logit)), embedding(tokens[:1], jnp.float32)
    depends_TS = np.stack([np.any(np.asarray(gradient(x_BTD, t)[0]) != 0, axis=-1) for t in range(T)])
    distance_TS = np.subtract.outer(np.arange(T), np.arange(T))
    windows = [config.window(i) for i in range(config.layers)]
    # Every layer looks as far back as its window; one that sees everything makes all of it reachable.
    reach = T if 0 in windows else sum(window - 1 for window in windows)
    np.testing.assert_array_equal(depends_TS, (distance_TS >= 0) & (distance_TS <= reach))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_window_is_what_one_layer_sees(config, tokens):
    maps = jax.jit(model_of(replace(config, windows=(0, 5))).attention_maps)(tokens)["decoder"]
    distance_TS = np.subtract.outer(np.arange(T), np.arange(T))
    for weights_BNTT, window in zip(maps, (T, 5), strict=True):
        seen_TS = (distance_TS >= 0) & (distance_TS < window)
        np.testing.assert_array_equal(np.asarray(weights_BNTT) > 0, np.broadcast_to(seen_TS, weights_BNTT.shape))
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


@dialect
def test_cached_decoding_equals_the_full_forward(config):
    """Ragged prompts, one token, several at once, some of them taken back, until the cache of a window wraps."""
    rng = np.random.default_rng(1)
    length_B, total = np.array([7, 1, 11, 4, 2]), 40
    rows_BT = rng.integers(0, V, (B, total)).astype(np.int32)
    model = model_of(config)
    full_BTV = jax.jit(model)(rows_BT)
    prompt_BT = np.where(np.arange(11) < length_B[:, None], rows_BT[:, :11], rng.integers(0, V, (B, 11)))
    start, extend = jax.jit(model.start, static_argnums=2), jax.jit(model.extend)
    row_B = np.arange(B)

    def following(count):
        return rows_BT[row_B[:, None], at_B[:, None] + np.arange(count)]

    def check(logits, count):
        expected = full_BTV[row_B[:, None], at_B[:, None] + np.arange(count)]
        np.testing.assert_allclose(logits, expected, atol=3e-5)

    logits_BV, state = start(prompt_BT, length_B, total)
    at_B = length_B - 1
    check(logits_BV[:, None], 1)
    at_B = length_B
    for count in (1, 6, 1, 6, 6, 6):
        logits, state = extend(state, following(count))
        check(logits, count)
        at_B = at_B + count
        if count == 6:  # say something else, take it back, and go on
            _, astray = extend(state, rng.integers(0, V, (B, 6)).astype(np.int32))
            state = astray._replace(length_B=astray.length_B - 6)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_heads_joined_in_a_cache_decode_as_apart(config, monkeypatch):
    """As on TPUs, where 64 numbers would fill 128 places."""
    monkeypatch.setattr(attention, "_joined", lambda heads: heads)
    test_cached_decoding_equals_the_full_forward(config)
    _, state = model_of(config).start(np.zeros((B, 3), np.int32), np.full(B, 3), 8)
    assert {past.k_BKSH.shape[1::2] for past in state.past} == {(1, 128)}


@dialect
def test_packed_and_padded_equal_each_text_alone(config, tokens):
    model = jax.jit(model_of(config, SCANNED))
    lengths = (6, 4, 2)
    packed, positions, segments = tokens.copy(), np.tile(np.arange(T), (B, 1)), np.zeros((B, T), np.int32)
    packed[0, :12] = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])
    positions[0, :12] = np.concatenate([np.arange(n) for n in lengths])
    segments[0, :12] = np.repeat([1, 2, 3], lengths)
    segments[1:] = np.arange(T) < np.array([[13], [7], [1], [4]])
    packed[1:] = np.where(segments[1:] > 0, tokens[1:], 3)  # what stands in the padding does not matter
    together = model(packed, segments, positions)
    # What follows a token does not matter to it, nor what else is in the batch.
    alone = model(tokens, np.ones((B, T), np.int32), np.tile(np.arange(T), (B, 1)))
    begin = 0
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(together[0, begin : begin + n], alone[i, :n], atol=2e-5)
        begin += n
    real = segments[1:] > 0
    np.testing.assert_allclose(np.asarray(together[1:])[real], np.asarray(alone[1:])[real], atol=2e-5)


def loss_and_gradient(compute, stacked, tokens):
    """Of a model with dropout, stacked."""
    skeleton = Skeleton.of(replace(LLAMA, layers=4, windows=(0, 5), dropout=0.1), compute)

    def loss(params):
        return jnp.square(skeleton.bind(params)(tokens, key=jax.random.key(7))).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(unstack_layers(stacked, skeleton.abstract))
    return value, stack_layers(gradient)


@pytest.fixture(scope="module")
def stacked():
    return perturbed(Skeleton.of(replace(LLAMA, layers=4, windows=(0, 5)), SCANNED))


@pytest.fixture(scope="module")
def plain(stacked):
    return loss_and_gradient(UNROLLED, stacked, np.arange(B * T).reshape(B, T) % V)


@pytest.mark.parametrize(
    ("layers", "remat"), [("scan", "none"), ("scan", "dots"), ("scan", "full"), ("unrolled", "full")]
)
def test_scan_and_remat_equal_plain(plain, stacked, layers, remat):
    compute = ComputeConfig(layers=layers, remat=remat)
    value, gradient = loss_and_gradient(compute, stacked, np.arange(B * T).reshape(B, T) % V)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=2e-4), gradient, plain[1])


def packed_batch(rows, length, seed=0):
    """Rows of two documents and padding, the last row empty."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(1, length // 2, rows), rng.integers(1, length // 2, rows)
    place = np.arange(length)
    segments = np.where(place < first[:, None], 1, np.where(place < (first + second)[:, None], 2, 0))
    segments[-1] = 0
    tokens = rng.integers(0, V, (rows, length))
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    arrays = {
        "tokens": tokens,
        "targets": np.where(same, np.roll(tokens, -1, 1), -1),
        "segments": segments,
        "positions": np.where(segments == 2, place - first[:, None], place),
        "example": np.arange(rows),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()} | {"bytes": np.ones(rows, np.float32)}


def test_a_row_without_positions_is_one_text():
    batch = packed_batch(8, T)
    model = Skeleton.of(DIALECTS["gpt2"], SCANNED)
    model = model.bind(model.init(jax.random.key(0)))
    joined = batch | {"segments": np.sign(batch["segments"])}
    one = joined | {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (8, T))}
    del joined["positions"]
    read = jax.jit(model.read)
    real = one["segments"] > 0
    np.testing.assert_allclose(read(joined)[real], read(one)[real], atol=1e-5)
    assert not np.allclose(read(joined)[real], read(batch)[real], atol=1e-2)


@pytest.mark.parametrize("apart", [True, False])
def test_sharded_equals_single_device(apart):
    config = replace(LLAMA, layers=4, kv_heads=2, windows=(0, 5), qk_norm=True)
    experiment = Experiment(
        name="tiny",
        model=config,
        objective=CausalLM(z_loss=1e-3, chunk=5),
        data=PackedText("none", context=T),
        optim=OptimConfig(schedule=ScheduleConfig(peak=1e-2, warmup=0), clip_norm=0.1, weight_decay=0.01, eps=1e-4),
        train=TrainConfig(),
        compute=SCANNED,
    )
    batch = packed_batch(8, T)
    if not apart:
        del batch["positions"]
    assert_same_step_on_a_mesh(experiment, batch)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "count"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_has_as_many_parameters_as_the_published_weights(layers, width, heads, count):
    skeleton = Skeleton.of(GPTConfig(layers=layers, width=width, heads=heads), SCANNED)
    assert parameter_count(skeleton.abstract) == count


@pytest.mark.parametrize("windows", [(), (5,), (0, 5)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_forward_flops_are_those_of_the_program(name, windows, tokens):
    config = replace(DIALECTS[name], windows=windows, layers=4)
    skeleton = Skeleton.of(config, SCANNED)
    program = jax.make_jaxpr(lambda params: skeleton.bind(params)(tokens))(skeleton.abstract)
    shapes = {"tokens": (B, T), "targets": (B, T)}
    # All T x T scores are computed; what counts is a half of them, or those in the window.
    counted = [w * T - w * (w - 1) / 2 if w else T * T / 2 for w in map(config.window, range(4))]
    unseen = 4 * config.block.heads * config.block.size * sum(T * T - seen for seen in counted)
    assert products_of(program.jaxpr) - config.forward_flops(shapes) == B * unseen
    classify = replace(config, task="classify", labels=3)
    head = 2 * config.width * (V * T - 3)
    assert config.forward_flops(shapes) - classify.forward_flops({"tokens": (B, T)}) == B * head


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.3), (5, 0.0), (50, 0.3)])
def test_chunked_loss_equals_unchunked(chunk, z_loss):
    batch = {name: x for name, x in packed_batch(B, T).items() if name != "example"}
    skeleton = Skeleton.of(replace(LLAMA, layers=1), SCANNED)
    params = perturbed(skeleton)

    def loss(objective, params):
        sums = objective(skeleton.bind(params), batch, None)
        return means(sums, objective.weights(batch))["loss"], sums

    results = [
        jax.jit(jax.value_and_grad(lambda p, o=objective: loss(o, p), has_aux=True))(params)
        for objective in (CausalLM(z_loss=z_loss), CausalLM(z_loss=z_loss, chunk=chunk))
    ]
    ((value, sums), gradient), ((chunked, chunked_sums), chunked_gradient) = results
    np.testing.assert_allclose(chunked, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), chunked_sums, sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), chunked_gradient, gradient)


def test_the_loss_counts_targets_and_the_z_loss_is_its_formula():
    batch, model = packed_batch(B, T), model_of(GPT2, SCANNED)
    del batch["example"]
    logits = np.asarray(jax.jit(model)(batch["tokens"], batch["segments"], batch["positions"]), np.float64)
    real = batch["targets"] >= 0
    z = np.log(np.exp(logits).sum(-1))
    nll = (z - np.take_along_axis(logits, np.maximum(batch["targets"], 0)[..., None], -1)[..., 0])[real].sum()
    objective = CausalLM(z_loss=0.01)
    assert objective.weights(batch)["tokens"] == real.sum() > 0
    sums = jax.jit(lambda batch: objective(model, batch, None))(batch)["tokens"]
    np.testing.assert_allclose(sums["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], nll + 0.01 * (z[real] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], (logits.argmax(-1) == batch["targets"]).sum())


def test_labels_are_read_at_the_last_real_token(tokens):
    model = model_of(replace(GPT2, task="classify", labels=3), SCANNED)
    length_B = np.array([13, 7, 1, 4, 9])
    segments = (np.arange(T) < length_B[:, None]).astype(np.int32)
    scores = jax.jit(lambda b: model.label(model.read(b), b["segments"]))({"tokens": tokens, "segments": segments})
    assert scores.shape == (B, 3)
    x_BTD = jax.jit(model.features)(tokens)
    np.testing.assert_allclose(scores, model.head(x_BTD[np.arange(B), length_B - 1]), atol=2e-5)


def test_both_orders_of_two_texts_score_the_same_as_their_exchange(tokens):
    model = model_of(replace(GPT2, task="classify", labels=3), SCANNED)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "swapped": jnp.roll(tokens, 3, axis=1)}
    exchanged = batch | {"tokens": batch["swapped"], "swapped": tokens}
    score = jax.jit(lambda b: label_scores(model, model.read(b), b))
    one, other = score(batch), score(exchanged)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    alone = {name: array for name, array in batch.items() if name != "swapped"}
    assert jnp.abs(one - score(alone)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, r"model\.kv_heads=3 does not divide model\.heads=4"),
        ({"heads": 5}, r"model\.heads=5 does not divide model\.width=24"),
        ({"positions": "rope", "head_size": 5}, "RoPE turns pairs of channels, but a head has 5"),
        ({"windows": (0, -1)}, r"model\.windows must not be negative"),
        ({"task": "classify"}, r"needs model\.labels"),
        ({"layers": 0}, r"model\.layers must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        replace(GPT2, **change).check()


def test_a_ramp_too_fine_for_a_mesh_says_which_is_not():
    """GPT-3's begins with 16 rows; for 64 shards the message holds a ramp of as many tokens."""
    data = find_recipe("gpt3_125m").data
    with pytest.raises(UserError, match=r"data\.ramp = 16 is no multiple of data\.rows_multiple = 64") as raised:
        replace(data, rows_multiple=64).check()
    flags = str(raised.value).rpartition("--data.ramp ")[2].split()
    ramp = tuple(zip(map(int, flags[::2]), map(int, flags[1::2]), strict=True))
    replace(data, rows_multiple=64, ramp=ramp).check()
    rows, wanted = (sum(size * steps for size, steps in stages) for stages in (ramp, data.ramp))
    assert rows == pytest.approx(wanted, rel=1e-4)
