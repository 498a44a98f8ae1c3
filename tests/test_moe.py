"""Laws of experts: one of them is the dense layer, who comes first is served first, and a mesh changes no number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax
from tests.exchange import write
from tests.fixtures.random_weights import tensors
from tests.test_bench import products_of
from tests.test_plan_hlo import compiled, gpt
from tests.tiny_gpt import GPT2, completer
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig, OptimConfig, ScheduleConfig
from transformer_jax.errors import UserError
from transformer_jax.generation import Generation
from transformer_jax.interop.families import writer_of
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.importing import plan_of, read_params
from transformer_jax.interop.mixtral import MIXTRAL
from transformer_jax.interop.reference import REFERENCES
from transformer_jax.interop.table import export_row
from transformer_jax.interop.tensors import Tensors
from transformer_jax.models import GPTConfig
from transformer_jax.nn.layers import normal
from transformer_jax.nn.module import Skeleton
from transformer_jax.nn.moe import SUMS, Experts, ExpertsConfig, routing
from transformer_jax.nn.stack import stack_layers
from transformer_jax.objectives import CausalLM, Classification, means
from transformer_jax.optim import optimizer
from transformer_jax.planning.collectives import collectives
from transformer_jax.planning.hlo import parse
from transformer_jax.recipes import find_recipe
from transformer_jax.train import Trainer

B, T, D, F, E, Z, V, N = 3, 22, 12, 20, 5, 2, 37, 4
KEY = jax.random.key(7)
GELU = {"activation": "gelu", "gated": False, "bias": True, "init": normal(0.5), "residual_init": normal(0.5)}
SWIGLU = {"activation": "silu", "gated": True, "bias": False, "init": normal(0.5), "residual_init": normal(0.5)}
DIALECTS = pytest.mark.parametrize("dialect", [GELU, SWIGLU], ids=["gelu", "swiglu"])
LIMITED = pytest.mark.parametrize("limited", [True, False], ids=["limited", "unlimited"])


def noisy(module, seed=1, share=0.3):
    """Perturb a module, its biases included."""
    leaves, tree = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + share * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def layer(dialect=GELU, **settings):
    config = ExpertsConfig(**{"count": E, "chosen": Z, "capacity": 0.8} | settings)
    return noisy(Experts(jax.random.key(0), D, F, config, **dialect))


def stream(seed=2, length=T):
    return jax.random.normal(jax.random.key(seed), (B, length, D))


def real(lengths=(T, 13, 0)):
    return jnp.arange(T)[None] < jnp.asarray(lengths)[:, None]


def expert(module, number):
    return jax.tree.map(lambda leaf: leaf[number], module.experts)


@DIALECTS
@LIMITED
def test_one_expert_is_the_dense_layer(dialect, limited):
    moe = layer(dialect, count=1, chosen=1, capacity=1.0, normalised=dialect is GELU)
    out, sums = moe(stream(), limited=limited)
    np.testing.assert_allclose(out, expert(moe, 0)(stream()), rtol=1e-5, atol=1e-5)
    assert dict(zip(SUMS, sums.tolist(), strict=True))["dropped"] == 0


@DIALECTS
@LIMITED
def test_equal_experts_are_the_dense_layer(dialect, limited):
    moe = layer(dialect, chosen=E, capacity=1.0)
    moe.experts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), moe.experts)
    np.testing.assert_allclose(moe(stream(), limited=limited)[0], expert(moe, 0)(stream()), rtol=1e-4, atol=1e-4)


@LIMITED
def test_the_order_of_experts_does_not_matter(limited):
    moe, order = layer(), np.array([3, 0, 4, 2, 1])
    expected, sums = moe(stream(), real(), limited=limited)
    moe.experts = jax.tree.map(lambda leaf: leaf[order], moe.experts)
    moe.router.weight = moe.router.weight.replace(moe.router.weight[...][:, order])
    out, permuted = moe(stream(), real(), limited=limited)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(permuted, sums, rtol=1e-5)


@pytest.mark.parametrize(
    ("dialect", "normalised", "group", "capacity"),
    [
        (GELU, True, 0, 0.8),
        (SWIGLU, False, 5, 1.0),
        (GELU, False, 11, 0.3),
        (SWIGLU, True, 0, 0.0),
        (GELU, True, 40, 9.0),
    ],
)
def test_tokens_are_served_in_their_order(dialect, normalised, group, capacity):
    """Token by token, in plain words: outputs, and what is summed."""
    moe = layer(dialect, group=group, capacity=capacity, normalised=normalised)
    x_BTD, real_BT = stream(), real()
    out, sums = moe(x_BTD, real_BT, limited=True)
    size = min(group, T) or T
    places = math.ceil(capacity * Z * size / E) if capacity else T
    weight_DE = np.asarray(moe.router.weight[...], np.float64)
    results = np.stack([np.asarray(expert(moe, e)(x_BTD)) for e in range(E)])
    expected, told, taken = np.zeros((B, T, D)), dict.fromkeys(SUMS, 0.0), np.zeros(E)
    for b in range(B):
        row, mean = np.zeros(E), np.zeros(E)
        for t in range(T):
            if t % size == 0:
                used = np.zeros(E, int)
            if not real_BT[b, t]:
                continue
            logits = np.asarray(x_BTD[b, t], np.float64) @ weight_DE
            share = np.exp(logits) / np.exp(logits).sum()
            told["z"] += np.log(np.exp(logits).sum()) ** 2
            mean += share / real_BT[b].sum()
            best = np.argsort(-share)[:Z]
            for e in best:
                row[e] += 1
                if used[e] < places:
                    weight = share[e] / share[best].sum() if normalised else share[e]
                    expected[b, t] += weight * results[e, b, t]
                    used[e] += 1
                else:
                    told["dropped"] += 1 / Z
        told["balance"] += E / Z * (row * mean).sum()
        taken += row
    told["fullest"] = taken.max() / taken.mean() * real_BT.sum()
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(sums, [told[name] for name in SUMS], rtol=1e-4)
    assert (told["dropped"] > 0) == (capacity in (0.8, 1.0, 0.3))


@LIMITED
def test_padding_takes_no_place(limited):
    """Whatever stands there, and wherever: the real positions get what they get alone."""
    moe = layer(capacity=0.5, group=0)
    real_BT = jnp.asarray(np.random.default_rng(0).permuted(np.arange(T) < 14, axis=0))[None].repeat(B, 0)
    places = np.flatnonzero(real_BT[0])
    x_BTD, changed = stream(), jnp.where(real_BT[..., None], stream(), 9.0)
    out, sums = moe(x_BTD, real_BT, limited=limited)
    other, others = moe(changed, real_BT, limited=limited)
    np.testing.assert_array_equal(other, out)
    np.testing.assert_array_equal(others, sums)
    np.testing.assert_array_equal(out[:, np.flatnonzero(~real_BT[0])], 0)
    if not limited:
        np.testing.assert_allclose(out[:, places], moe(x_BTD[:, places], limited=False)[0], atol=1e-5)


def test_balance_is_least_where_all_are_alike():
    """1 at uniform routing; more as soon as the router prefers some experts."""
    config = ExpertsConfig(count=E, chosen=1, balance_loss=0.25, z_loss=0.0)
    moe = layer(count=E, chosen=1)
    balances = []
    for scale in (0.0, 1.0, 5.0):
        # Constant logits: everyone prefers the same experts.
        moe.router.weight = moe.router.weight.replace(scale * jnp.eye(D, E))
        x_BTD = jnp.zeros((B, T, D)).at[..., 0].set(1.0)
        sums = moe(x_BTD, limited=True)[1]
        balances.append(float(sums[0]) / (B * T))
    assert balances[0] == pytest.approx(1.0)
    assert balances[0] < balances[1] < balances[2] < E
    told = routing(jnp.stack([sums, sums]), config)
    assert float(told["loss"]) == pytest.approx(2 * 0.25 * float(told["load_balance"]))


# In the model.

MODEL = GPTConfig(
    *(V, 24, D, 2, N), feedforward=F, init_std=0.5, experts=ExpertsConfig(count=E, chosen=Z, capacity=0.9, group=4)
)


@cache
def parameters(model=MODEL, layers="unrolled", remat="none"):
    skeleton = Skeleton.of(model, ComputeConfig(layers=layers, remat=remat))
    return skeleton, jax.jit(lambda key: noisy(skeleton.init(key), share=0.1))(jax.random.key(3))


def batch(rows=B, length=24, seed=0):
    """Packed documents, padding at the end, and a row of it."""
    rng = np.random.default_rng(seed)
    place, lengths = np.arange(length)[None], np.array([length, 17, *[9] * (rows - 3), 0])[:, None]
    segments = np.where(place < lengths, 1 + (place >= lengths // 3), 0)
    tokens = np.where(segments, rng.integers(4, V, (rows, length)), 0)
    targets = np.where(segments, rng.integers(4, V, (rows, length)), -1)
    positions = np.tril(segments[:, :, None] == segments[:, None]).sum(-1) - 1
    found = {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in found.items()} | {"bytes": np.ones(rows, np.float32)}


def loss_of(skeleton, objective, key=KEY):
    def loss(params, batch):
        sums = objective(skeleton.bind(params), batch, key)
        values = means(sums, objective.weights(batch))
        return values["loss"], values

    return loss


def test_scanned_and_recomputed_is_unrolled():
    results = []
    for layers, remat in (("unrolled", "none"), ("scan", "full"), ("unrolled", "dots")):
        skeleton, _ = parameters(layers=layers, remat=remat)
        params = parameters()[1] if layers == "unrolled" else stack_layers(parameters()[1])
        step = jax.jit(jax.value_and_grad(loss_of(skeleton, CausalLM(chunk=5)), has_aux=True))
        (_, values), grads = step(params, batch())
        results.append((values, stack_layers(grads)))
    for values, grads in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), values, results[0][0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, results[0][1])
    values = results[0][0]
    assert values["loss"] > values["nll"] + 2 * 0.01, "two layers add at least their least balance"
    assert 0 < values["dropped"] < 1 < values["fullest_expert"] < E


def test_no_token_depends_on_a_later_one():
    """Neither by value nor by a place that it takes."""
    skeleton, params = parameters(replace(MODEL, experts=replace(MODEL.experts, capacity=0.4)))
    run = jax.jit(lambda tokens: skeleton.bind(params).features(tokens, key=KEY))
    tokens = batch()["tokens"][:1]
    before = run(tokens)
    for t in (5, 14, 22):
        after = run(np.concatenate([tokens[:, :t], (tokens[:, t:] + 11) % V], axis=1))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after[:, t:] - before[:, t:]).max() > 0


def test_cached_is_full_and_drops_nothing():
    """Prompts of several lengths in one batch, one token at a time and several."""
    skeleton, params = parameters(replace(MODEL, layers=1, experts=replace(MODEL.experts, capacity=0.1)))
    tokens = batch(length=16, seed=1)["tokens"][:1].repeat(3, 0)
    full = np.asarray(jax.jit(lambda tokens: skeleton.bind(params)(tokens, positions_BT=None))(tokens))
    start = jax.jit(lambda tokens, lengths: skeleton.bind(params).start(tokens, lengths, 16))
    extend = jax.jit(lambda state, tokens: skeleton.bind(params).extend(state, tokens))
    at, row = np.array([7, 3, 9]), np.arange(3)
    logits, state = start(np.where(np.arange(9) < at[:, None], tokens[:, :9], 0), at)
    np.testing.assert_allclose(logits, full[row, at - 1], atol=1e-3)
    for n in (1, 3):
        place = at[:, None] + np.arange(n)
        logits, state = extend(state, np.take_along_axis(tokens, place, axis=1))
        np.testing.assert_allclose(logits, full[row[:, None], place], atol=1e-3)
        at = at + n


def experiment(rows=8, **model) -> Experiment:
    base = gpt()
    sizes = {"vocab_size": 48, "context": 32, "width": 16, "layers": 2, "feedforward": 24, "init_std": 0.3}
    settings = {"experts": ExpertsConfig(count=4, chosen=2, capacity=0.9, group=4)} | sizes | model
    data = replace(base.data, context=32, batch_rows=rows, rows_multiple=rows)
    return replace(base, model=replace(base.model, **settings), data=data)


MESHES = {
    "expert 2": (MeshConfig(data=1, expert=2), 0.9),
    "expert 4": (MeshConfig(data=1, expert=4), 0.9),
    "data 2 x expert 2 x tensor 2": (MeshConfig(data=2, expert=2, tensor=2), 0.9),
    "fsdp 2 x expert 2 x tensor 2": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 0.9),
    "expert 2 x context 2 x tensor 2": (MeshConfig(data=1, expert=2, context=2, tensor=2), 0.9),
    "unlimited, fsdp 2 x expert 2 x tensor 2": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 0.0),
    "unlimited, expert 4 x context 2": (MeshConfig(data=1, expert=4, context=2), 0.0),
}
QUICK = ("fsdp 2 x expert 2 x tensor 2",)


def _initial(skeleton):
    return jax.jit(lambda key: noisy(skeleton.init(key), share=0.05))(jax.random.key(1))


@cache
def gradient(capacity: float, mesh: MeshConfig):
    """Loss and gradients."""
    setup = experiment()
    experts = replace(setup.model.experts, capacity=capacity)
    setup = replace(setup, model=replace(setup.model, experts=experts), mesh=mesh)
    devices = math.prod(vars(setup.mesh).values())
    trainer = Trainer.of(setup, jax.devices()[:devices])
    params = jax.device_put(_initial(trainer.skeleton), trainer.shardings().params)
    step = jax.value_and_grad(loss_of(trainer.skeleton, setup.objective), has_aux=True)
    given = trainer.put(batch(8, 32))
    with jax.set_mesh(trainer.mesh):
        return jax.jit(step)(params, given)


@pytest.mark.parametrize("mesh", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
def test_loss_and_gradients_are_those_of_one_device(mesh):
    sizes, capacity = MESHES[mesh]
    (_, values), grads = gradient(capacity, sizes)
    (_, expected_values), expected = gradient(capacity, MeshConfig(data=1))
    for name, value in expected_values.items():
        np.testing.assert_allclose(values[name], value, rtol=2e-5, err_msg=name)
    for (path, actual), right in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(right).max()), 1e-3)
        np.testing.assert_allclose(actual, right, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_tokens_travel_and_experts_stay():
    """Four all-to-alls a layer, there and back, forward and backward, of the places; no expert leaves its device."""
    setup = replace(experiment(), mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    trainer = Trainer.of(setup, jax.devices()[:8])
    found = collectives(parse(compiled(trainer).as_text()), 8)
    along = [c for c in found if "expert" in c.axes(trainer.mesh)]
    travels = [c for c in along if c.kind == "all-to-all"]
    assert sum(c.times for c in travels) == 4 * setup.model.layers
    experts = setup.model.experts
    places = 4 * experts.places(4) * (8 // 4) * (32 // 4)  # experts x places x rows x groups of a device
    assert {c.bytes for c in travels} == {4 * places * setup.model.width}
    one = 4 * setup.model.width * setup.model.block.feedforward  # bytes of a matrix of one expert
    gathered = [c.bytes for c in along if c.kind == "all-gather"]
    assert max(gathered, default=0) < one


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_writes():
    """One position at a time, which an axis that divides positions leaves together."""
    model = replace(GPT2, experts=ExpertsConfig(count=4, chosen=2))
    mesh = MeshConfig(data=1, expert=2, context=2)
    prompts, greedy = ["Was ever woman", "humour"], Generation(max_tokens=4, temperature=0.0)
    several, one = completer(model, devices=4, mesh=mesh), completer(model)
    for a, b in zip(several.complete_all(prompts, greedy), one.complete_all(prompts, greedy), strict=True):
        assert a.tokens == b.tokens


def test_micro_batches_add_up():
    setup = replace(experiment(dropout=0.0), optim=OptimConfig(schedule=ScheduleConfig(warmup=1), eps=1e-3))
    results = []
    for accumulate in (1, 4):
        changed = replace(setup, train=replace(setup.train, accumulate=accumulate), mesh=MeshConfig(data=1))
        trainer = Trainer.of(changed, jax.devices()[:1])
        state, metrics = trainer.train_step()(trainer.init(), trainer.put(batch(8, 32)))
        results.append(jax.device_get((state.params, metrics)))
    (params, metrics), (others, other) = results
    for name, value in metrics.items():
        if name != "fullest_expert":  # of a micro-batch
            np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, params)


def test_a_classifier_learns_to_balance_too():
    model = replace(MODEL, task="classify", labels=3)
    skeleton, params = parameters(model)
    rows = batch() | {"label": np.array([2, 0, -1])}
    values = jax.jit(loss_of(skeleton, Classification(lm_weight=0.5)))(params, rows)[1]
    lm = 0.5 * values["lm_nll"]
    extra = 2 * (0.01 * values["load_balance"] + 0.001 * values["router_z"])
    np.testing.assert_allclose(values["loss"], values["nll"] + lm + extra, rtol=1e-5)


# Accounts.


@pytest.mark.parametrize("dialect", [{}, {"gated": True, "activation": "silu"}])
def test_forward_flops_are_those_of_the_program(dialect):
    """With exactly as many places as choices, the places are what is counted; each half of attention is not."""
    model = replace(MODEL, **dialect, experts=ExpertsConfig(count=3, chosen=2, capacity=1.0))
    skeleton, tokens = Skeleton.of(model, ComputeConfig(layers="scan")), batch()["tokens"]
    program = jax.make_jaxpr(
        lambda params: skeleton.bind(params).logits(skeleton.bind(params).features(tokens, key=KEY))
    )
    combined = 2 * model.layers * B * 24 * 2 * D  # weights times outputs, which are counted as no product
    unseen = model.layers * B * 4 * D * 24 * 24 // 2
    flops = model.forward_flops({"tokens": (B, 24), "targets": (B, 24)})
    assert products_of(program(skeleton.abstract).jaxpr) == flops + combined + unseen


def test_muon_turns_each_expert_by_itself():
    """An expert's update does not depend on the gradients of the others; so with the trust ratio of LAMB."""
    skeleton, params = parameters(layers="scan")
    grads = noisy(jax.tree.map(jnp.zeros_like, params), seed=4)
    louder = jax.tree_util.tree_map_with_path(
        lambda path, g: g.at[:, 1:].multiply(3.0) if "experts" in jax.tree_util.keystr(path) else g, grads
    )
    for kind in ("muon", "lamb", "adafactor"):
        tx = optimizer(OptimConfig(kind=kind, schedule=ScheduleConfig(warmup=1)), skeleton.letters)
        one, other = (
            tx.update(g, tx.init(params), params)[0]["decoder"]["layers"]["feedforward"] for g in (grads, louder)
        )
        for name in ("up", "down"):
            a, b = one["experts"][name]["weight"], other["experts"][name]["weight"]
            np.testing.assert_allclose(a[:, 0], b[:, 0], rtol=1e-5)
        if kind == "muon":
            singular = jnp.linalg.svd(one["experts"]["up"]["weight"], compute_uv=False)
            assert singular.shape == (2, E, D)
            assert singular.max() / singular.min() < 3, "every expert's update is near orthogonal"


