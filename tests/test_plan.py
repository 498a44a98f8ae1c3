"""Laws of plans by estimate, and of what the command says; the compiler's own are in test_plan_tpu.py."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tests.test_plan_hlo import B, D, F, L, Step, T, V, bert, gpt, transformer
from transformer_jax.cli import main
from transformer_jax.cli.planning import VERBS, PlanOptions
from transformer_jax.cli.verb import parse
from transformer_jax.config import ComputeConfig, MeshConfig, ScheduleConfig, TrainConfig
from transformer_jax.errors import UserError
from transformer_jax.kernels.blockwise import BLOCK
from transformer_jax.nn.moe import ExpertsConfig
from transformer_jax.planning import remedies as remedies_of
from transformer_jax.planning.collectives import Collective
from transformer_jax.planning.compiler import OutOfMemory, _out_of_memory
from transformer_jax.planning.estimate import estimate
from transformer_jax.planning.layouts import WHOLE
from transformer_jax.planning.planner import plan as plan_any
from transformer_jax.planning.remedies import ENOUGH, meshes, remedies, smaller
from transformer_jax.planning.roofline import as_groups, link_of, roofline
from transformer_jax.planning.rows import dividing, overrides_of
from transformer_jax.planning.target import Target, find_target
from transformer_jax.planning.trace import trace
from transformer_jax.planning.traced import estimated, expected
from transformer_jax.recipes import find_recipe
from transformer_jax.train import Trainer

plan = partial(plan_any, compile=False)
V5E8 = find_target("v5e-8")
GOLDEN = sorted((Path(__file__).parent / "golden" / "plan").glob("*.json"))


def silent(_: str) -> None:
    """Hear of no progress."""


def test_parameters_and_optimizer_are_those_of_the_shards():
    """Adam keeps two more copies, and fsdp and tensor divide what is divisible."""
    whole = plan(gpt(data=8), V5E8).memory
    assert whole.parameters == 4 * plan(gpt(data=8), V5E8).parameters
    assert whole.optimizer == pytest.approx(2 * whole.parameters, abs=64)
    shared = plan(gpt(data=1, fsdp=8), V5E8).memory
    assert whole.parameters / 8 < shared.parameters < whole.parameters / 7
    assert plan(gpt(data=8), V5E8).memory.batch == (4 * B * T * 4 + 4 * B) // 8


@pytest.mark.parametrize("family", [gpt, bert, transformer])
def test_the_estimate_computes_what_the_model_counts(family):
    """Three times the forward pass, where causal attention is computed in full; a little more where it is halved."""
    found = plan(family(data=8), V5E8)
    excess = found.computed_flops - found.flops.matmuls
    if family is bert:
        assert excess == 0
    else:
        attention = {gpt: L, transformer: L}[family] * 4 * D * T * T // 2 * B * 3
        assert excess == attention


@pytest.mark.parametrize(("policy", "more"), [("none", 0), ("full", 1)])
def test_recomputation_runs_the_layers_once_more(policy, more):
    found = plan(replace(bert(data=8), compute=ComputeConfig(layers="scan", remat=policy)), V5E8)
    layer = 2 * T * (4 * D * D + 2 * D * F) + 4 * D * T * T
    assert found.computed_flops - found.flops.matmuls == more * L * B * layer


def test_what_takes_less_memory_is_estimated_to():
    whole = gpt(data=8)
    rows = replace(whole, data=replace(whole.data, batch_rows=32 * B))  # enough that they weigh more than gradients

    def total(**changes):
        return plan(replace(rows, **changes), V5E8).memory

    base = total()
    assert total(compute=ComputeConfig(layers="scan", remat="full")).activations < base.activations / 4
    assert total(compute=ComputeConfig(layers="scan", remat="dots")).activations < base.activations
    assert total(train=TrainConfig(accumulate=2)).activations < 0.6 * base.activations
    assert total(mesh=MeshConfig(data=4, tensor=2)).parameters < 0.6 * base.parameters
    long = replace(gpt(data=1), model=replace(gpt().model, vocab_size=64 * V))
    chunked = replace(long, objective=replace(long.objective, chunk=4))
    one = find_target("v5e-1")
    assert plan(chunked, one).memory.total < 0.8 * plan(long, one).memory.total


def test_unrolled_layers_compute_what_scanned_ones_do():
    scanned, unrolled = (
        plan(replace(gpt(data=8), compute=ComputeConfig(layers=layers)), V5E8) for layers in ("scan", "unrolled")
    )
    assert unrolled.computed_flops == scanned.computed_flops


def test_a_kernel_counts_what_it_says_and_is_not_looked_into():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    def double(x):
        cost = pl.CostEstimate(flops=12_345, transcendentals=0, bytes_accessed=0)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost)(x + 1.0)

    closed = jax.make_jaxpr(double)(jnp.ones((8, 128)))
    found = estimate(trace(closed, [WHOLE], {}, frozenset(), product=4), {}, frozenset())
    assert found.flops == 12_345
    assert found.traffic >= 2 * 8 * 128 * 4


@pytest.mark.parametrize("attention", ["splash", "blockwise"])
def test_the_heads_of_a_kernel_are_divided_too(attention):
    def computed(**mesh):
        long = gpt(**mesh)
        model, data = replace(long.model, context=640), replace(long.data, context=640)
        compute = replace(long.compute, attention=attention)
        return plan(replace(long, model=model, data=data, compute=compute), V5E8).computed_flops

    assert computed(data=4, tensor=2) == computed(data=8)


def test_summands_are_added_up_before_devices_exchange_them():
    """What each device has of two products with divided rows is one exchange, and so is a row of a divided table."""

    def run(x, v, w, table, ids):
        return jnp.tanh((x @ v).reshape(8, 2, 8) + (x @ w).reshape(8, 2, 8)), jnp.sin(table[ids])

    shapes = [(8, 16), (16, 16), (16, 16), (32, 24)]
    closed = jax.make_jaxpr(run)(*map(jnp.ones, shapes), jnp.arange(5))
    rows = frozenset({(0, "tensor")})
    program = trace(closed, [frozenset({(1, "tensor")}), rows, rows, rows, WHOLE], {}, frozenset(), product=4)
    found = estimate(program, {"tensor": 2}, frozenset()).exchanges
    assert sorted((e.kind, e.axis, e.bytes, e.times) for e in found) == [
        ("all-reduce", "tensor", 4 * 5 * 24, 1),
        ("all-reduce", "tensor", 4 * 8 * 16, 1),
    ]


def test_a_layer_is_summed_twice_on_the_way_there_and_twice_on_the_way_back():
    """Along tensor, as in Megatron (Shoeybi 2019, section 3). Once more for the embedding and for the logits."""
    found = plan(gpt(data=4, tensor=2), V5E8)
    moved = {(m.kind, m.axes): m.bytes for m in found.moves}
    stream = 4 * (B // 4) * T * D
    assert moved["all-reduce", "tensor"] == pytest.approx((4 * L + 2) * stream, rel=0.02)


def test_what_a_forward_pass_keeps_is_no_gradient_whatever_its_shape():
    def run(x):
        return jax.lax.scan(lambda c, _: (c * 2, c * 3), x, None, length=3)

    closed = jax.make_jaxpr(run)(jnp.ones((8, 16)))
    like = {(3, 8, 16): frozenset({(1, "tensor")})}
    assert trace(closed, [WHOLE], like, frozenset(), product=4).outputs[1].layout == WHOLE


def test_of_an_array_that_is_sliced_the_slice_is_moved():
    def run(x, y, i):
        part = jax.lax.dynamic_slice_in_dim(x, i, 8) @ y
        return jax.lax.dynamic_update_slice_in_dim(x, part, i, 0)

    closed = jax.make_jaxpr(run)(jnp.ones((1024, 16)), jnp.ones((16, 16)), 3)
    program = trace(closed, [WHOLE] * 3, {}, frozenset(), product=4)
    found = estimate(program, {}, frozenset()).traffic
    slices = 4 * (8 * 16 + 16 * 16 + 8 * 16) + 2 * 4 * 8 * 16
    handed_out = 2 * 4 * 1024 * 16
    assert slices <= found - handed_out <= slices + 16


def test_positions_are_divided_too():
    """Each of eight devices has a share of the work, whole rows or not."""
    whole, divided = plan(gpt(data=8), V5E8), plan(gpt(data=4, context=2), V5E8)
    assert divided.memory.activations < 1.2 * whole.memory.activations
    assert ("all-reduce", "data+context") in {(move.kind, move.axes) for move in divided.moves}


def test_the_estimate_knows_what_travels_around_a_ring():
    """Keys, values and their masks, forward and back, and again for what is recomputed: as the compiler has it."""
    experiment = replace(gpt(data=2, context=4), compute=ComputeConfig(layers="scan", remat="full"))
    (guess,) = [m for m in plan(experiment, V5E8).moves if m.kind == "collective-permute"]
    step = Step(experiment)
    assert guess.axes == "context"
    assert sum(c.times for c in step.along("collective-permute", "context")) == guess.calls
    assert step.moved("collective-permute", "context") == guess.bytes


def test_a_ring_is_as_fast_as_one_link():
    """It goes one way, though links go both, and neighbours are next to each other."""
    target = find_target("v5e-16")
    base = gpt(data=4, context=4)
    base = replace(base, model=replace(base.model, context=4 * T), data=replace(base.data, context=4 * T))
    trainer = Trainer.of(base, target.stand_ins())
    around = [c for c in expected(trainer, estimated(trainer)) if c.kind == "collective-permute"]
    assert {link_of(target, trainer.mesh, c.groups).bandwidth for c in around} == {target.chip.link}


def test_collectives_follow_the_layout():
    def kinds(**mesh):
        return {(move.kind, move.axes) for move in plan(gpt(**mesh), V5E8).moves}

    assert kinds(data=8) == {("all-reduce", "data")}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")} <= kinds(data=1, fsdp=8)
    assert ("all-reduce", "tensor") in kinds(data=4, tensor=2)
    assert not any("tensor" in axes for _, axes in kinds(data=1, fsdp=8))
    moved = {(m.kind, m.axes): m.bytes for m in plan(gpt(data=8), V5E8).moves}
    assert moved["all-reduce", "data"] == 4 * plan(gpt(data=8), V5E8).parameters


@pytest.mark.parametrize(("chunk", "accumulate"), [(0, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_rows_that_were_looked_up_are_summed_in_float32(tied, chunk, accumulate):
    """Those of products in their precision; a tied table has both, as one sum where no loop adds up one of them."""
    base = gpt(data=4)
    found = plan(
        replace(
            base,
            model=replace(base.model, tied=tied),
            objective=replace(base.objective, chunk=chunk),
            train=replace(base.train, accumulate=accumulate),
            compute=ComputeConfig(layers="scan", dtype="bfloat16"),
        ),
        find_target("v5e-4"),
    )
    (move,) = found.moves
    tables = V * D + T * D
    products = found.parameters - T * D - (0 if tied and chunk else V * D)
    assert move.bytes == accumulate * (4 * tables + 2 * products)


def test_gradients_of_experts_are_summed_in_float32():
    base = gpt(data=2, expert=2)
    model = replace(base.model, experts=ExpertsConfig(count=6, chosen=2, group=T))
    compute = ComputeConfig(layers="scan", dtype="bfloat16")
    found = plan(replace(base, model=model, compute=compute), find_target("v5e-4"))
    moved = {(m.kind, m.axes): m.bytes for m in found.moves}
    assert moved["all-reduce", "data"] == 4 * L * 6 // 2 * (2 * D * F + F + D + D), "and of the router"


@pytest.mark.parametrize("windows", [(), (0, 8)])
def test_a_pass_gathers_a_weight_once(windows):
    """For the forward pass, and for recomputation and gradients together; layers that come in pairs, each its own."""
    base = gpt(data=1, fsdp=8)
    model = replace(base.model, layers=4, windows=windows)
    found = plan(replace(base, model=model, compute=ComputeConfig(layers="scan", remat="full")), V5E8)
    (gather,) = [m for m in found.moves if m.kind == "all-gather"]
    matrices = 4 * (4 * D * D + 2 * D * F) + V * D
    assert gather.bytes == 2 * 4 * matrices


@pytest.mark.parametrize(("width", "gathers"), [(8 * 128, "all-gather"), (8 * 64, "all-reduce")])
def test_columns_that_fill_no_tile_are_gathered_by_all_reduce_on_v5p(width, gathers):
    wide = gpt(data=1, fsdp=8)
    found = plan(replace(wide, model=replace(wide.model, width=width)), find_target("v5p-16"))
    kinds = {move.kind for move in found.moves if move.bytes > 4 * width * F}
    assert gathers in kinds
    assert bool(found.remarks) == (gathers == "all-reduce")


def test_a_pod_without_a_pod_has_the_mesh_of_the_real_one():
    """Neighbours along an axis of the mesh are neighbours in the network."""
    target = find_target("v5e-256")
    experiment = dividing(gpt(data=16, fsdp=16), target)
    experiment = replace(experiment, data=replace(experiment.data, batch_rows=256))
    mesh = Trainer.of(experiment, target.stand_ins()).mesh
    for axis in ("data", "fsdp"):
        link = link_of(target, mesh, as_groups(mesh, axis))
        assert link.network == "ICI"
        assert link.bandwidth == 2 * target.chip.link  # a whole ring of 16, both ways


@pytest.mark.parametrize(
    ("name", "axis", "network", "links"),
    [("v5e-8", "fsdp", "ICI", 2), ("v5p-128", "fsdp", "ICI", 6), ("h100-8", "fsdp", "NVLink", 1)],
)
def test_links_of_a_group(name, axis, network, links):
    """A 2 x 4 slice has no ring; 4 x 4 x 4 has three; GPUs of a host reach each other."""
    target = find_target(name)
    data, model = replace(gpt().data, batch_rows=64, rows_multiple=64), replace(gpt().model, width=64)
    experiment = replace(gpt(data=1, fsdp=-1), data=data, model=model)
    mesh = Trainer.of(experiment, target.stand_ins()).mesh
    link = link_of(target, mesh, as_groups(mesh, axis))
    assert (link.network, link.bandwidth) == (network, links * target.chip.link)


def test_gpus_of_two_hosts_share_the_network_cards():
    target = find_target("h100-16")
    mesh = Trainer.of(gpt(data=16), target.stand_ins()).mesh
    link = link_of(target, mesh, as_groups(mesh, "data"))
    assert (link.network, link.bandwidth) == ("network", 8 * target.chip.network)


def test_what_waits_adds_up_and_what_runs_beside_does_not():
    target = V5E8
    mesh = Trainer.of(gpt(data=8), target.stand_ins()).mesh
    second = target.chip.peak["bfloat16"]

    def step(overlapped: bool) -> float:
        move = Collective("all-gather", int(8 / 7 * 2 * target.chip.link), 3, as_groups(mesh, "data"), overlapped, "")
        return roofline(target, mesh, flops=2 * second, traffic=0, found=[move], dtype="bfloat16").step

    assert step(overlapped=True) == pytest.approx(3.0)
    assert step(overlapped=False) == pytest.approx(5.0)


@pytest.mark.parametrize(("back", "seconds"), [(True, 3.0), (False, 6.0)])
def test_links_carry_both_directions_at_once(back, seconds):
    target = V5E8
    mesh = Trainer.of(gpt(data=8), target.stand_ins()).mesh
    there = np.asarray([[0, 1], [1, 2], [2, 3]])
    moves = [
        Collective("collective-permute", int(target.chip.link), 3, groups, overlapped=True, source="")
        for groups in (there, there[:, ::-1] if back else there)
    ]
    found = roofline(target, mesh, flops=0, traffic=0, found=moves, dtype="bfloat16")
    assert found.networks["ICI"] == pytest.approx(seconds)
    assert found.exposed == 0


def test_a_precision_without_a_published_peak_has_no_step_time():
    target = find_target("v4-8")
    nothing = roofline(target, None, flops=1e12, traffic=1, found=[], dtype="float8")
    assert nothing.compute is None
    assert nothing.step is None


def test_a_gpu_reads_what_it_adds_up():
    """A TPU adds while it computes the summands."""
    closed = jax.make_jaxpr(lambda x, w: (x @ w).sum(-1))(jnp.ones((8, 16)), jnp.ones((16, 128)))
    program = trace(closed, [WHOLE] * 2, {}, frozenset(), product=4)
    tpu, gpu = (estimate(program, {}, frozenset(), tpu=tpu).traffic for tpu in (True, False))
    assert gpu - tpu == 4 * 8 * 128


def test_an_estimate_for_gpus_needs_no_cudnn():
    """It grows with the rows, not with their square: cuDNN's attention keeps no weights."""
    base = replace(gpt(data=8), compute=ComputeConfig(layers="scan", dtype="bfloat16"))

    def activations(length: int) -> int:
        model, data = replace(base.model, width=64, context=length), replace(base.data, context=length)
        return plan(replace(base, model=model, data=data), find_target("h100-8")).memory.activations

    assert activations(4096) < 2.2 * activations(2048)


