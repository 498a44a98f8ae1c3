"""Laws of the compiled training step, read from its HLO on 8 fake devices: its collectives, and no others."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.tiny import deterministic, tiny
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig, TrainConfig
from transformer_jax.data.masked import MaskedText
from transformer_jax.data.packed import PackedText
from transformer_jax.models import BertConfig, GPTConfig
from transformer_jax.objectives import CausalLM, MaskedLM
from transformer_jax.planning.collectives import Collective, collectives, replica_groups
from transformer_jax.planning.hlo import Array, parse
from transformer_jax.planning.traffic import memory_traffic
from transformer_jax.train import Trainer

V, D, F, L, N, T, B = 304, 48, 80, 5, 4, 24, 16
COMPUTE = ComputeConfig(layers="scan")


def gpt(**mesh: int) -> Experiment:
    base = tiny()
    return replace(
        base,
        model=GPTConfig(vocab_size=V, context=T, width=D, layers=L, heads=N, feedforward=F),
        objective=CausalLM(),
        data=PackedText(dataset="none.txt", context=T, batch_rows=B, rows_multiple=B),
        compute=COMPUTE,
        mesh=MeshConfig(**mesh),
    )


def bert(**mesh: int) -> Experiment:
    return replace(
        gpt(**mesh),
        model=BertConfig(vocab_size=V, context=T, width=D, layers=L, heads=N, feedforward=F, dropout=0.0),
        objective=MaskedLM(),
        data=MaskedText(dataset="none.txt", length=T, batch_rows=B, rows_multiple=B),
    )


def transformer(**mesh: int) -> Experiment:
    base = deterministic(tiny())
    data = replace(base.data, max_length=T, batch_tokens=B * T, rows_multiple=B, bucket_lengths=())
    model = replace(base.model, vocab_size=V, width=D, heads=N, feedforward=F, decoder_layers=L)
    return replace(base, model=model, data=data, compute=COMPUTE, mesh=MeshConfig(**mesh))


FAMILIES = {"gpt": gpt, "bert": bert, "transformer": transformer}
MESHES = {"data": {"data": 8}, "fsdp": {"data": 1, "fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}


def compiled(trainer: Trainer):
    """Compile the step."""
    return trainer.lower_train_step(trainer.experiment.data.batch_shapes()).compile()


class Step:
    """A compiled step, and what can be read from it."""

    def __init__(self, experiment: Experiment) -> None:
        self.trainer = Trainer.of(experiment, jax.devices()[:8])
        self.found = collectives(parse(compiled(self.trainer).as_text()), self.trainer.mesh.size)
        self.shapes = [leaf.shape for leaf in jax.tree.leaves(self.trainer.skeleton.abstract)]

    def moved(self, kind: str, axes: str) -> int:
        return sum(c.bytes * c.times for c in self.along(kind, axes))

    def along(self, kind: str, axes: str) -> list[Collective]:
        return [c for c in self.found if c.kind == kind and c.axes(self.trainer.mesh) == axes]


@cache
def step(family: str, mesh: str) -> Step:
    return Step(FAMILIES[family](**MESHES[mesh]))


def bytes_of_parameters(s: Step) -> int:
    return 4 * sum(math.prod(shape) for shape in s.shapes)


def largest_layer(s: Step) -> int:
    """Bytes of the largest parameter of one layer, or of the largest table."""
    letters = jax.tree.leaves(s.trainer.skeleton.letters)
    sizes = [
        math.prod(shape[1:] if names.startswith("L") else shape) for shape, names in zip(s.shapes, letters, strict=True)
    ]
    return 4 * max(sizes)


def test_copies_exchange_nothing_but_the_gradients():
    s = step("gpt", "data")
    assert {c.kind for c in s.found} == {"all-reduce"}
    moved, parameters = s.moved("all-reduce", "data"), bytes_of_parameters(s)
    assert parameters <= moved < 1.6 * parameters  # a tied table's gradient comes in two parts


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_parameters_are_put_together_a_layer_at_a_time(family):
    s = step(family, "fsdp")
    gathers = s.along("all-gather", "fsdp")
    # Once for the forward and once for the backward pass.
    assert 1.5 * bytes_of_parameters(s) < sum(c.bytes * c.times for c in gathers) < 3.5 * bytes_of_parameters(s)
    assert max(c.bytes for c in gathers) <= largest_layer(s)
    assert max(c.times for c in gathers) == L


@pytest.mark.parametrize("family", FAMILIES)
def test_no_device_ever_holds_all_logits(family):
    """With the vocabulary over two devices, nothing of the size of a device's rows of logits is gathered."""
    s = step(family, "mixed")
    assert s.along("all-reduce", "tensor"), "the halves of each sublayer are added up"
    length = T if family != "bert" else s.trainer.experiment.data.batch_shapes()["targets"][0][1]
    logits = B // 4 * length * V * 4
    gathered = [
        c.bytes for c in s.found if c.kind in ("all-gather", "all-to-all") and c.axes(s.trainer.mesh) == "tensor"
    ]
    assert max(gathered, default=0) < logits / 2


