"""Laws of several slices: they lie along data, and what they exchange over DCN is told apart from ICI."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.test_plan import run, silent
from tests.test_plan_hlo import B, D, V, gpt
from transformer_jax.config import MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.planning.collectives import Collective, collectives
from transformer_jax.planning.hlo import parse
from transformer_jax.planning.planner import plan as plan_any
from transformer_jax.planning.remedies import meshes
from transformer_jax.planning.roofline import as_groups, link_of, roofline
from transformer_jax.planning.target import find_target
from transformer_jax.planning.traffic import memory_traffic
from transformer_jax.sharding import AXES, make_mesh

plan = partial(plan_any, compile=False)
TWO = find_target("v5e-8", 2)


def numbers(mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def test_slices_lie_along_data_and_every_other_axis_stays_in_one():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), TWO.stand_ins())
    assert mesh.shape["data"] == 4
    of = np.moveaxis(numbers(mesh), AXES.index("data"), 0).reshape(4, -1)
    assert of.tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    # Within a slice, neighbours lie as they do where there is one.
    alone = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), find_target("v5e-8").stand_ins())
    first = [device.coords for device in mesh.devices.flat[:8]]
    assert first == [device.coords for device in alone.devices.flat]
    assert first == [device.coords for device in mesh.devices.flat[8:]]


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 16}, {"data": 2, "fsdp": 12}, {"data": 3, "fsdp": 8}])
def test_slices_have_to_divide_data(sizes):
    devices = find_target("v5e-8", 3 if sizes["data"] != 1 else 2).stand_ins()
    if sizes["data"] == 3:
        assert make_mesh(MeshConfig(**sizes), devices).shape["data"] == 3
        return
    with pytest.raises(UserError, match=rf"mesh data={sizes['data']} does not divide among \d slices, .*multiple of"):
        make_mesh(MeshConfig(**sizes), devices)


def test_hosts_of_gpus_that_call_themselves_slices_are_none():
    """JAX numbers the hosts of GPUs so; their axes may go anywhere."""
    devices = [replace(device, slice_index=device.process_index) for device in find_target("h100-16").stand_ins()]
    mesh = make_mesh(MeshConfig(data=1, fsdp=16), devices)
    assert [device.id for device in mesh.devices.flat] == list(range(16))


def test_a_slice_more_changes_what_crosses_the_network_and_nothing_on_a_device():
    more = replace(gpt(data=16), data=replace(gpt().data, batch_rows=2 * B))
    one, two = plan(gpt(data=8), find_target("v5e-8")), plan(more, TWO)
    assert two.memory == one.memory
    assert (two.computed_flops, two.traffic) == (2 * one.computed_flops, one.traffic)
    assert (two.target.devices, two.target.hosts, two.target.chips) == (16, 2, 16)
    assert {move.network for move in one.moves} == {"ICI"}
    moved = {(m.kind, m.axes, m.network): m.bytes for m in two.moves}
    gradients = 4 * two.parameters
    # Eight devices of a slice add up in shares; each exchanges its own with its like in the other slice.
    assert moved == {
        ("reduce-scatter", "data", "ICI"): gradients,
        ("all-reduce", "data", "DCN"): pytest.approx(gradients / 8, rel=1e-3),
        ("all-gather", "data", "ICI"): gradients,
    }
    assert two.roofline.networks["DCN"] == pytest.approx(gradients / 8 / TWO.chip.network, rel=1e-3)
    assert two.cost(2.0) == pytest.approx(two.days * 24 * 16 * 2.0)


def test_shares_of_parameters_cross_the_network_as_shares():
    found = plan(gpt(data=2, fsdp=8), TWO)
    (between,) = [move for move in found.moves if move.network == "DCN"]
    assert (between.kind, between.axes) == ("all-reduce", "data")
    assert between.bytes == 4 * (found.parameters + V * D) / 8, "what is whole on all devices is summed in shares too"
    assert not [move for move in found.moves if move.axes == "data" and move.network == "ICI"]


@pytest.mark.parametrize("slices", [2, 3])
def test_the_time_between_slices_is_that_of_a_ring_of_them(slices):
    target = find_target("v5e-4", slices)
    mesh = make_mesh(MeshConfig(data=4 * slices), target.stand_ins())
    whole = Collective("all-reduce", 4 * 10**9, 5, as_groups(mesh, "data"), False, "")
    within, between, again = whole.parts(slices)
    assert (within.kind, again.kind) == ("reduce-scatter", "all-gather")
    assert {numbers(mesh).flat[i] for i in within.groups[-1]} == {slices - 1}
    assert between.groups.shape == (4, slices)
    link = link_of(target, mesh, between.groups)
    assert (link.network, link.bandwidth) == ("DCN", target.chip.network)
    found = roofline(target, mesh, flops=0, traffic=0, found=[between], dtype="bfloat16")
    assert found.networks == {"DCN": pytest.approx(5 * 10**9 * 2 * (slices - 1) / slices / target.chip.network)}
    assert list(within.parts(1)) == [within]


SENDS = """\
ENTRY %main (p: f32[256,4096]) -> f32[128,4096] {{
  %p = f32[256,4096]{{1,0:T(8,128)}} parameter(0)
  %token = token[] after-all()
  %rs = f32[128,4096]{{1,0:T(8,128)}} reduce-scatter(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={{0}}
  %send = (f32[128,4096]{{1,0:T(8,128)}}, u32[], token[]) send(%rs, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r_0",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{{1,2}}x{{0:7}}",_xla_megascale_transfer_type="{kind}"}}
  %recv = (f32[128,4096]{{1,0:T(8,128)}}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r_0"}}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  {work}
  %recv-done = (f32[128,4096]{{1,0:T(8,128)}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %answer = f32[128,4096]{{1,0:T(8,128)}} get-tuple-element(%recv-done), index=0
}}
"""
WORK = "%dot = f32[128,128]{1,0} dot(%rs, %rs), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
SIZE = 128 * 4096 * 4


@pytest.mark.parametrize("work", ["", WORK], ids=["waits", "works"])
@pytest.mark.parametrize(
    ("written", "kind", "size"),
    [
        ("ALL_REDUCE", "all-reduce", SIZE),
        ("ALL_GATHER", "all-gather", 2 * SIZE),
        ("ONE_TO_ONE", "collective-permute", SIZE),
    ],
)
def test_what_libtpu_sends_between_slices_is_read(written, kind, size, work):
    """The program is that of one slice, and its devices are numbered within it."""
    program = parse(SENDS.format(kind=written, work=work))
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), find_target("v5e-8", 2).stand_ins())
    within, between = collectives(program, 16, 2)
    assert (within.kind, within.axes(mesh), link_of(TWO, mesh, within.groups).network) == (
        "reduce-scatter",
        "data",
        "ICI",
    )
    assert (between.kind, between.bytes, between.axes(mesh)) == (kind, size, "data")
    assert between.groups.tolist() == [[i, i + 8] for i in range(8)]
    assert link_of(TWO, mesh, between.groups).network == "DCN"
    assert between.overlapped == bool(work)


def test_what_goes_through_the_hosts_is_read_once_and_written_once():
    sent = memory_traffic(parse(SENDS.format(kind="ALL_REDUCE", work="")))
    assert sent == pytest.approx(2 * SIZE + 3 * SIZE, rel=1e-4), "and the reduce-scatter before it: two in, one out"


def test_a_search_keeps_slices_apart():
    found = meshes(gpt(data=8), find_target("v5e-4", 2), compile=False, tries=1, say=silent)
    assert {trial.plan.mesh["data"] for trial in found} == {2, 4, 8}
    assert all(trial.plan.roofline.networks["DCN"] for trial in found)


def test_the_command_knows_slices(capsys):
    words = ("bert_tiny", "--on", "v5e-4", "--slices", "2", "--estimate")
    code, screen, _ = run(capsys, *words)
    assert code == 0
    assert screen.startswith("bert_tiny on 2 slices over DCN, each v5e-4: 4 chips (2x2) on 1 host; ")
    assert " DCN " in screen
    found = json.loads(run(capsys, *words, "--json")[1])
    assert (found["on"]["slices"], found["on"]["devices"], found["on"]["hosts"]) == (2, 8, 2)
    assert found["seconds"]["networks"].keys() == {"ICI", "DCN"}
    code, out, _ = run(capsys, *words, "--search")
    assert "best: tjax plan bert_tiny --on v5e-4 --slices 2 --" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("2xv5e-4",), "--on v5e-4 --slices 2"),
        (("v3-32", "--slices", "2"), "joined from v4 on"),
        (("v5e-4", "--slices", "0"), "--slices must be at least 1"),
        (("h100-8", "--slices", "2"), "--slices says nothing about GPUs"),
        (("v5e-4", "--slices", "2", "--mesh.data", "1", "--mesh.fsdp", "8"), "data=1 does not divide among 2 slices"),
    ],
)
def test_slices_that_cannot_be_are_refused_in_one_line(capsys, words, says):
    code, out, err = run(capsys, "bert_tiny", "--estimate", "--on", *words)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]
