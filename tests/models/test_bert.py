"""Laws of BERT and its heads, and its equality with transformers'."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exchange import CASES, imported, reference
from tests.models.test_gpt import SCANNED, UNROLLED, model_of, perturbed
from tests.sharded import assert_same_step_on_a_mesh
from tests.test_bench import products_of
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.interop.bert import BERT
from transformer_jax.interop.certificate import compare
from transformer_jax.models.bert import BertConfig
from transformer_jax.nn.module import Skeleton, parameter_count
from transformer_jax.nn.stack import stack_layers, unstack_layers
from transformer_jax.objectives import Classification, MaskedLM, SpanExtraction, means

B, T, M, V = 8, 13, 3, 38
CONFIG = BertConfig(vocab_size=V, context=17, width=24, layers=3, heads=4, feedforward=40, dropout=0.0)
SIZES = {  # layers, width, heads, encoder with embeddings and pooler; Turc 2019 for the small ones
    "tiny": (2, 128, 2, 4_385_920),
    "mini": (4, 256, 4, 11_170_560),
    "small": (4, 512, 8, 28_763_648),
    "medium": (8, 512, 8, 41_373_184),
    "base": (12, 768, 12, 109_482_240),
    "large": (24, 1024, 16, 335_141_888),
}


@pytest.fixture
def batch():
    """Rows of ragged pairs with gaps, the last empty; what stands in padding and in unused gaps is arbitrary."""
    rng = np.random.default_rng(0)
    length_B = np.array([13, 7, 2, 4, 11, 9, 13, 0])
    place_T = np.arange(T)
    used_BM = np.arange(M) < np.minimum(length_B, [3, 2, 1, 3, 0, 2, 3, 0])[:, None]
    arrays = {
        "tokens": rng.integers(0, V, (B, T)),
        "types": place_T >= length_B[:, None] // 2,
        "segments": place_T < length_B[:, None],
        "positions_masked": rng.integers(0, 1000, (B, M)) % np.maximum(length_B, 1)[:, None],
        "targets": np.where(used_BM, rng.integers(0, V, (B, M)), -1),
        "next": np.where(length_B > 3, rng.integers(0, 2, B), -1),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("bert")])
def test_outputs_equal_transformers(case, tmp_path):
    model, _ = imported(case, tmp_path, SCANNED)
    batch, expected = reference(case)
    outputs = jax.jit(lambda batch: BERT.outputs(model, batch))(batch)
    for name, m in compare(outputs, expected, batch).items():
        assert m["difference"] < 2e-5, name


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    layers, width, heads, count = SIZES[size]
    config = BertConfig(layers=layers, width=width, heads=heads, task="encode")
    assert parameter_count(Skeleton.of(config, SCANNED).abstract) == count
    # What pre-training adds: a transform, its norm, a bias for each token, and the head of the second task.
    added = width * width + width + 2 * width + 30_522 + 2 * width + 2
    assert parameter_count(Skeleton.of(replace(config, task="pretrain"), SCANNED).abstract) == count + added


def test_padding_and_the_other_rows_change_nothing(batch):
    model = model_of(CONFIG, SCANNED)
    read = jax.jit(model)
    plain = np.asarray(read(batch["tokens"], batch["types"], batch["segments"]))
    real = batch["segments"] != 0
    other = {name: np.where(real, batch[name], 1 - batch[name] % 2) for name in ("tokens", "types")}
    np.testing.assert_allclose(read(**_named(other, batch))[real], plain[real], atol=1e-5)
    turned = {name: array[::-1] for name, array in batch.items()}
    np.testing.assert_allclose(read(**_named(turned, turned))[::-1][real], plain[real], atol=1e-5)
    longer = {name: np.pad(batch[name], ((0, 0), (0, 4))) for name in ("tokens", "types", "segments")}
    np.testing.assert_allclose(read(**_named(longer, longer))[:, :T][real], plain[real], atol=1e-5)


def _named(arrays, batch):
    return {"tokens_BT": arrays["tokens"], "types_BT": arrays["types"], "segments_BT": batch["segments"]}


def test_every_token_sees_both_sides_and_its_type_and_place(batch):
    model = model_of(CONFIG, SCANNED)
    read = jax.jit(model)
    row = {name: array[:1] for name, array in batch.items()}
    plain = read(**_named(row, row))[0]
    for name, change in (("tokens", 1), ("types", 1)):
        for t in (0, T - 1):
            changed = row[name].copy()
            changed[0, t] = (changed[0, t] + change) % 2 if name == "types" else (changed[0, t] + change) % V
            moved = np.abs(read(**_named(row | {name: changed}, row))[0] - plain).max(-1)
            assert np.all(moved > 1e-4), name
    swapped = row["tokens"].copy()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    same_bag = read(**_named(row | {"tokens": swapped}, row))[0]
    assert np.abs(same_bag[0] - plain[0]).max() > 1e-4


@pytest.mark.parametrize(("layers", "remat"), [("scan", "none"), ("scan", "dots"), ("unrolled", "full")])
def test_scan_and_remat_equal_plain(batch, layers, remat):
    config = replace(CONFIG, dropout=0.1, layers=2)
    stacked = perturbed(Skeleton.of(config, SCANNED))

    def run(compute):
        skeleton = Skeleton.of(config, compute)

        def loss(params):
            sums = MaskedLM()(skeleton.bind(params), batch, jax.random.key(7))
            return means(sums, MaskedLM().weights(batch))["loss"]

        value, gradient = jax.jit(jax.value_and_grad(loss))(unstack_layers(stacked, skeleton.abstract))
        return value, stack_layers(gradient)

    (value, gradient), (expected, expected_gradient) = run(ComputeConfig(layers=layers, remat=remat)), run(UNROLLED)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=2e-4), gradient, expected_gradient)


def test_sharded_equals_single_device(batch):
    experiment = Experiment(
        name="tiny",
        model=CONFIG,
        objective=MaskedLM(),
        data=PackedText("none", context=T),
        optim=OptimConfig(schedule=ScheduleConfig(peak=1e-2, warmup=0), clip_norm=0.1, weight_decay=0.01, eps=1e-4),
        train=TrainConfig(),
        compute=SCANNED,
    )
    assert_same_step_on_a_mesh(experiment, batch)


def test_masked_lm_is_the_sum_of_two_means_over_gaps_and_pairs(batch):
    model = model_of(CONFIG, SCANNED)
    x_BTD = jax.jit(model.read)(batch)
    everywhere = np.broadcast_to(np.arange(T), (B, T))
    log_p_BTV = jax.nn.log_softmax(model.fill(x_BTD, everywhere))
    log_p_B2 = jax.nn.log_softmax(model.follows(x_BTD))
    gaps = [
        log_p_BTV[b, batch["positions_masked"][b, m], batch["targets"][b, m]]
        for b in range(B)
        for m in range(M)
        if batch["targets"][b, m] >= 0
    ]
    pairs = [log_p_B2[b, batch["next"][b]] for b in range(B) if batch["next"][b] >= 0]
    objective = MaskedLM()
    weights = objective.weights(batch)
    assert (weights["masked"], weights["pairs"]) == (len(gaps), len(pairs)) == (14, 6)
    found = means(jax.jit(lambda b: objective(model, b, None))(batch), weights)
    np.testing.assert_allclose(found["mlm_nll"], -np.mean(gaps), rtol=1e-5)
    np.testing.assert_allclose(found["nsp_nll"], -np.mean(pairs), rtol=1e-5)
    np.testing.assert_allclose(found["loss"], -np.mean(gaps) - np.mean(pairs), rtol=1e-5)


def test_masked_lm_ignores_what_is_no_gap(batch):
    model = model_of(CONFIG, SCANNED)
    run = jax.jit(lambda b: MaskedLM()(model, b, None))
    unused = batch["targets"] < 0
    moved = np.where(unused, 0, batch["positions_masked"])
    assert np.any(moved != batch["positions_masked"])
    plain, other = run(batch), run(batch | {"positions_masked": moved})
    jax.tree.map(np.testing.assert_array_equal, other, plain)


@pytest.mark.parametrize("task", ["pretrain", "mlm", "classify", "tag", "span", "encode"])
def test_forward_flops_are_those_of_the_program(task, batch):
    config = replace(CONFIG, task=task, labels=5)
    skeleton = Skeleton.of(config, SCANNED)
    objective = {
        "pretrain": MaskedLM(),
        "mlm": MaskedLM(next_sentence=False),
        "classify": Classification(),
        "tag": Classification("tags"),
        "span": SpanExtraction(),
        "encode": lambda model, batch, _: model.read(batch),
    }[task]
    label = np.zeros((B, T) if task == "tag" else B, np.int32)
    full = batch | {"label": label, "start": np.zeros(B, np.int32), "end": np.zeros(B, np.int32)}
    program = jax.make_jaxpr(lambda params: objective(skeleton.bind(params), full, None))(skeleton.abstract)
    assert products_of(program.jaxpr) == config.forward_flops({name: x.shape for name, x in full.items()})


def test_attention_maps_are_distributions_over_the_row(batch):
    model = model_of(CONFIG)
    maps = jax.jit(model.attention_maps)(batch["tokens"], batch["types"])["encoder"]
    assert maps.shape == (3, B, 4, T, T)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert np.all(np.asarray(maps) > 0)


def test_a_head_that_is_not_there(batch):
    model = model_of(replace(CONFIG, task="span"), SCANNED)
    x_BTD = jnp.zeros((1, 2, 24))
    for call in (
        lambda: model.pooled(x_BTD),
        lambda: model.follows(x_BTD),
        lambda: model.fill(x_BTD, jnp.zeros((1, 1), int)),
    ):
        with pytest.raises(ValueError, match=r"model\.task=span has no"):
            call()
    with pytest.raises(ValueError, match=r"model\.task=mlm has no head for the next sentence"):
        model_of(replace(CONFIG, task="mlm"), SCANNED).follows(x_BTD)
    with pytest.raises(ValueError, match=r"model\.task=mlm has no head for labels"):
        model_of(replace(CONFIG, task="mlm"), SCANNED).label(x_BTD, None)
    with pytest.raises(UserError, match=r"model\.task=tag needs model\.labels"):
        replace(CONFIG, task="tag").check()
