"""PyTorch beside us: by turns, on the same work, or not at all. The stand-in speaks the protocol without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from transformer_jax.bench import peer_ours, peers
from transformer_jax.bench.batches import random_batch, sized
from transformer_jax.bench.decode import Opened, Prompted
from transformer_jax.bench.peer_ours import Contender
from transformer_jax.bench.peer_spec import training, variants_of, write_weights, writing
from transformer_jax.bench.peers import bench_peers
from transformer_jax.bench.report import against_peers
from transformer_jax.errors import UserError
from transformer_jax.nn.module import parameter_count
from transformer_jax.objectives import means
from transformer_jax.recipes import find_recipe
from transformer_jax.train import Trainer

FAKE = """
import json, sys
spec = json.loads(sys.stdin.readline())
if spec["variant"] == "compile":
    sys.exit("no compiler at all")
if spec["variant"] == "static-compile":
    print(json.dumps({"first_seconds": 1.0}), flush=True)
    sys.exit("out of memory")
say = lambda x: print(json.dumps(x), flush=True)
say({"first_seconds": 1.0} | json.loads(FACTS))
for line in sys.stdin:
    n = int(line)
    say({"seconds": [0.5 + 0.1 * (spec["variant"] == "static")] * n, "cpu": [0.25] * n, "peak": None})
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Stand in for both sides: ours takes a quarter of a second, the other one half or more."""

    def ours(*_):
        take = lambda n: {"seconds": [0.25] * n, "cpu": [0.25] * n}  # noqa: E731
        facts = {"parameters": 1000, "loss": 5.1, "written": [[7, 8, 9, 4]], "tokens": 80, "first_seconds": 2.0}
        return Contender("transformer_jax", take, facts | {"setup": "s"})

    def telling(**facts):
        (tmp_path / "peer.py").write_text(FAKE.replace("FACTS", repr(json.dumps(facts))))

    telling(parameters=1000, loss=5.1)
    monkeypatch.setattr(peers, "SCRIPT", tmp_path / "peer.py")
    monkeypatch.setattr(peers, "_require", lambda *_: None)
    monkeypatch.setattr(peer_ours, "trainer", ours)
    monkeypatch.setattr(peer_ours, "writer", ours)
    return telling


def small():
    return sized(find_recipe("gpt2_demo"), 8, 16)


@pytest.mark.usefixtures("beside")
def test_ratios_say_how_much_faster_we_are():
    found = bench_peers(small(), budget=0.0)
    ratio = found["ratios"]["PyTorch eager"]
    assert (ratio["minima"], ratio["medians"], ratio["cpu_minima"]) == (2.0, 2.0, 1.0)
    # The first step of each turn does not count.
    assert found["contenders"]["PyTorch eager"]["step_seconds"]["samples"] == 3 * (peers.TURN - 1)
    assert found["contenders"]["transformer_jax"]["tokens_per_second"] == 80 / 0.25
    assert found["failed"] == {"compile": "no compiler at all"}
    shown = against_peers(found)
    assert "| PyTorch compile | failed: no compiler at all |" in shown
    assert "2.00 (2.00 to 2.00)" in shown


def test_the_best_of_those_that_ran_is_who_counts(beside):
    beside(parameters=1000, written=[[7, 8, 9, 4]])
    found = bench_peers(small(), ["static", "static-compile", "dynamic"], budget=0.0, prompted=Prompted(5, 4))
    assert found["failed"] == {"static-compile": "out of memory"}
    assert found["best"] == dict.fromkeys(("minima", "medians"), "PyTorch dynamic") | {"cpu_minima": "PyTorch static"}
    assert found["contenders"]["PyTorch static"]["same_tokens"] == 1.0
    assert "best of them: 2.00 by minima (PyTorch dynamic)" in against_peers(found)


def test_other_work_is_no_comparison(beside):
    beside(parameters=1001, loss=5.1)
    with pytest.raises(UserError, match=r"PyTorch eager has 1,001 parameters, ours 1,000: this is not the same work"):
        bench_peers(small(), ["eager"])
    beside(parameters=1000, loss=5.102)
    with pytest.raises(UserError, match=r"eager has a loss of 5\.10200, ours is 5\.10000: this is not the same work"):
        bench_peers(small(), ["eager"])
    beside(parameters=1000, loss=float("nan"))
    with pytest.raises(UserError, match=r"a loss of nan"):
        bench_peers(small(), ["eager"])
    beside(parameters=1000, written=[[7, 8, 0, 0]])
    with pytest.raises(UserError, match=r"PyTorch dynamic writes 50% of our tokens only"):
        bench_peers(small(), ["dynamic"], prompted=Prompted(5, 4))


@pytest.mark.usefixtures("beside")
def test_no_peer_at_all():
    with pytest.raises(UserError, match=r"no peer could be run: no compiler at all"):
        bench_peers(small(), ["compile"])


def test_what_has_no_peer():
    with pytest.raises(UserError, match=r"llama_style_114m: there are PyTorch peers of GPT-2, of BERT"):
        training(find_recipe("llama_style_114m"), {})
    with pytest.raises(UserError, match=r"lstm_demo_en_ko: there are PyTorch peers"):
        training(find_recipe("lstm_demo_en_ko"), {})
    with pytest.raises(UserError, match=r"bert_tiny writes nothing"):
        writing(find_recipe("bert_tiny"), 8, Prompted())
    with pytest.raises(UserError, match=r"lstm_demo_en_ko: --what decode has PyTorch peers of GPT-2 and of the"):
        writing(find_recipe("lstm_demo_en_ko"), 8, Prompted(5, 4))
    gpt = small()
    with pytest.raises(UserError, match=r"are more than model\.context"):
        writing(gpt, 8, Prompted(1000, 1000))
    with pytest.raises(UserError, match=r"optim\.kind=lamb: the PyTorch peers train with AdamW"):
        training(replace(gpt, optim=replace(gpt.optim, kind="lamb")), random_batch(gpt))
    with pytest.raises(UserError, match=r"--python /nowhere"):
        bench_peers(gpt, ["eager"], python="/nowhere")
    with pytest.raises(UserError, match=r"--peers static does not go with --what train: choose among eager, compile"):
        variants_of("train", ["eager", "static"])
    assert variants_of("train", ()) == ("eager", "compile")  # cuDNN is for GPUs


def test_pytorch_is_named_where_it_is_missing(tmp_path):
    pretends = tmp_path / "python"
    pretends.write_text("#!/bin/sh\nexit 1\n")
    pretends.chmod(0o755)
    with pytest.raises(
        UserError, match=r"need torch and safetensors: pip install 'transformer_jax\[peers\]'.*--python"
    ):
        bench_peers(small(), ["eager"], python=str(pretends))


def test_padded_rows_are_as_long_on_both_sides():
    experiment = sized(find_recipe("transformer_demo_en_ko"), 40, 24)
    batch = random_batch(experiment, padded=True)
    source, target = (np.count_nonzero(batch[side], axis=1) for side in ("source", "target"))
    assert source.min() >= 12
    assert source.max() <= 24
    assert len(set(source.tolist())) > 5
    assert np.all(np.abs(target - source) <= 1)
    assert all((np.diff((batch[side] != 0).astype(int), axis=1) <= 0).all() for side in batch if side != "example")


PYTHON = os.environ.get("TJAX_PEERS_PYTHON", sys.executable)
"""An interpreter that has torch, where this one has not."""


@pytest.fixture
def torch():
    wanted = "import torch, transformers, safetensors"
    if subprocess.run([PYTHON, "-c", wanted], capture_output=True, check=False).returncode:
        pytest.skip("torch and transformers are not installed; TJAX_PEERS_PYTHON may name an interpreter that has them")


def small_model(recipe):
    depths = {depth: 2 for depth in ("layers", "encoder_layers", "decoder_layers") if hasattr(recipe.model, depth)}
    sizes = {"width": 24, "heads": 6, "feedforward": 40, "vocab_size": 90, "dropout": 0.1} | depths
    return replace(recipe, model=replace(recipe.model, **sizes))


def told(spec, folder, variant):
    """What PyTorch says of the work before it is timed."""
    with (folder / "log").open("w+") as log:
        child = peers._start(PYTHON, spec | {"variant": variant, "weights": str(folder / "weights")}, log)
        try:
            contender = peers._contender("PyTorch", child)
            assert contender, (folder / "log").read_text()
            return contender.facts
        finally:
            child.kill()
            child.communicate()


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("name", "length"), [("gpt2_demo", 16), ("bert_small_demo", 24), ("transformer_demo_en_ko", 12)]
)
def test_torch_has_the_same_loss(name, length, tmp_path):
    """Equal parameters, an equal loss: masks, padding, smoothing, scales and positions are the same."""
    experiment = small_model(sized(find_recipe(name), 8, length))
    batch, trainer = random_batch(experiment, padded=True), Trainer.of(experiment)
    params = jax.tree.map(lambda leaf: leaf + 0.03, trainer.init().params)  # no norm, bias or table as it was born
    write_weights(experiment, params, tmp_path / "weights")
    sums, weights = trainer.eval_step()(params, trainer.put(batch))
    theirs = told(training(experiment, batch), tmp_path, "eager")
    assert theirs["loss"] == pytest.approx(float(means(sums, weights)["loss"]), rel=2e-6)
    assert theirs["parameters"] == parameter_count(params)


def shaken(opened):
    """Parameters by which the next token depends on those before it; as drawn, a small model repeats the last one."""
    paths, tree = jax.tree_util.tree_flatten_with_path(opened.params)
    keys = jax.random.split(jax.random.key(1), len(paths))
    noisy = [
        leaf + 0.1 * ("weight" in jax.tree_util.keystr(path)) * jax.random.normal(key, leaf.shape)
        for (path, leaf), key in zip(paths, keys, strict=True)
    ]
    return replace(opened, params=jax.tree.unflatten(tree, noisy))


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("name", "beams"), [("gpt2_demo", 0), ("transformer_demo_en_ko", 1), ("transformer_demo_en_ko", 3)]
)
def test_torch_writes_the_same_tokens(name, beams, tmp_path, monkeypatch):
    experiment, prompted = small_model(sized(find_recipe(name), 3, 16)), Prompted(9, 7)
    if beams:
        experiment = replace(experiment, decode=replace(experiment.decode, beam=beams))
    drawn = Opened.drawn
    monkeypatch.setattr(Opened, "drawn", lambda experiment: shaken(drawn(experiment)))
    ours = peer_ours.writer(experiment, 3, prompted, tmp_path / "weights")
    assert np.shape(ours.facts["written"]) == (3, 7)
    assert len(np.unique(ours.facts["written"])) > 3
    assert ours.facts["setup"].endswith(f"beam of {beams}" if beams > 1 else "greedy")
    for variant in ("dynamic", "static"):
        theirs = told(writing(experiment, 3, prompted), tmp_path, variant)
        assert theirs["written"] == ours.facts["written"]
        assert theirs["parameters"] == ours.facts["parameters"]