def test_the_rows_of_a_batch_stay_where_they_are():
    s = step("gpt", "fsdp")
    stream = B * T * D * 4
    assert not [c for c in s.found if c.kind == "all-gather" and c.bytes >= stream]


def memory(experiment: Experiment, devices: int) -> int:
    found = compiled(Trainer.of(experiment, jax.devices()[:devices])).memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def test_memory_of_a_device_falls_as_axes_grow():
    one = memory(gpt(data=1), 1)
    assert memory(gpt(data=1, fsdp=4), 4) < one / 2.5
    assert memory(gpt(data=1, tensor=4), 4) < one / 1.5
    assert memory(replace(gpt(data=1), train=TrainConfig(accumulate=8)), 1) < one / 2


def test_loops_count_as_often_as_they_turn():
    """7 turns of 3 turns of a product of [5, 11] and [11, 11] each."""

    def run(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=7)[0]

    compiled = jax.jit(run).lower(jnp.ones((5, 11)), jnp.ones((11, 11))).compile()
    program = parse(compiled.as_text())
    times = [
        n
        for _, i, n in program.walk()
        if i.opcode in ("dot", "custom-call") or ("dot" in i.name and i.opcode == "fusion")
    ]
    assert max(times) == 21


def test_a_loop_without_a_known_count_is_read_from_its_condition():
    program = parse(LOOP)
    (loop,) = (i for _, i, _ in program.walk() if i.opcode == "while")
    assert program.turns(loop) == 6
    assert program.times["body"] == 6


LOOP = """HloModule m

%cond (p.0: (s32[], f32[4])) -> pred[] {
  %p.0 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[4]{0:T(128)} get-tuple-element(%p.1), index=1
  %y = f32[4]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i.1, %y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %in = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(128)}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%in), condition=%cond, body=%body
  %start = (f32[4]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}) all-gather-start(%a), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %busy = f32[4]{0:T(128)} fusion(%a), kind=kLoop, calls=%work
  %done = f32[8]{0:T(128)} all-gather-done(%start)
  %start.2 = (f32[4]{0:T(128)}, f32[4]{0:T(128)}) collective-permute-start(%a), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done.2 = f32[4]{0:T(128)} collective-permute-done(%start.2)
  ROOT %r = f32[4]{0:T(128)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501 - as XLA prints it


def test_what_runs_between_start_and_end_hides_a_collective():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    found = {c.kind: c for c in collectives(parse(LOOP), 4)}
    assert {kind: (c.bytes, c.times, c.overlapped) for kind, c in found.items()} == {
        "all-reduce": (16, 6, False),
        "all-gather": (32, 1, True),
        "collective-permute": (16, 1, False),
    }
    assert found["all-reduce"].axes(mesh) == "fsdp"
    assert found["all-gather"].axes(mesh) == "data"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, d", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}, x", [[0, 4, 1, 5, 2, 6, 3, 7]]),
        ("source_target_pairs={{0,1},{1,0}}, metadata={}", [[0, 1], [1, 0]]),
        ("source_target_pairs={{0,0},{1,3},{3,3}}, metadata={}", [[1, 3]]),
    ],
)
def test_every_notation_of_groups(text, groups):
    assert replica_groups(f"channel_id=7, {text}", 8).tolist() == groups


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("1,0:T(8,128)", 16 * 128 * 4),
        ("0,1:T(8,128)", 24 * 128 * 4),
        ("1,0", 13 * 20 * 4),
        ("1,0:T(8,128)S(1)", 16 * 128 * 4),
    ],
)
def test_a_tpu_fills_up_tiles(layout, size):
    array = Array("f32", (13, 20), layout)
    assert array.padded_bytes == size
    assert array.in_memory == ("S(" not in layout)


def test_memory_traffic_of_a_product_is_its_three_matrices():
    m, k, n = 300, 400, 500
    compiled = jax.jit(jnp.matmul).lower(jnp.ones((m, k)), jnp.ones((k, n))).compile()
    assert memory_traffic(parse(compiled.as_text())) == 4 * (m * k + k * n + m * n)


def test_memory_traffic_of_a_loop_over_a_stack_reads_each_layer_once():
    layers, n = 9, 64

    def run(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x) * w, None), x, stack)[0]

    compiled = jax.jit(run).lower(jnp.ones((layers, n, n)), jnp.ones((n, n))).compile()
    one = 4 * n * n
    assert 3 * layers * one <= memory_traffic(parse(compiled.as_text())) <= 3.5 * layers * one
