"""Laws of the recurrent language model: causal, documents apart, the state is the cache, sizes and FLOPs exact."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_gpt import _Given, packed_batch, perturbed
from tests.sharded import assert_same_step_on_a_mesh
from tests.test_bench import products_of
from tests.tiny_gpt import CHARACTERS, completer
from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.errors import UserError
from transformer_jax.generation import Generation
from transformer_jax.models.gpt import SLACK, GPTConfig
from transformer_jax.models.rnn_lm import RNNLMConfig
from transformer_jax.nn.module import Skeleton, parameter_count
from transformer_jax.nn.recurrent import LSTM
from transformer_jax.objectives import CausalLM
from transformer_jax.sweep.counts import counts

B, T, V = 5, 13, 38
PLAIN = ComputeConfig()
SMALL = RNNLMConfig(vocab_size=V, context=64, width=10, layers=2, dropout=0.0)
FAMILIES = {
    "rnn": replace(SMALL, cell="rnn", tied=True),
    "lstm": SMALL,
    "gru": replace(SMALL, cell="gru", layers=3),
}
family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles():
    """These tests compile many small programs and run each once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model_of(config, compute=PLAIN):
    skeleton = Skeleton.of(config, compute)
    return skeleton.bind(perturbed(skeleton))


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


@family
def test_causality_by_gradient(config, tokens):
    """A logit depends on its own token and on all before it, through the state, and on none after."""
    model = model_of(config)
    embedding = model.embedding

    def logit(x_BTD, t):
        object.__setattr__(model, "embedding", _Given(embedding, x_BTD))
        return model(tokens[:1])[0, t].sum()

    gradient, x_BTD = jax.jit(jax.grad(logit)), embedding(tokens[:1], jnp.float32)
    depends_TS = np.stack([np.any(np.asarray(gradient(x_BTD, t)[0]) != 0, axis=-1) for t in range(T)])
    np.testing.assert_array_equal(depends_TS, np.tri(T, dtype=bool))


@family
def test_packed_documents_equal_each_alone(config, tokens):
    model, lengths = jax.jit(model_of(config)), (6, 4, 2)
    packed, segments = tokens.copy(), np.ones((B, T), np.int32)
    packed[0, :12] = np.concatenate([tokens[i + 1, :n] for i, n in enumerate(lengths)])
    segments[0] = np.repeat([1, 2, 3, 0], (*lengths, 1))
    together, alone = model(packed, segments), model(tokens, np.ones((B, T), np.int32))
    begin = 0
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(together[0, begin : begin + n], alone[i + 1, :n], atol=1e-6)
        begin += n
    joined = model(packed, np.ones((B, T), np.int32))
    np.testing.assert_array_equal(joined[0, :6], together[0, :6])
    assert np.abs(joined[0, 6:12] - together[0, 6:12]).max() > 1e-2  # one text: the state goes on


@family
def test_states_are_a_cache(config):
    """Ragged prompts, one token, several at once, some of them taken back, beyond what is kept."""
    rng = np.random.default_rng(1)
    length_B, total = np.array([7, 1, 23, 4, 2]), 60
    rows_BT = rng.integers(0, V, (B, total)).astype(np.int32)
    model = model_of(config)
    full_BTV = jax.jit(model)(rows_BT)
    longest = int(length_B.max())
    prompt_BT = np.where(np.arange(longest) < length_B[:, None], rows_BT[:, :longest], 3)
    start, extend = jax.jit(model.start, static_argnums=2), jax.jit(model.extend)
    row_B = np.arange(B)
    logits_BV, state = start(prompt_BT, length_B, total)
    np.testing.assert_allclose(logits_BV, full_BTV[row_B, length_B - 1], atol=1e-5)
    at_B = length_B
    for count in (1, SLACK, 1, SLACK):
        following = rows_BT[row_B[:, None], at_B[:, None] + np.arange(count)]
        logits, state = extend(state, following)
        expected = full_BTV[row_B[:, None], at_B[:, None] + np.arange(count)]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        at_B = at_B + count
        if count == SLACK:  # say something else, take it back, and go on
            _, astray = extend(state, rng.integers(0, V, (B, SLACK)).astype(np.int32))
            state = astray._replace(length_B=astray.length_B - SLACK)


