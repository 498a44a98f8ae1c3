"""PyTorch beside us: by turns, on the same work, or not at all. The stand-in speaks the protocol without torch."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from transformer_jax.bench import peers
from transformer_jax.bench.batches import random_batch, sized
from transformer_jax.bench.peers import Contender, bench_peers, specification
from transformer_jax.bench.report import against_peers
from transformer_jax.errors import UserError
from transformer_jax.recipes import find_recipe

FAKE = """
import json, sys
spec = json.loads(sys.stdin.readline())
if spec["variant"] == "compile":
    sys.exit("no compiler at all")
say = lambda x: print(json.dumps(x), flush=True)
say({"parameters": PARAMETERS, "loss": 5.0, "first_seconds": 1.0})
for line in sys.stdin:
    n = int(line)
    say({"seconds": [0.5] * n, "cpu": [0.25] * n, "loss": 4.0, "peak": None})
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Stand in for both sides: ours takes a quarter of a second, the other one half."""

    def ours(*_):
        take = lambda n: {"seconds": [0.25] * n, "cpu": [0.25] * n, "loss": 4.0}  # noqa: E731
        return Contender("transformer_jax", take, {"parameters": 1000, "loss": 5.1, "first_seconds": 2.0, "setup": "s"})

    def with_parameters(count):
        (tmp_path / "peer.py").write_text(FAKE.replace("PARAMETERS", str(count)))

    with_parameters(1001)
    monkeypatch.setattr(peers, "SCRIPT", tmp_path / "peer.py")
    monkeypatch.setattr(peers, "_require", lambda *_: None)
    monkeypatch.setattr(peers, "_ours", ours)
    return with_parameters


def small():
    return sized(find_recipe("gpt2_demo"), 8, 16)


@pytest.mark.usefixtures("beside")
def test_ratios_say_how_much_faster_we_are():
    found = bench_peers(small(), ["eager", "compile"], budget=0.0)
    ratio = found["ratios"]["PyTorch eager"]
    assert (ratio["minima"], ratio["medians"], ratio["cpu_minima"]) == (2.0, 2.0, 1.0)
    # The first step of each turn does not count.
    assert found["contenders"]["PyTorch eager"]["step_seconds"]["samples"] == 3 * (peers.TURN - 1)
    assert found["contenders"]["transformer_jax"]["tokens_per_second"] == 8 * 16 / 0.25
    assert found["failed"] == {"compile": "no compiler at all"}
    shown = against_peers(found)
    assert "| PyTorch compile | failed: no compiler at all |" in shown
    assert "2.00 (2.00 to 2.00)" in shown


def test_another_model_is_no_peer(beside):
    beside(1200)
    with pytest.raises(UserError, match=r"PyTorch eager has 1,200 parameters, ours 1,000: this is not the same work"):
        bench_peers(small(), ["eager"])


@pytest.mark.usefixtures("beside")
def test_no_peer_at_all():
    with pytest.raises(UserError, match=r"no peer could be run: no compiler at all"):
        bench_peers(small(), ["compile"])


def test_what_has_no_peer():
    with pytest.raises(UserError, match=r"llama_style_114m: there are PyTorch peers of GPT-2 and of BERT"):
        specification(find_recipe("llama_style_114m"), {})
    gpt = small()
    with pytest.raises(UserError, match=r"optim\.kind=lamb: the PyTorch peers train with AdamW"):
        specification(replace(gpt, optim=replace(gpt.optim, kind="lamb")), random_batch(gpt))
    with pytest.raises(UserError, match=r"--python /nowhere"):
        bench_peers(gpt, ["eager"], python="/nowhere")


def test_pytorch_is_named_where_it_is_missing(tmp_path):
    pretends = tmp_path / "python"
    pretends.write_text("#!/bin/sh\nexit 1\n")
    pretends.chmod(0o755)
    with pytest.raises(UserError, match=r"need torch: pip install 'transformer_jax\[peers\]'.*--python"):
        bench_peers(small(), ["eager"], python=str(pretends))


@pytest.mark.parametrize(("name", "length"), [("gpt2_demo", 16), ("bert_small_demo", 24)])
def test_torch_builds_the_same_model(name, length):
    """Where torch is installed: as many parameters, and a first loss like ours."""
    pytest.importorskip("torch")
    if name.startswith("bert"):
        pytest.importorskip("transformers")
    recipe = sized(find_recipe(name), 8, length)
    found = bench_peers(recipe, ["eager"], python=sys.executable, budget=0.1)
    mine, theirs = found["contenders"].values()
    assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.05)