def test_money_and_days():
    found = plan(gpt(data=8), V5E8)
    assert found.days == pytest.approx(found.experiment.train.steps * found.roofline.step / 86_400)
    assert found.cost(1.5) == pytest.approx(found.days * 24 * 8 * 1.5)
    assert plan(gpt(data=8), find_target("v2-8")).cost(1.0) == pytest.approx(
        plan(gpt(data=8), find_target("v2-8")).days * 24 * 4
    ), "two devices a chip, and chips are paid"


def test_small_batches_at_the_beginning_take_less_time():
    ramp = ((4, 100), (8, 200))
    data = replace(gpt().data, ramp=ramp, rows_multiple=4)
    found = plan(replace(gpt(data=4), data=data, train=TrainConfig(steps=1000)), find_target("v5e-4"))
    steps = 1000 - 100 * (1 - 4 / B) - 200 * (1 - 8 / B)
    assert found.days == pytest.approx(steps * found.roofline.step / 86_400)


def test_a_checkpoint_is_held_once_by_each_host():
    sixteen = find_target("v5e-16")
    copies, shares = plan(gpt(data=16), sixteen), plan(gpt(data=1, fsdp=16), sixteen)
    state = copies.memory.parameters + copies.memory.optimizer
    assert copies.host_memory == pytest.approx(state, rel=1e-3)
    assert state / 4 < shares.host_memory < state / 3
    assert shares.host_available == 4 * 48e9