def test_biases_of_experts_do_not_decay():
    skeleton, params = parameters(layers="scan")
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer(OptimConfig(weight_decay=0.1, schedule=ScheduleConfig(warmup=1)), skeleton.letters)
    moved = tx.update(zeros, tx.init(params), params)[0]["decoder"]["layers"]["feedforward"]
    decays = {jax.tree_util.keystr(path): bool(leaf.any()) for path, leaf in jax.tree_util.tree_leaves_with_path(moved)}
    assert decays == {name: name.endswith("['weight']") for name in decays}


# Refusals, before anything is compiled.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 5}, r"experts\.chosen=5 must lie between 1 and the 4"),
        ({"chosen": 0}, r"experts\.chosen=0 must lie between"),
        ({"count": -1}, r"experts\.count must not be negative"),
        ({"capacity": -0.5}, r"experts\.capacity must not be negative, got -0\.5"),
        ({"balance_loss": -1.0}, r"experts\.balance_loss must not be negative"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    setup = experiment()
    with pytest.raises(UserError, match=message):
        replace(setup, model=replace(setup.model, experts=replace(setup.model.experts, **change))).check()


@pytest.mark.parametrize(
    ("setup", "mesh", "message"),
    [
        (experiment(), {"expert": 8}, r"mesh expert=8 does not divide E=4 of parameter decoder.*--mesh\.expert"),
        (
            experiment(experts=ExpertsConfig()),
            {"expert": 2},
            r"mesh\.expert=2 divides experts, and this model has none",
        ),
        (experiment(base_width=8), {}, r"base_width: the rates of muP are not known for a router"),
        (
            experiment(experts=ExpertsConfig(count=4)),
            {"context": 2},
            r"pieces of 8, which model\.experts\.group=0 does not divide; set --model\.experts\.group 8",
        ),
        (experiment(rows=6), {"expert": 4}, r"data\.rows_multiple=6 rows, which 4 batch shard"),
    ],
)
def test_what_a_mesh_cannot_divide_is_refused(setup, mesh, message):
    setup = replace(setup, mesh=MeshConfig(data=1, **mesh))
    with pytest.raises(UserError, match=message):
        Trainer.of(setup, jax.devices()[: math.prod(vars(setup.mesh).values())])


# Mixtral.


def test_mixtral_has_as_many_parameters_as_published():
    shown = transformer_jax.show(find_recipe("mixtral_8x7b"))
    assert (shown["parameters"]["total"], shown["active"]) == (46_702_792_704, 12_879_925_248)
    assert transformer_jax.show(find_recipe("gpt2_demo"))["active"] == 940_800


def test_mixtral_gives_the_logits_of_transformers(tmp_path):
    """By our model, and by the reference in NumPy that certificates compare with; then back to the same tensors."""
    with np.load(Path(__file__).parent / "fixtures" / "mixtral_reference.npz") as file:
        arrays = dict(file)
    given, config_json = tensors(json.loads(str(arrays["shapes"]))), json.loads(str(arrays["config"]))
    rows = {name: arrays[name] for name in ("tokens", "segments")}
    real = rows["segments"][..., None] != 0
    fields = Fields.load(write(tmp_path, config_json, given) / "config.json")
    with Tensors(tmp_path) as opened:
        plan = plan_of(MIXTRAL, fields, opened)
        params = read_params(plan, opened)
    skeleton = Skeleton.of(plan.config, ComputeConfig(layers="scan"))
    logits = jax.jit(lambda params: skeleton.bind(params)(rows["tokens"], rows["segments"]))(params)
    np.testing.assert_allclose(np.where(real, logits, 0), arrays["next"], atol=2e-5)
    reference = REFERENCES["mixtral"](config_json, lambda name: given[_theirs(name)], frozenset(), rows)["next"]
    np.testing.assert_allclose(np.where(real, reference, 0), arrays["next"], atol=2e-5)

    assert MIXTRAL.read(Fields(MIXTRAL.write(plan.config), "written"), frozenset()) == plan.config
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    written = {
        MIXTRAL.full(name, plan.config): tensor
        for entry in plan.rows
        for name, tensor in export_row(entry, plan.slots, flat.__getitem__)
    }
    assert written.keys() == given.keys()
    assert all(np.array_equal(written[name], given[name]) for name in given)


def _theirs(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def test_what_mixtral_cannot_say_is_refused():
    config = replace(find_recipe("mixtral_8x7b").model, experts=ExpertsConfig(count=8, normalised=False))
    with pytest.raises(UserError, match="cannot be written as Mixtral"):
        writer_of(config).write(config)
    with pytest.raises(UserError, match=r"written as Llama.*model\.gated=False"):
        writer_of(MODEL).write(replace(MODEL, bias=False))
