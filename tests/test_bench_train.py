"""The benchmark of the training step adds up, and is not fooled."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from tests.tiny import tiny, write_pairs
from transformer_jax.bench import account, ceilings, report
from transformer_jax.bench.account import RANKED, Work, check_complete, roofline, settled, shares, work_of
from transformer_jax.bench.batches import shapes_of, sized
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.run import Request, bench
from transformer_jax.bench.train import Effort, Watch, bench_real, bench_train, check_tokens, checked
from transformer_jax.data.loader import read_ahead
from transformer_jax.errors import UserError
from transformer_jax.hardware import CHIPS
from transformer_jax.nn.layers import Embedding
from transformer_jax.planning import traced
from transformer_jax.recipes import find_recipe

SMALL = replace(tiny(), model=replace(tiny().model, encoder_layers=1, decoder_layers=1))
TRAIN = sys.modules["transformer_jax.train"]  # the package has a function of this name
QUICK = Effort(budget=0.2, width=0.5)
FAST = Ceilings("cpu", "float32", 1e15, 1e15, 1e15, "measured: in a test", 1e15, "measured: in a test")
WORK = Work({RANKED: 300, "6N total": 500}, 400)


@pytest.fixture(scope="module")
def result():
    """One small sweep, really timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.COPIED, "cpu", 2**24)
        return bench([("", SMALL)], Request(batch=(8, 16), length=(12,), effort=QUICK))


def test_the_report_adds_up(result):
    for rows, point in zip((8, 16), result["points"], strict=True):
        step = point["step_seconds"]
        assert (point["rows"], point["length"], len(step["seconds"])) == (rows, 12, step["samples"])
        assert step["low"] <= step["median"] <= step["high"]
        assert point["tokens_per_second"] == point["tokens_per_second_padded"] == rows * 12 / step["median"]
        shapes = {"source": (rows, 12), "target": (rows, 13)}
        assert point["model_flops"][RANKED] == 3 * SMALL.model.forward_flops(shapes)
        assert point["hardware_flops"] > point["model_flops"][RANKED]  # masked scores are computed too
        assert 0 < point["mfu"][RANKED] < point["hfu"] < 1
        assert point["memory"]["compiler"] > 4 * 3 * point["parameters"]  # parameters and both moments
        assert point["compile_seconds"]["warm"] < point["compile_seconds"]["cold"]
        assert point["roofline"]["bytes"] > 4 * 3 * point["parameters"]
        assert len(point["hlo"]) == 64
    assert result["points"][0]["hlo"] != result["points"][1]["hlo"]
    assert {"command", "commit", "versions", "device", "flags"} <= result["provenance"].keys()
    assert "measured" in result["points"][0]["ceilings"]["peak_source"]