def test_what_takes_less_can_be_typed():
    names = [overrides_of(gpt(data=8), changed) for changed in smaller(gpt(data=8), V5E8)]
    assert names[:4] == [
        "--compute.remat dots",
        "--compute.remat full",
        "--objective.chunk 128",
        "--mesh.data 1 --mesh.fsdp 8",
    ]
    assert "--train.accumulate 2" in names
    assert "--data.batch-rows 8 --data.rows-multiple 8" in names


def test_remedies_of_what_is_too_large_fit():
    large = replace(gpt(data=8), data=replace(gpt().data, batch_rows=2**19, rows_multiple=2**10))
    before = plan(large, V5E8)
    assert not before.fits
    trials = remedies(large, V5E8, compile=False, say=silent)
    fitting = [trial for trial in trials if trial.fits]
    assert len(fitting) == ENOUGH
    assert all(trial.plan.memory.total < before.memory.total for trial in fitting)


def test_meshes_are_ranked_and_all_divide():
    trials = meshes(gpt(data=8), V5E8, compile=False, tries=1, say=silent)
    assert all(np.prod(list(trial.plan.mesh.values())) == 8 for trial in trials)
    assert {trial.plan.mesh["tensor"] for trial in trials} == {1, 2, 4}, "8 does not divide 4 heads"
    steps = [trial.plan.roofline.step for trial in trials if trial.fits]
    assert steps == sorted(steps)


