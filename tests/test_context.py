"""Laws of positions divided over devices: the numbers of one device, no sequence put together, less memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest

from tests.test_plan_hlo import V, bert, compiled, gpt, transformer
from tests.tiny_gpt import completer
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig
from transformer_jax.errors import UserError
from transformer_jax.generation import Generation
from transformer_jax.kernels import blockwise
from transformer_jax.kernels.attention import Mask, attention
from transformer_jax.kernels.zigzag import Zigzag
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.objectives import CausalLM, means
from transformer_jax.planning.collectives import collectives
from transformer_jax.planning.hlo import parse
from transformer_jax.sharding import make_mesh
from transformer_jax.train import Trainer

SLOW = pytest.mark.slow
T, ROWS = 32, 4


def long(experiment: Experiment, length: int = T, rows: int = ROWS, **model) -> Experiment:
    """Read rows of 32 positions, which 2 x 8 divides."""
    data = experiment.data
    if hasattr(data, "batch_rows"):
        name = "context" if hasattr(data, "context") else "length"
        data = replace(data, batch_rows=rows, rows_multiple=rows, **{name: length})
    else:
        data = replace(data, max_length=length, batch_tokens=rows * length, rows_multiple=rows, bucket_lengths=())
    sizes = {"context": length} if hasattr(experiment.model, "context") else {}
    return replace(experiment, model=replace(experiment.model, **sizes, **model), data=data)


FAMILIES = {
    "gpt": long(gpt(), layers=2, kv_heads=2, positions="rope", windows=(0, 5)),
    "gpt learned": replace(long(gpt(), layers=2), objective=CausalLM(chunk=8, z_loss=1e-3)),
    "bert": long(bert(), layers=2),
    "transformer": long(transformer(), encoder_layers=2, decoder_layers=2),
}
MESHES = {
    "2": MeshConfig(data=1, context=2),
    "4": MeshConfig(data=1, context=4),
    "8": MeshConfig(data=1, context=8),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, tensor=2, context=2),
    "fsdp 2 x context 2 x tensor 2": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a device, some of them padded."""
    monkeypatch.setattr(blockwise, "BLOCK", 3)


@cache
def batch_of(name: str):
    """Packed documents, padding at the ends of rows, an empty row."""
    rng, length_B1 = np.random.default_rng(0), np.array([T, 21, 9, 0])[:, None]
    batch = {}
    for key, (shape, dtype) in FAMILIES[name].data.batch_shapes().items():
        if key in ("tokens", "source", "target", "targets", "types"):
            values = rng.integers(0 if key == "types" else 4, 2 if key == "types" else 300, shape)
            batch[key] = np.where(np.arange(shape[1]) < length_B1, values, -1 if key == "targets" else 0).astype(dtype)
    place_1T = np.arange(T)[None]
    if name.startswith("gpt"):
        segments = np.where(place_1T < length_B1, 1 + (place_1T >= length_B1 // 3), 0)
        same = segments[:, :, None] == segments[:, None, :]
        positions = np.tril(same).sum(-1) - 1
        batch |= {"segments": segments, "positions": positions, "bytes": np.ones(ROWS, np.float32)}
    if name == "bert":
        gaps = batch["targets"].shape[1]
        batch |= {"segments": np.where(place_1T < length_B1, 1, 0), "next": np.array([1, 0, -1, -1])}
        batch["positions_masked"] = np.sort(rng.integers(0, 9, (ROWS, gaps)), axis=1)
    return batch


def gradient_of(name: str, mesh: MeshConfig | None):
    """Return the compiled loss with its gradient, and its arguments; without a mesh for one device."""
    experiment, batch = FAMILIES[name], batch_of(name)
    skeleton = Skeleton.of(experiment.model, experiment.compute)
    params, weights = skeleton.init(jax.random.key(1)), experiment.objective.weights(batch)
    trainer = None

    def loss(params, batch):
        bound = (skeleton if trainer is None else trainer.skeleton).bind(params)
        return means(experiment.objective(bound, batch, None), weights)["loss"]

    step = jax.value_and_grad(loss)
    if mesh is None:
        return jax.jit(step).lower(params, batch).compile(), params, batch
    devices = np.prod(list(vars(mesh).values()))
    trainer = Trainer.of(replace(experiment, mesh=mesh), jax.devices()[:devices])
    layout = trainer.shardings().params
    params, batch = jax.device_put(params, layout), trainer.put(batch)
    with jax.set_mesh(trainer.mesh):
        return jax.jit(step, out_shardings=(None, layout)).lower(params, batch).compile(), params, batch


@cache
def alone(name: str):
    step, *arguments = gradient_of(name, None)
    return step(*arguments)


QUICK = [("gpt", "fsdp 2 x context 2 x tensor 2"), ("transformer", "2")]
CASES = [
    *(("gpt", mesh) for mesh in MESHES),
    ("gpt learned", "8"),
    ("gpt learned", "fsdp 2 x context 2 x tensor 2"),
    ("bert", "4"),
    ("bert", "data 2 x context 2 x tensor 2"),
    ("transformer", "2"),
    ("transformer", "fsdp 2 x context 2 x tensor 2"),
]


@pytest.mark.parametrize(
    ("name", "mesh"), [case if case in QUICK else pytest.param(*case, marks=SLOW) for case in CASES]
)
def test_loss_and_gradients_are_those_of_one_device(name, mesh):
    step, *arguments = gradient_of(name, MESHES[mesh])
    (loss, grads), (expected_loss, expected) = step(*arguments), alone(name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, actual), right in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(np.abs(right).max()), 1e-3)
        np.testing.assert_allclose(actual, right, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["gpt", pytest.param("bert", marks=SLOW), pytest.param("transformer", marks=SLOW)])
def test_keys_travel_and_no_row_is_put_together(name):
    """What is gathered along the axis is smaller than the stream [B, T, D] and than keys [B, T, K, H]."""
    trainer = Trainer.of(replace(FAMILIES[name], mesh=MeshConfig(data=1, context=4)), jax.devices()[:4])
    found = collectives(parse(compiled(trainer).as_text()), 4)
    block = trainer.experiment.model.block
    rows = 4 * ROWS * T
    assert sum(c.times for c in found if c.kind == "collective-permute") > 4
    assert all(c.bytes < rows * block.kv * block.size for c in found if c.kind in ("all-gather", "all-to-all"))
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(trainer.skeleton.abstract))
    table = 4 * V * block.width  # whose gradient is summed apart for every use: source, target, output
    reduced = sum(c.bytes * c.times for c in found if c.kind == "all-reduce")
    assert reduced < gradients + 2 * table + rows * block.width