def test_the_page_holds_every_figure(result, tmp_path):
    page = report.write(result, tmp_path)
    assert report.read(tmp_path) == json.loads(json.dumps(result))
    assert page.read_text().count("data:image/png") == 2  # tokens/s against rows, and the roofline
    assert all(RANKED in line for line in report.lines(result) if line.lstrip().startswith("MFU *"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"no result of `tjax bench"):
        report.read(tmp_path / "other.json")


def test_a_step_that_does_nothing(monkeypatch):
    def nothing(trainer, state, batch, *_, **__):
        return state, {"loss": batch["target"].mean(), "tokens": batch["target"].size}

    monkeypatch.setattr(TRAIN, "train_step", nothing)
    with pytest.raises(UserError, match=r"steps changed no parameter of"):
        bench_train(sized(SMALL, 8, 12), replace(QUICK, warm_cache=False), FAST)
    monkeypatch.setattr(traced, "train_step", nothing)
    with pytest.raises(UserError, match=r"computes 0% of the model's matrix products.*leaves work out"):
        bench_train(sized(SMALL, 8, 12), QUICK, FAST)


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_a_model_that_leaves_out_its_output_layer(attention, monkeypatch):
    """Whatever attends, and at lengths where masked scores would make up for it."""
    experiment = replace(SMALL, compute=replace(SMALL.compute, attention=attention))
    trainer = checked(sized(experiment, 8, 200))
    assert work_of(trainer, shapes_of(trainer.experiment)).hardware > 0
    logits = Embedding.logits
    monkeypatch.setattr(Embedding, "logits", lambda self, x: x.sum(-1, keepdims=True) + self.table[...][:, 0])
    with pytest.raises(UserError, match=r"computes \d\d% of the model's matrix products.*leaves work out"):
        check_complete(trainer)
    # Computed, but nothing is learned from it.
    monkeypatch.setattr(Embedding, "logits", lambda self, x: jax.lax.stop_gradient(logits(self, x)))
    with pytest.raises(UserError, match=r"leaves work out"):
        check_complete(trainer)


def test_experts_without_a_limit_count_the_choices():
    """Without places there is no slack: as many products as the model has, but for causal scores."""
    moe = find_recipe("moe_demo")
    model = replace(moe.model, layers=1, experts=replace(moe.model.experts, capacity=0.0))
    trainer = checked(sized(replace(moe, model=model), 8, 16))
    work = work_of(trainer, shapes_of(trainer.experiment))
    causal = 3 * 2 * 8 * 16 * 16 * model.width
    assert work.hardware == work.model[RANKED] + causal


def test_a_step_has_to_change_parameters_and_to_count_tokens():
    trainer = checked(sized(SMALL, 8, 12))
    state = trainer.init()
    watch = Watch(trainer, state)
    first, *rest = jax.tree.leaves(state.params)
    few = jax.tree.unflatten(jax.tree.structure(state.params), [first + 1, *rest])
    watch.see({"loss": jnp.float32(1), "tokens": jnp.float32(9)})
    with pytest.raises(UserError, match=rf"1 steps changed 1 parameter of {1 + len(rest)}: .* leaves the update out"):
        watch.check(replace(state, params=few))
    watch.check(replace(state, params=jax.tree.map(lambda x: x + 1, state.params)))
    for wrong in (0, 97):
        with pytest.raises(UserError, match=rf"{wrong} tokens are counted on 96 positions"):
            check_tokens(wrong, 96)


def test_more_than_the_device_can_do():
    slow = replace(FAST, peak=100.0, peak_source="vendor: a page")
    with pytest.raises(UserError, match=r"MFU is 300% .*\(vendor: a page\).*no figure is given"):
        shares(WORK, 1.0, slow, 1)
    with pytest.raises(UserError, match=r"HFU is 133%"):
        shares(WORK, 0.5, replace(slow, peak=600.0), 1)
    fine = shares(WORK, 2.0, replace(slow, peak=200.0), 4)
    assert (fine["mfu"][RANKED], fine["mfu"]["6N total"], fine["hfu"]) == (300 / 1600, 500 / 1600, 400 / 1600)
    assert shares(Work({RANKED: 300}, None), 2.0, FAST, 1)["hfu"] is None


def test_a_peak_that_was_measured_beside_other_programs_is_measured_again(monkeypatch):
    monkeypatch.setattr(ceilings, "matmul_rate", lambda _: 5000.0)
    monkeypatch.setattr(ceilings, "copy_rate", lambda: 2.0)
    disturbed = replace(FAST, matmul=100.0, peak=100.0, copy=7.0)
    again = settled(WORK, 1.0, disturbed, 1)
    assert (again.matmul, again.peak, again.copy) == (5000.0, 5000.0, 7.0)
    assert settled(WORK, 100.0, disturbed, 1) is disturbed
    assert settled(WORK, 1.0, replace(disturbed, peak_source="vendor: a page"), 1).peak == 100.0


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(ceilings, "matmul_rate", lambda _: 90e12)
    monkeypatch.setattr(ceilings, "copy_rate", lambda: 1e12)


def as_chip(monkeypatch, name):
    chip = next(chip for chip in CHIPS if chip.name == name)
    monkeypatch.setattr(ceilings, "chip_of", lambda _: chip)
    return chip


def test_a_run_beside_other_programs_says_so(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 31.25)
    assert ceilings.busy().startswith("other programs kept 2.5 of 8 cores busy")
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 12.5)
    assert not ceilings.busy()
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100.0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not ceilings.busy()


@pytest.mark.usefixtures("measured")
def test_the_peak_of_an_unknown_chip_is_measured_and_says_so():
    found = ceilings.ceilings("float32")
    assert (found.peak, found.measured, found.bandwidth) == (90e12, True, 1e12)
    assert "1024 x 1024 float32" in found.peak_source


@pytest.mark.usefixtures("measured")
def test_a_wrong_peak_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"--peak 50 TFLOP/s is wrong.*reached 90 TFLOP/s"):
        ceilings.ceilings("float32", given=50)
    assert "only 18%" in ceilings.ceilings("float32", given=500).doubt
    assert not ceilings.ceilings("float32", given=100).doubt
    as_chip(monkeypatch, "h100")
    with pytest.raises(UserError, match=r"--peak 1979 TFLOP/s contradicts the vendor's 989"):
        ceilings.ceilings("bfloat16", given=1979)
    known = ceilings.ceilings("bfloat16")
    assert (known.peak, known.matmul, known.bandwidth) == (989e12, 90e12, 3350e9)
    as_chip(monkeypatch, "l4")
    with pytest.raises(UserError, match=r"above the peak of 60 TFLOP/s.*the clock or the table is wrong"):
        ceilings.ceilings("float32")