def test_a_search_compiles_until_what_was_compiled_leads(monkeypatch):
    """An estimate can be too low: then the next is compiled too."""
    estimates = meshes(gpt(data=8), V5E8, compile=False, tries=0, say=silent)
    first, second, third = (trial.estimate for trial in estimates[:3])
    slow = replace(second.roofline, memory=1000.0)
    outcomes = iter([replace(first, roofline=slow), second])
    real = remedies_of.plan
    monkeypatch.setattr(remedies_of, "plan", lambda e, t, **how: real(e, t, **how) if how else next(outcomes))
    monkeypatch.setattr(Target, "compile_devices", lambda self: [])
    trials = meshes(gpt(data=8), V5E8, compile=True, tries=3, say=silent)
    assert trials[0].plan is second
    assert trials[1].plan.mesh == third.mesh
    assert trials[-1].compiled.mesh == first.mesh, "the slow one"


def test_meshes_divide_positions_while_a_device_has_a_block_of_them():
    target = find_target("v5e-4")

    def contexts(experiment):
        trials = meshes(experiment, target, compile=False, tries=0, say=silent)
        return {trial.plan.mesh["context"] for trial in trials}

    base = gpt(data=4)
    long = replace(base, model=replace(base.model, context=2 * BLOCK), data=replace(base.data, context=2 * BLOCK))
    assert contexts(base) == {1}
    assert contexts(long) == {1, 2}
    assert contexts(replace(long, compute=replace(long.compute, attention="xla"))) == {1}, "it sees whole rows"