@pytest.mark.slow
def test_a_device_takes_less_memory_the_more_there_are(monkeypatch):
    """Of a long row, with a loss in pieces: what is left are the gradients of the parameters."""
    monkeypatch.setattr(blockwise, "BLOCK", 128)
    experiment = replace(long(gpt(), 8192, 1, layers=1), objective=CausalLM(chunk=64))
    taken = []
    for devices in (2, 8):
        trainer = Trainer.of(replace(experiment, mesh=MeshConfig(data=1, context=devices)), jax.devices()[:devices])
        taken.append(compiled(trainer).memory_analysis().temp_size_in_bytes)
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(trainer.skeleton.abstract))
    assert taken[1] - 2 * parameters < (taken[0] - 2 * parameters) / 3


@pytest.mark.parametrize(("devices", "length"), [(2, 12), (3, 12), (8, 32)])
def test_zigzag_deals_out_equal_work_and_goes_back(devices, length):
    order = Zigzag(devices).order(length)
    assert sorted(order) == list(range(length))
    work = (order + 1).reshape(devices, -1).sum(1)  # keys that the queries of a device see
    assert len(set(work.tolist())) == 1
    mesh = make_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])
    x_BTD = np.arange(3 * length * 2.0).reshape(3, length, 2)
    with jax.set_mesh(mesh):
        dealt = jax.jit(Zigzag(devices).enter)(x_BTD)
        np.testing.assert_array_equal(dealt, x_BTD[:, order])
        np.testing.assert_array_equal(jax.jit(Zigzag(devices).leave)(dealt), x_BTD)


def test_dropout_is_drawn_anew_on_every_device():
    """Uniform attention over ones: each output is the share of keys that was kept, and no two devices agree."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    q, ones = np.zeros((2, 16, 2, 4), np.float32), np.ones((2, 16, 2, 4), np.float32)
    run = jax.jit(partial(attention, backend="blockwise", dropout=0.5))
    with jax.set_mesh(mesh):
        out = np.asarray(run(q, ones, ones, Mask(), key=jax.random.key(0))[0])[..., 0]
    shares = [out[b, t : t + 8, n].tobytes() for b in (0, 1) for t in (0, 8) for n in (0, 1)]
    assert len(set(shares)) == 8
    assert abs(out.mean() - 1) < 0.1


@pytest.mark.slow
def test_decoding_leaves_positions_together():
    """A mesh that divides positions is of no use to a token at a time, and does no harm."""
    mesh = MeshConfig(data=1, context=2, tensor=2)
    prompts, greedy = ["Was ever woman", "humour"], Generation(max_tokens=4, temperature=0.0)
    several, one = completer(devices=4, mesh=mesh), completer()
    for a, b in zip(several.complete_all(prompts, greedy), one.complete_all(prompts, greedy), strict=True):
        assert a.tokens == b.tokens


RECURRENT = RNNSeq2SeqConfig(vocab_size=304, width=10, embedding=8, encoder_layers=1, decoder_layers=1)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (long(gpt(), layers=1), "mesh.context=3 does not divide rows of 32 x 32 positions"),
        (replace(long(gpt(), layers=1), compute=ComputeConfig(attention="xla")), "attention=xla sees whole rows"),
        (replace(long(transformer()), model=RECURRENT), "which a recurrent model reads one after the other"),
    ],
)
def test_what_cannot_be_divided_is_refused(experiment, message):
    with pytest.raises(UserError, match=message):
        Trainer.of(replace(experiment, mesh=MeshConfig(data=1, context=3)), jax.devices()[:3])


def test_pieces_of_the_loss_must_be_divisible_too():
    experiment = replace(long(gpt(), layers=1), objective=CausalLM(chunk=10))
    with pytest.raises(UserError, match=r"chunk=10 must be a multiple of mesh\.context=4 and divide the 32 positions"):
        Trainer.of(replace(experiment, mesh=MeshConfig(data=1, context=4)), jax.devices()[:4])
