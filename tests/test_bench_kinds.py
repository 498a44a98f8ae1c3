"""What stands beside the step: writing tokens, loading, saving, compiling at depth."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tiny import tiny, write_pairs
from tests.tiny_gpt import CHARACTERS as TOKENIZER
from tests.tiny_gpt import GPT2, experiment
from transformer_jax.bench import data as loading
from transformer_jax.bench import decode
from transformer_jax.bench.batches import sized
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.checkpoint import bench_checkpoint
from transformer_jax.bench.data import bench_data, one_core
from transformer_jax.bench.decode import Prompted, bench_decode
from transformer_jax.bench.depth import at_depth, bench_compile
from transformer_jax.bench.profile import _part, profile
from transformer_jax.bench.report import lines
from transformer_jax.bench.run import Request, bench
from transformer_jax.bench.train import Effort
from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.planning.hlo import Frame
from transformer_jax.recipes import find_recipe

QUICK = Effort(budget=0.2, width=0.5, warm_cache=False)
FAST = Ceilings("cpu", "float32", 1e15, 1e15, 1e15, "measured: in a test", 1e15, "measured: in a test")
SMALL = replace(tiny(), model=replace(tiny().model, encoder_layers=1, decoder_layers=1, dropout=0.0))


def told(what, point):
    return list(lines({"what": what, "points": [point | {"variant": ""}]}))


def test_decoding_by_a_decoder_alone():
    limits = replace(FAST, bandwidth=1e12)
    point = bench_decode(sized(experiment(GPT2, TOKENIZER), 8, 16), Prompted(11, 20), QUICK, limits)
    step, V = point["step_seconds"], TOKENIZER.vocab_size
    assert point["tokens_per_second"] == 8 / step["median"]
    assert np.isclose(np.median(step["seconds"]), step["median"])
    # Attention and feed-forward with biases, three norms, and the tied table, but no table of positions.
    weights = 4 * 24 * 24 + 4 * 24 + 2 * 24 * 40 + 40 + 24 + 3 * 2 * 24 + 24 * V
    cache = 8 * 31 * (2 * 24 * 4) * (11 + 20 / 2) / 31
    assert 4 * weights + cache <= point["bytes_per_token"] <= 4 * weights + 1.1 * cache  # positions of the places
    assert point["floor_seconds"] == point["bytes_per_token"] / 1e12
    assert point["parameter_bytes"] == 4 * weights
    assert any("greedy" in line for line in told("decode", point))


def test_the_floor_counts_what_a_token_has_to_read():
    """Of experts those that are chosen, of grouped heads their share, of a sliding window what it spans."""
    limits = replace(FAST, bandwidth=1e12)
    experts = replace(GPT2.experts, count=8, chosen=2)
    model = replace(GPT2, layers=2, kv_heads=2, windows=(0, 5), experts=experts)
    point = bench_decode(sized(experiment(model, TOKENIZER), 8, 16), Prompted(11, 20), QUICK, limits)
    V, width, kv = TOKENIZER.vocab_size, 24, 2 * 6
    attention = 2 * width * width + 2 * width + 2 * (width * kv + kv)
    expert = 2 * width * 40  # its biases are looked up
    layer = attention + width * 8 + 2 * expert + 2 * 2 * width
    assert point["parameter_bytes"] == 4 * (2 * layer + 2 * width + width * V)
    dense, sliding = 11 + 20 / 2, 5
    assert point["bytes_per_token"] - point["parameter_bytes"] == pytest.approx(
        8 * 4 * (dense + sliding) * (2 * kv + 1)
    )


def test_writing_faster_than_the_device_can_is_refused(monkeypatch):
    """Of a measured bandwidth or peak only after it was measured again."""
    again = []
    monkeypatch.setattr(Ceilings, "again", lambda self: again.append(self) or self)
    monkeypatch.setattr(decode, "CACHED", 0)
    tiny_gpt = sized(experiment(GPT2, TOKENIZER), 8, 16)
    with pytest.raises(UserError, match=r"a token took .* ms, less than the .* no figure is given"):
        bench_decode(tiny_gpt, Prompted(11, 4), QUICK, replace(FAST, bandwidth=1.0))
    with pytest.raises(UserError, match=r"took .* ms, less than the .* no figure is given"):
        bench_decode(tiny_gpt, Prompted(11, 4), QUICK, replace(FAST, peak=1e6))
    assert len(again) == 2
    with pytest.raises(UserError, match=r"--length is of training; --what decode reads --prompt tokens"):
        bench([("", tiny_gpt)], Request(what="decode", length=(8,)))


def test_decoding_by_a_translator():
    decode = replace(SMALL.decode, beam=3)
    experiment = sized(replace(SMALL, decode=decode), 8, 16)
    point = bench_decode(experiment, Prompted(9, 5, "int8"), QUICK, FAST)
    assert (point["rows"], point["length"], point["new"], point["how"]) == (8, 9, 5, "beam of 3")
    # A byte a number of the decoder's matrices and of the table; four a scale, a bias, and a number of the three norms.
    # Keys and values of the source were made while it was read.
    matrices, scales = (4 + 2) * 24 * 24 + 2 * 24 * 40 + 306 * 24, (4 + 2) * 24 + 40 + 24 + 306
    assert point["parameter_bytes"] == matrices + 4 * (scales + 40 + 24 + 3 * 2 * 24)
    memory = 8 * 9 * 2 * 24 * 4
    assert memory < point["bytes_per_token"]
    assert point["prefill_seconds"]["median"] > 0


@pytest.mark.parametrize(
    ("context", "given", "taken"),
    [
        (48, (None, None), (24, 24)),
        (48, (40, None), (40, 8)),
        (48, (None, 12), (36, 12)),
        (1024, (None, 500), (128, 500)),
    ],
)
def test_without_a_number_of_tokens_what_is_written_fits_the_context(context, given, taken) -> None:
    one = Prompted.fitting(experiment(replace(GPT2, context=context), TOKENIZER), *given)
    assert (one.prompt, one.new) == taken


def test_what_cannot_be_decoded():
    with pytest.raises(UserError, match=r"bert_tiny writes nothing"):
        bench_decode(find_recipe("bert_tiny"), Prompted(), QUICK, FAST)
    with pytest.raises(UserError, match=r"--prompt 40 and --new 9 are more than model\.context=48"):
        bench_decode(experiment(GPT2, TOKENIZER), Prompted(40, 9), QUICK, FAST)
    with pytest.raises(UserError, match=r"--prompt and --new must be at least 1"):
        bench_decode(SMALL, Prompted(0, 9), QUICK, FAST)


def test_the_loader_alone(tmp_path):
    write_pairs(tmp_path / "pairs.tsv")
    point = bench_data(sized(tiny(tmp_path / "pairs.tsv"), 8, 32), QUICK, FAST, tokens_per_second=1e3)
    assert 0 < point["padding"] < 1
    assert point["tokens_per_second"] == pytest.approx(point["tokens_per_second_padded"] * (1 - point["padding"]))
    assert point["headroom"] == point["tokens_per_second"] / 1e3
    assert point["step_seconds"]["samples"] <= loading.BLOCKS
    slow = told("data", point | {"headroom": 0.4})
    assert any("INPUT-BOUND" in line for line in slow)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_loader_has_one_core_and_gives_it_back():
    before = os.sched_getaffinity(0)
    with one_core() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_saving_stalls_no_longer_than_it_takes(tmp_path, monkeypatch):
    def quick(state, batch):
        time.sleep(1e-3)
        params = jax.tree.map(lambda x: x + 1, state.params)
        return replace(state, params=params), {"loss": np.float32(1), "tokens": np.float32(1)}

    monkeypatch.setattr(sys.modules["transformer_jax.train"].Trainer, "train_step", lambda _: quick)
    monkeypatch.chdir(tmp_path)
    point = bench_checkpoint(sized(SMALL, 8, 12), QUICK)
    assert point["state_bytes"] > 4 * 3 * 10_000
    assert point["disk_bytes"] > 1000
    assert 0 < point["step_seconds"]["median"] <= point["save_seconds"]["median"]
    assert point["stall_in_steps"] == point["step_seconds"]["median"] / point["plain_step_seconds"]["median"]
    assert not list(Path("runs").iterdir())
    assert any(line.strip().startswith("stall") for line in told("checkpoint", point))


@pytest.mark.slow
def test_compiling_at_depth():
    scanned = replace(SMALL, compute=ComputeConfig())
    point = bench_compile(sized(scanned, 8, 12), (1, 2))
    assert [(depth["layers"], depth["how"]) for depth in point["depths"]] == [(1, "scan"), (2, "scan")]
    seconds = [depth["trace"] + depth["compile"] for depth in point["depths"]]
    assert point["ratio"] == seconds[1] / seconds[0]
    deep = at_depth(find_recipe("gpt2_124m"), 96)
    assert (deep.model.layers, deep.compute.layers) == (96, "scan")
    assert at_depth(SMALL, 5).model.decoder_layers == at_depth(SMALL, 5).model.encoder_layers == 5
    with pytest.raises(UserError, match=r"--layers must be at least 1"):
        bench_compile(SMALL, ())


def test_parts_have_the_names_of_modules_and_packages():
    ours = [
        Frame("Verb.call", "/a/transformer_jax/cli/verb.py", 1),
        Frame("Block.__call__", "/a/transformer_jax/nn/block.py", 2),
        Frame("FeedForward.__call__", "/a/transformer_jax/nn/layers.py", 3),
        Frame("product", "/a/transformer_jax/nn/layers.py", 4),
    ]
    there = "/a/transformer_jax/.venv/lib/python3.11/site-packages"
    assert _part(ours) == _part([replace(frame, file=frame.file.replace("/a", there)) for frame in ours])
    assert _part(ours) == "Block > FeedForward"
    assert _part([*ours, Frame("scale_by_adam.<locals>.update_fn", f"{there}/optax/transforms/adam.py", 5)]) == "optax"
    assert _part([Frame("own_loss", "mine.py", 6)]) == "own_loss"


def test_a_profile_names_the_operations_of_the_step(tmp_path):
    found = profile(sized(SMALL, 8, 12), tmp_path, steps=3)
    operations = found["operations"]
    assert sum(one["share"] for one in operations) == pytest.approx(1)
    assert found["busy_milliseconds"] == pytest.approx(sum(one["milliseconds"] for one in operations))
    assert [one["share"] for one in operations] == sorted((one["share"] for one in operations), reverse=True)
    assert any("dot_general" in one["source"] for one in operations)
    assert not {one["name"].split(".")[0] for one in operations} & {"while", "call"}
    assert any(one["where"].startswith("nn/layers.py:") for one in operations)
    parts = {one["part"]: one for one in found["parts"]}
    assert {"Attention > Linear", "FeedForward > Linear", "optax"} <= parts.keys()
    assert sum(one["milliseconds"] for one in parts.values()) == pytest.approx(found["busy_milliseconds"])
    assert all(one["milliseconds"] == pytest.approx(one["forward"] + one["backward"]) for one in parts.values())
    assert parts["FeedForward > Linear"]["backward"] > 0 == parts["optax"]["backward"]
    assert Path(found["trace"]).is_relative_to(tmp_path)
    with pytest.raises(UserError, match=r"--steps must be at least 1"):
        profile(SMALL, tmp_path, steps=0)