def test_meshes_divide_experts_too():
    base = gpt(data=4)
    mixture = replace(base, model=replace(base.model, experts=ExpertsConfig(count=6, chosen=2, group=T)))
    trials = meshes(mixture, find_target("v5e-4"), compile=False, tries=0, say=silent)
    assert {trial.plan.mesh["expert"] for trial in trials} == {1, 2}, "4 does not divide 6 experts"
    assert any("--mesh.expert 2" in trial.overrides for trial in trials)


def test_overrides_of_a_mesh_include_what_makes_it_divide():
    """Every stage of a ramp stays, and what is counted in steps is where as many rows have been read."""
    small = replace(
        gpt(data=8),
        data=replace(gpt().data, batch_rows=32, rows_multiple=2, ramp=((4, 8), (16, 7))),
        train=TrainConfig(steps=40),
        optim=replace(gpt().optim, schedule=ScheduleConfig(kind="cosine", warmup=4, steps=35)),
    )
    changed = dividing(replace(small, mesh=MeshConfig(data=1, fsdp=16)), find_target("v5e-16"))
    assert overrides_of(small, changed) == (
        "--data.rows-multiple 16 --data.ramp 16 9 --optim.schedule.warmup 1 --optim.schedule.steps 29 "
        "--train.steps 34 --mesh.data 1 --mesh.fsdp 16"
    )
    changed.check()


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (52.59G) "
         "exceeds available HBM (15.75G).", 52.59),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of "
         "15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
    ],
)  # fmt: skip
def test_the_compilers_refusal_is_understood(message, needed):
    assert _out_of_memory(message) == OutOfMemory(round(needed * 2**30), round(15.75 * 2**30))
    assert _out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-7", "v5e comes as"),
        ("v5x-16", "no TPU slice"),
        ("h10-8", "Did you mean 'h100-8'"),
        ("h100-12x", "neither a TPU slice nor a GPU"),
        ("h100-9", "9 GPUs do not fill 2 hosts"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_closest(name, says):
    with pytest.raises(UserError, match=says):
        find_target(name)


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"data": 3}, "does not match 8 device"),
        ({"data": 1, "tensor": 8}, "mesh tensor=8 does not divide [NK]=4"),
        ({"data": 1, "fsdp": 4}, "does not match 8 device"),
    ],
)
def test_a_wrong_mesh_is_refused_as_in_training(mesh, says):
    with pytest.raises(UserError, match=says):
        plan(gpt(**mesh), V5E8)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_estimate_is_near_what_the_compiler_said(path):
    """Of the golden plans, whose compiler is not needed for it."""
    was = json.loads(path.read_text(encoding="utf-8"))
    options = parse(PlanOptions, VERBS["plan"].default(was["recipe"]), was["overrides"].split(), "tjax plan")
    guess = plan(options.experiment, find_target(was["on"], was.get("slices", 1)))
    assert guess.memory.total == pytest.approx(was["memory"], rel=0.15)

    def moved(*kinds: str) -> tuple[int, int]:
        told = sum(amounts["bytes"] for kind, amounts in was["collectives"].items() if kind.startswith(kinds))
        return sum(move.bytes for move in guess.moves if move.kind in kinds), told

    guessed, told = moved("all-gather")
    assert guessed == pytest.approx(told, rel=0.12, abs=2**24)
    guessed, told = moved("all-to-all")
    assert guessed == pytest.approx(told, rel=0.01, abs=2**27)
    guessed, told = moved("all-reduce", "reduce-scatter")  # which of them is the compiler's choice
    assert guessed == pytest.approx(told, rel=0.15 if guess.mesh["expert"] == 1 else 0.35)