def test_an_input_bound_loader_shows(tmp_path, monkeypatch):
    def slow(plan, assemble, threads):
        def late(entry):
            time.sleep(0.3)
            return assemble(entry)

        return read_ahead(plan, late, threads)

    def quick(state, batch):
        params = jax.tree.map(lambda x: np.asarray(x) + 1, state.params)
        tokens = (np.asarray(batch["target"])[:, 1:] != 0).sum()
        return replace(state, params=params), {"loss": np.float32(1), "tokens": np.float32(tokens)}

    monkeypatch.setattr("transformer_jax.data.parallel.read_ahead", slow)
    monkeypatch.setattr(TRAIN.Trainer, "train_step", lambda _: quick)
    write_pairs(tmp_path / "pairs.tsv")
    experiment = sized(replace(tiny(tmp_path / "pairs.tsv"), model=SMALL.model), 16, 32)
    experiment = replace(experiment, data=replace(experiment.data, threads=1))
    point = bench_real(experiment, replace(QUICK, budget=2.0), FAST)
    assert point["input_bound_share"] > 0.5
    assert point["tokens_per_second"] < point["tokens_per_second_padded"]
    assert 0 < point["padding"] < 1
    # Speed is that of the whole loop: at most one batch every 0.3 s.
    assert point["tokens_per_second_padded"] < 16 * 32 / 0.3
    (line,) = [line for line in report.lines({"what": "train", "points": [point | {"variant": ""}]}) if "input" in line]
    assert "INPUT-BOUND" in line


def test_what_does_not_fit_is_a_point_of_a_sweep_and_an_error_alone(monkeypatch):
    def full(experiment, effort, limits):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("transformer_jax.bench.run.ceilings", lambda *_: FAST)
    monkeypatch.setattr("transformer_jax.bench.run.bench_train", full)
    found = bench([("", tiny())], Request(batch=(8, 16), length=(12,)))
    assert [point["failed"] for point in found["points"]] == ["out of memory"] * 2
    with pytest.raises(UserError, match=r"8 rows of 12 tokens do not fit in memory"):
        bench([("", tiny())], Request(batch=(8,), length=(12,)))


def test_mistakes_are_told_before_anything_is_measured():
    with pytest.raises(UserError, match=r"--batch 12: 8 parts .* do not divide it"):
        checked(sized(tiny(), 12, 12))
    with pytest.raises(UserError, match=r"--budget must be positive"):
        bench([("", tiny())], Request(effort=Effort(budget=0)))
    slow = replace(FAST, matmul=1.0)
    with pytest.raises(UserError, match=r"a step of 8 rows of 12 tokens takes at least .* --batch 1"):
        bench_train(sized(SMALL, 8, 12), QUICK, slow)


def test_kernels_that_do_not_say_what_they_compute(monkeypatch):
    trainer = checked(sized(SMALL, 8, 12))
    shapes = shapes_of(trainer.experiment)
    assert work_of(trainer, shapes).hardware > 0
    monkeypatch.setattr(account, "check_complete", lambda _: None)
    monkeypatch.setattr(account, "estimated", lambda _: traced.Estimate(flops=1))
    fused = replace(trainer.skeleton, compute=replace(trainer.skeleton.compute, attention="cudnn"))
    assert work_of(replace(trainer, skeleton=fused), shapes).hardware is None


def test_the_roof():
    limits = replace(FAST, matmul=100.0, copy=10.0)
    assert roofline(WORK, 10, 8.0, limits, 1)["bound"] == "compute"  # 4 s of products, 1 s of traffic
    bound = roofline(WORK, 60, 8.0, limits, 2)  # 2 s and 6 s
    assert (bound["bound"], bound["compute_share"], bound["memory_share"]) == ("memory", 0.25, 0.75)
    assert bound["flops_per_byte"] == pytest.approx(200 / 60)
    assert bound["ridge"] == 10
    cached = roofline(WORK, 600, 8.0, limits, 1)
    assert cached["in_cache"]
    assert cached["bound"] == "compute"
    assert np.isclose(cached["memory_share"], 7.5)