@pytest.mark.parametrize("beam", [0, 3])
def test_it_completes_text_as_the_full_forward_would(beam):
    """Greedy, and of a beam the best that a search over full forwards finds."""
    opened = completer(replace(SMALL, context=24), CHARACTERS)
    prompts = ["Was ever", "Give me my horse"]
    generation = Generation(temperature=0.0, max_tokens=6, beam=beam, length_penalty=0.0)
    model = jax.jit(opened.skeleton.bind(opened.load()))
    eos = CHARACTERS.eos
    for prompt, done in zip(prompts, opened.complete_all(prompts, generation), strict=True):
        ids = CHARACTERS.encode_batch([prompt])[0]
        alive, closed = [(0.0, [])], []
        for _ in range(6):
            grown = []
            for total, new in alive:
                padded = np.zeros((1, 24), np.int32)
                padded[0, : len(ids) + len(new)] = [*ids, *new]
                log_p = np.asarray(jax.nn.log_softmax(model(padded)[0, len(ids) + len(new) - 1]), np.float64)
                grown += [(total + log_p[v], [*new, v]) for v in range(CHARACTERS.vocab_size)]
            grown.sort(key=lambda one: -one[0])
            width = max(beam, 1)
            closed += [one for one in grown[:width] if one[1][-1] == eos]
            alive = [one for one in grown[: 2 * width] if one[1][-1] != eos][:width]
            if not beam and closed:
                break
        best = max([*closed, *(alive if beam or not closed else [])], key=lambda one: one[0])
        assert done.tokens == best[1]


def test_it_drafts_for_itself_and_for_a_gpt():
    """Greedy speculation writes what the target alone writes, whichever family drafts."""
    lstm = completer(replace(SMALL, context=40), CHARACTERS)
    gpt = completer(GPTConfig(context=40, width=12, layers=1, heads=2, init_std=0.5), CHARACTERS)
    generation = Generation(temperature=0.0, max_tokens=9)
    for target, draft in ((lstm, gpt), (gpt, lstm)):
        alone = [done.tokens for done in target.complete_all(["Soft, I"], generation)]
        drafted = [done.tokens for done in target.drafted_by(draft, 3).complete_all(["Soft, I"], generation)]
        assert drafted == alone


@family
def test_forward_flops_are_those_of_the_program(config, tokens):
    skeleton = Skeleton.of(config, PLAIN)
    program = jax.make_jaxpr(lambda params: skeleton.bind(params)(tokens))(skeleton.abstract)
    assert products_of(program.jaxpr) == config.forward_flops({"tokens": (B, T)})


@pytest.mark.parametrize(("cell", "layer"), [("rnn", 2 * 100 + 10), ("lstm", 8 * 100 + 40), ("gru", 6 * 100 + 60)])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_by_hand(cell, layer, tied):
    experiment = experiment_of(replace(SMALL, cell=cell, layers=3, tied=tied))
    found = counts(experiment)
    assert 3 * layer + V * 10 * (1 if tied else 2) == found.N
    assert (found.N_non_embedding, found.N_head) == (3 * layer, V * 10)
    assert parameter_count(Skeleton.of(experiment.model, PLAIN).abstract) == found.N


def test_the_forget_gate_begins_open():
    skeleton = Skeleton.of(replace(SMALL, forget_bias=1.5), PLAIN)
    model = skeleton.bind(skeleton.init(jax.random.key(0)))
    for cell in model.cells:
        assert isinstance(cell, LSTM)
        np.testing.assert_array_equal(cell.project.bias[...], np.repeat([[0.0], [1.5], [0.0], [0.0]], 10, axis=1))


def experiment_of(model):
    return Experiment(
        name="tiny",
        model=model,
        objective=CausalLM(),
        data=PackedText("none", context=T, batch_rows=8),
        optim=OptimConfig(schedule=ScheduleConfig(peak=1e-2, warmup=0), clip_norm=0.1, weight_decay=0.01, eps=1e-4),
        train=TrainConfig(),
    )


def test_sharded_and_recomputed_equals_single_device():
    experiment = experiment_of(replace(SMALL, width=16))
    assert_same_step_on_a_mesh(experiment, packed_batch(8, T), ComputeConfig(remat="full"))


def test_dropout_falls_between_layers_and_never_between_steps(tokens):
    """With all of a layer's output dropped, nothing reaches the head; the states go on as they were."""
    model = model_of(replace(SMALL, dropout=0.5))
    run = jax.jit(model.features)
    first, second = (run(tokens, key=jax.random.key(seed)) for seed in (0, 1))
    share = float(np.mean(np.asarray(first) == 0))
    assert 0.3 < share < 0.7
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(run(tokens, key=jax.random.key(0)), first)
    assert float(np.mean(np.asarray(run(tokens)) == 0)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, r"model\.layers must be at least 1"), ({"dropout": 1.0}, r"model\.dropout must lie in")],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change).check()