def test_the_published_vocabulary_cannot_be_divided():
    experiment = replace(find_recipe("gpt2_124m"), mesh=MeshConfig(data=2, tensor=4))
    with pytest.raises(UserError, match="mesh tensor=4 does not divide V=50257"):
        plan(experiment, V5E8)


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_screen_and_the_json_say_the_same(capsys):
    words = ("bert_large", "--on", "v4-32", "--estimate", "--price", "3.22")
    code, screen, _ = run(capsys, *words)
    assert code == 0
    assert max(len(line) for line in screen.splitlines()) <= 120
    assert len(screen.splitlines()) <= 45
    code, text, _ = run(capsys, *words, "--json")
    found = json.loads(text)
    assert code == 0
    assert found["source"] == "estimate"
    assert found["on"] == {"name": "v4-32", "slices": 1, "chip": "v4", "devices": 16, "hosts": 4}
    memory = found["memory_per_device"]
    parts = ("parameters", "optimizer", "batch", "activations", "logits", "gradients", "temporaries")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert f"{memory['total'] / 2**30:.2f} GiB" in screen
    assert f"{found['parameters']:,} parameters" in screen
    assert f"{found['cost']:,.0f} at 3.22" in screen
    assert "ESTIMATE" in screen


def test_what_does_not_fit_is_one_line_and_exit_code_2(capsys):
    code, out, err = run(capsys, "gpt2_1558m", "--on", "v5e-256", "--estimate", "--data.rows-multiple", "256")
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("tjax: gpt2_1558m does not fit v5e-256: ")
    assert "GiB a device of 15.75 (estimate). These do: --" in last
    assert "--mesh.fsdp" in last


