"""Laws of the training step: however it is laid out, the numbers are the same."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import deterministic, tiny
from transformer_jax.config import ComputeConfig, MeshConfig, OptimConfig, ScheduleConfig
from transformer_jax.errors import UserError
from transformer_jax.nn.module import Skeleton
from transformer_jax.nn.stack import stack_layers
from transformer_jax.objectives import cross_entropy
from transformer_jax.optim import optimizer, schedule
from transformer_jax.train import Trainer

EXPERIMENT = deterministic(tiny())
ONE = MeshConfig(data=1)


@pytest.fixture(scope="module")
def batch():
    """16 rows of ragged length, the last two empty, as at the end of a bucket."""
    rng = np.random.default_rng(0)
    source, target = rng.integers(4, 306, (16, 11)), rng.integers(4, 306, (16, 7))
    for row in range(16):
        source[row, 1 + row % 11 :] = 0
        target[row, 1 + row % 7 :] = 0
    source[14:] = target[14:] = 0
    target = np.pad(target, ((0, 0), (1, 0)), constant_values=1)
    return {"source": source.astype(np.int32), "target": target.astype(np.int32), "example": np.arange(16)}


def steps(experiment, batch, n=2, devices=None):
    """Parameters (stacked) and metrics after n updates from the same batch."""
    trainer = Trainer.of(experiment, devices)
    state, step = trainer.init(), trainer.train_step()
    for _ in range(n):
        state, metrics = step(state, trainer.put(batch))
    return jax.device_get((stack_layers(state.params), metrics))


@pytest.fixture(scope="module")
def single(batch):
    return steps(replace(EXPERIMENT, mesh=ONE), batch, devices=jax.devices()[:1])


def assert_same(actual, expected):
    (params, metrics), (expected_params, expected_metrics) = actual, expected
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected_params)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (2, 4, 1), (4, 1, 2), (-1, 2, 1)]
)
def test_sharded_equals_single_device(batch, single, data, fsdp, tensor):
    devices = jax.devices()[: 2 if (data, fsdp) == (1, 1) else 8]
    experiment = replace(EXPERIMENT, mesh=MeshConfig(data, fsdp, tensor), compute=ComputeConfig(layers="scan"))
    assert_same(steps(experiment, batch, devices=devices), single)


def test_state_is_really_sharded():
    trainer = Trainer.of(replace(EXPERIMENT, mesh=MeshConfig(2, 2, 2)))
    state = trainer.init()
    table = state.params["embedding"]["table"]
    assert table.sharding.shard_shape(table.shape) == (153, 12)
    moment = state.opt_state[1].mu["embedding"]["table"]
    assert moment.sharding == table.sharding
    whole = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.opt_state)))
    per_device = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves((state.params, state.opt_state))
    )
    assert per_device < 0.35 * whole


def test_accumulation_equals_one_big_batch(batch, single):
    for accumulate in (2, 4):
        train = replace(EXPERIMENT.train, accumulate=accumulate)
        assert_same(steps(replace(EXPERIMENT, mesh=ONE, train=train), batch, devices=jax.devices()[:1]), single)


def test_pmap_equals_jit(batch, single):
    experiment = replace(EXPERIMENT, mesh=ONE)
    trainer = Trainer.of(experiment, jax.devices()[:1])
    n = jax.device_count()
    state = jax.tree.map(lambda x: jnp.stack([x] * n), jax.device_get(trainer.init()))
    split = {k: v.reshape(n, len(v) // n, *v.shape[1:]) for k, v in batch.items() if k != "example"}
    step = trainer.pmap_train_step()
    for _ in range(2):
        state, metrics = step(state, split)
    params, metrics = jax.tree.map(lambda x: x[0], jax.device_get((state.params, metrics)))
    assert_same((stack_layers(params), metrics), single)
    for leaf in jax.tree.leaves(jax.device_get(state.params)):
        assert np.all(leaf == leaf[:1])


def test_empty_rows_do_not_count(batch, single):
    fuller = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in batch.items()}
    assert_same(steps(replace(EXPERIMENT, mesh=ONE), fuller, devices=jax.devices()[:1]), single)


def test_dropout_differs_by_step_and_seed_but_repeats(batch):
    noisy = tiny()
    losses = []
    for seed in (0, 0, 1):
        experiment = replace(noisy, mesh=ONE, train=replace(noisy.train, seed=seed))
        trainer = Trainer.of(experiment, jax.devices()[:1])
        state, step = Trainer.of(replace(experiment, train=noisy.train), jax.devices()[:1]).init(), trainer.train_step()
        key = jax.random.key_data(jax.random.key(seed))
        state = replace(state, key=key)
        losses.append(float(step(state, trainer.put(batch))[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_label_smoothing_equals_optax():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 17)), rng.integers(0, 17, (3, 5))
    for smoothing in (0.0, 0.1, 0.3):
        ours = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, 17), smoothing)
        np.testing.assert_allclose(ours, optax.softmax_cross_entropy(logits, smooth), rtol=1e-5)


def test_inverse_sqrt_is_the_papers_formula():
    width, warmup = 512, 4000
    rate = schedule(ScheduleConfig("inverse_sqrt", peak=width**-0.5 * warmup**-0.5, warmup=warmup))
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(rate(step - 1), expected, rtol=1e-5)


def test_schedules_at_their_corners():
    cosine = schedule(ScheduleConfig("cosine", peak=2.0, warmup=10, steps=110, final=0.1))
    np.testing.assert_allclose([cosine(9), cosine(60), cosine(110)], [2.0, 1.1, 0.2], rtol=1e-5)
    wsd = schedule(ScheduleConfig("wsd", peak=2.0, warmup=10, steps=100, final=0.0, decay_fraction=0.2))
    np.testing.assert_allclose([wsd(4), wsd(50), wsd(80), wsd(90), wsd(100)], [1.0, 2.0, 2.0, 1.0, 0.0], atol=1e-5)
    linear = schedule(ScheduleConfig("linear", peak=2.0, warmup=10, steps=110, final=0.1))
    np.testing.assert_allclose([linear(9), linear(60), linear(110)], [2.0, 1.1, 0.2], rtol=1e-5)
    constant = schedule(ScheduleConfig("constant", peak=2.0, warmup=4))
    np.testing.assert_allclose([constant(0), constant(3), constant(1000)], [0.5, 2.0, 2.0])


def test_decay_touches_matrices_only():
    """Stacked or not; the bias of attention heads has the shape of a matrix and is none."""
    letters = {"query": {"weight": "LDNH", "bias": "LNH"}, "norm": {"scale": "LD", "bias": "D"}, "table": "VD"}
    params = jax.tree.map(lambda names: jnp.ones(range(2, 2 + len(names))), letters)
    tx = optimizer(OptimConfig(schedule=ScheduleConfig(peak=1.0, warmup=0), weight_decay=0.5), letters)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {"query": {"weight": -0.5, "bias": 0.0}, "norm": {"scale": 0.0, "bias": 0.0}, "table": -0.5}
    assert jax.tree.all(jax.tree.map(lambda update, by: bool(jnp.all(update == by)), updates, moved))


@pytest.mark.parametrize("kind", ["adam", "lamb", "adafactor", "muon"])
def test_every_optimizer_treats_stacked_layers_as_layers(kind):
    """Norms, factors and orthogonal matrices are taken by layer, whether layers are stacked or not."""
    model = replace(EXPERIMENT.model, width=132, feedforward=140, heads=6)
    config = OptimConfig(kind=kind, schedule=ScheduleConfig(peak=1e-2, warmup=1), weight_decay=0.1, clip_norm=1.0)
    start = Skeleton.of(model, ComputeConfig(layers="unrolled")).init(jax.random.key(0))
    ends = []
    for layers in ("unrolled", "scan"):
        tx = optimizer(config, Skeleton.of(model, ComputeConfig(layers=layers)).letters)
        params = start if layers == "unrolled" else stack_layers(start)
        state = tx.init(params)
        for i in range(2):
            gradient = jax.tree.map(lambda x, i=i: jnp.sin(37 * x + i), params)
            updates, state = jax.jit(tx.update)(gradient, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(stack_layers(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *ends)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[0], stack_layers(start))
    assert min(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_optimizers_with_states_of_their_own_shape_train_on_a_mesh(batch, kind):
    experiment = replace(EXPERIMENT, optim=replace(EXPERIMENT.optim, kind=kind))
    single = steps(replace(experiment, mesh=ONE), batch, n=1, devices=jax.devices()[:1])
    experiment = replace(experiment, mesh=MeshConfig(1, 2, 2), compute=ComputeConfig(layers="scan"))
    assert_same(steps(experiment, batch, n=1, devices=jax.devices()[:4]), single)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "does not match 8 device"),
        (MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (MeshConfig(data=-1, tensor=4), "mesh tensor=4 does not divide K=6"),
    ],
)
def test_bad_meshes(mesh, message):
    with pytest.raises(UserError, match=message):
        Trainer.of(replace(EXPERIMENT, mesh=mesh))


def test_batch_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match=r"set --data\.rows-multiple 16"):
        Trainer.of(replace(EXPERIMENT, train=replace(EXPERIMENT.train, accumulate=2)))


def test_options_of_the_compiler_reach_it_or_are_named(tmp_path):
    def compiled_with(*options):
        return replace(tiny(), compute=ComputeConfig(xla=options))

    options = f"xla_dump_to={tmp_path}", "xla_dump_hlo_as_text=true", "xla_backend_optimization_level=1"
    trainer = Trainer.of(compiled_with(*options))
    assert trainer.describe().endswith(f"remat none, xla {' '.join(options)}")
    trainer.lower_train_step(tiny().data.batch_shapes()).compile()
    assert any("train_step" in file.name for file in tmp_path.iterdir())
    for option, why in (("fast", "NAME=VALUE"), ("xla_no_such=1", "No such"), ("xla_dump_hlo_as_text=maybe", "bool")):
        with pytest.raises(UserError, match=rf"--compute\.xla {option}: .*{why}"):
            Trainer.of(compiled_with(option))