@pytest.mark.parametrize(
    ("words", "sets"),
    [
        # The batch itself has too few rows.
        (("bert_large", "--on", "v4-1024"), "--data.batch-rows 512 --data.rows-multiple 512"),
        # A ramp that begins with 16 rows, and a model that does not fit without fsdp.
        (("gpt3_13b", "--on", "v5p-128"), "--data.rows-multiple 64 --data.ramp 64 30518 128 5086 256 2543 512 1272"),
    ],
)
def test_rows_that_cannot_be_divided_are_refused_once_with_a_command_that_works(capsys, words, sets):
    code, out, err = run(capsys, *words, "--estimate")
    assert (code, out) == (2, "")
    refusal, _, command = err.strip().splitlines()[-1].partition(": tjax plan ")
    assert refusal.startswith(f"tjax: {words[0]} has batches of a multiple of data.rows_multiple=")
    assert sets in command
    assert run(capsys, *command.split(), "--estimate")[0] == 0


def test_a_search_names_the_command_of_the_best(capsys):
    code, out, _ = run(capsys, "bert_tiny", "--on", "v5e-4", "--search", "--estimate")
    assert code == 0
    assert out.splitlines()[-1].startswith("best: tjax plan bert_tiny --on v5e-4 --")
    code, text, _ = run(capsys, "bert_tiny", "--on", "v5e-4", "--search", "--estimate", "--json")
    first = json.loads(text)["meshes"][0]
    assert first["fits"]
    assert first["overrides"] in out


def test_what_was_typed_is_part_of_the_best_command(capsys):
    _, out, _ = run(capsys, "bert_tiny", "--on", "v5e-1", "--search", "--estimate", "--compute.remat", "dots")
    assert out.splitlines()[-1] == "best: tjax plan bert_tiny --on v5e-1 --compute.remat dots --mesh.data 1"


def test_a_search_without_a_mesh_that_fits_says_so(capsys):
    words = ("gpt2_1558m", "--on", "v5e-1", "--search", "--estimate")
    code, out, err = run(capsys, *words)
    assert (code, "best:" in out) == (2, False)
    assert "no mesh of v5e-1 fits: at least " in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("tjax plan gpt2_1558m --on v5e-1 --mesh.data 1")


def test_devices_have_to_be_named(capsys):
    code, _, err = run(capsys, "bert_tiny")
    assert code == 2
    assert "--on v5e-16" in err
