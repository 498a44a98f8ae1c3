"""Writing tokens: reading the prompt, then seconds a token, beside the least that the memory's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.bench.batches import rows_of, shapes_of
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.timing import Timing, repeat
from transformer_jax.bench.train import Effort
from transformer_jax.config import Experiment
from transformer_jax.decoding import TURNS, Decoding
from transformer_jax.errors import UserError
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.nn.module import Params, Skeleton, parameter_count
from transformer_jax.objectives import Seq2Seq
from transformer_jax.sampling import Sampling, Writing
from transformer_jax.sharding import batch_sharding, make_mesh, parameter_shardings
from transformer_jax.translate import search

CACHED = 2**28
"""What takes fewer bytes may stay in a device's caches, and then be read faster than from memory."""


@dataclass(frozen=True)
class Prompted:
    """What is written."""

    prompt: int = 128
    """Tokens of a prompt, or of the source of a translation."""
    new: int = 128
    """Tokens written after it."""


@dataclass(frozen=True)
class _Written:
    """What one family's way of writing gives."""

    prefill: Timing
    writing: Timing
    """Of all new tokens."""
    read: int
    """Bytes of parameters that each token reads, in the precision of the computation."""
    held: int
    """The same as the program holds them."""
    carried: float
    """Bytes of caches and memory that each step reads, on average over the tokens."""
    multiplied: int
    """Parameters that each row multiplies."""
    how: str


def bench_decode(experiment: Experiment, prompted: Prompted, effort: Effort, ceilings: Ceilings) -> dict[str, Any]:
    """Time reading prompts and writing after them, with random parameters; no row ends early.

    Raises:
        UserError: a model that does not write, more tokens than its context, or writing faster than memory allows.
    """
    if min(prompted.prompt, prompted.new) < 1:
        raise UserError(f"--prompt and --new must be at least 1, got {prompted.prompt} and {prompted.new}.")
    rows, model = rows_of(shapes_of(experiment)), experiment.model
    if isinstance(model, GPTConfig) and model.task == "lm":
        if prompted.prompt + prompted.new > model.context:
            raise UserError(
                f"--prompt {prompted.prompt} and --new {prompted.new} are more than model.context={model.context}."
            )
        written = _decoder_only(experiment, rows, prompted, effort)
    elif isinstance(experiment.objective, Seq2Seq):
        written = _translator(experiment, rows, prompted, effort)
    else:
        raise UserError(f"{experiment.name} writes nothing: --what decode takes a GPT or a translator.")
    token = written.writing.median / prompted.new
    memory = (written.read + written.carried) / ceilings.bandwidth
    floor = max(memory, 2 * written.multiplied * rows / ceilings.peak)
    if token < floor and written.read + written.carried > CACHED:
        raise UserError(
            f"a token took {token * 1e3:.3g} ms, less than the {floor * 1e3:.3g} ms that memory and arithmetic "
            "allow: the clock or the bandwidth is wrong, no figure is given."
        )
    return {
        "rows": rows,
        "length": prompted.prompt,
        "new": prompted.new,
        "how": written.how,
        "parameters": parameter_count(Skeleton.of(model, experiment.compute).abstract),
        "prefill_seconds": written.prefill.figures(),
        "step_seconds": {
            key: value / prompted.new if key in ("median", "low", "high", "min") else value
            for key, value in written.writing.figures().items()
            if key != "seconds"
        }
        | {"seconds": [seconds / prompted.new for seconds in written.writing.seconds]},
        "tokens_per_second": rows / token,
        "prefill_tokens_per_second": rows * prompted.prompt / written.prefill.median,
        "bytes_per_token": written.read + written.carried,
        "parameter_bytes_held": written.held,
        "floor_seconds": floor,
        "floor_bound": "memory" if floor == memory else "compute",
        "share_of_floor": floor / token,
        "share_of_measured_bandwidth": (written.read + written.carried) / token / ceilings.copy,
        "in_cache": written.read + written.carried <= CACHED,
        "ceilings": asdict(ceilings),
    }


def _opened(experiment: Experiment) -> tuple[Skeleton, jax.sharding.Mesh, Params]:
    """Open a model as `Completer` and `Translator` do, with random parameters."""
    compute = replace(experiment.compute, layers="unrolled", attention="xla", remat="none")
    skeleton, mesh = Skeleton.of(experiment.model, compute), make_mesh(experiment.mesh)
    shardings = parameter_shardings(skeleton.abstract, skeleton.letters, mesh)
    params = jax.jit(skeleton.init, out_shardings=shardings)(jax.random.key(0))
    return skeleton, mesh, params


def _decoder_only(experiment: Experiment, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    skeleton, mesh, params = _opened(experiment)
    model, filters = experiment.model, Sampling(temperature=0.0).filters()
    assert isinstance(model, GPTConfig)
    decoding = Decoding((skeleton,), mesh, model.context, eos=-1, pad=0)
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (rows, prompted.prompt)).tolist()
    numbers, limits = list(range(rows)), [prompted.new] * rows
    writing: list[Writing] = []

    def prefill() -> None:
        started = decoding.prefill(
            (params,), prompts, numbers, sample_R=[0] * rows, limit_R=limits, seed=0, filters=filters
        )
        writing[:] = [jax.block_until_ready(started)]

    def write() -> None:
        for start in range(0, prompted.new, TURNS):
            turns = min(TURNS, prompted.new - start)
            writing[0], chunk = decoding.advance((params,), writing[0], [False] * rows, filters, turns, alternatives=0)
            jax.device_get(chunk.tokens_BC)

    first = repeat(prefill, budget=effort.budget / 3, width=effort.width)
    then = repeat(write, budget=effort.budget, width=effort.width, before=prefill)
    places, tokens = prompted.prompt + prompted.new, jnp.zeros((rows, prompted.prompt), jnp.int32)
    lengths = jnp.full(rows, prompted.prompt)

    def start(params: Params) -> Any:
        return skeleton.bind(params).start(tokens, lengths, places)[1].past

    filled = (prompted.prompt + prompted.new / 2) / places
    carried = _carried(jax.eval_shape(start, skeleton.abstract), places, filled)
    skipped = [] if model.tied else ["embedding"]
    read, held = _read(skeleton, ["positions", *skipped])
    return _Written(first, then, read, held, carried, _multiplied(skeleton, ["positions", *skipped]), "greedy")


def _translator(experiment: Experiment, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    skeleton, mesh, params = _opened(experiment)
    vocabulary, beams = experiment.model.vocab_size, experiment.decode.beam
    ids = np.random.default_rng(0).integers(min(4, vocabulary - 1), vocabulary, (rows, prompted.prompt), np.int32)
    source = jax.device_put(ids, batch_sharding(mesh))
    # An output is as long as the source, its end token not counted, and `extra_length`; no token ends it (-1).
    decode = replace(experiment.decode, extra_length=prompted.new - prompted.prompt + 1)
    places = prompted.new + 1
    encode: Callable[..., Any] = jax.jit(lambda params, source: skeleton.bind(params).start(source, places))
    look: Callable[..., Any] = jax.jit(partial(search, skeleton, specials=(1, -1)), static_argnums=2)
    first = repeat(lambda: jax.block_until_ready(encode(params, source)), budget=effort.budget / 3, width=effort.width)
    whole = repeat(
        lambda: jax.block_until_ready(look(params, source, decode)), budget=effort.budget, width=effort.width
    )
    then = Timing(tuple(max(seconds - first.median, 1e-9) for seconds in whole.seconds))
    state, memory = jax.eval_shape(encode, skeleton.abstract, source)
    carried = beams * _carried(state, places, 0.5) + _carried(memory, 0, 1.0)
    read, held = _read(skeleton, ["encoder"])
    how = f"beam of {beams}" if beams > 1 else "greedy"
    return _Written(first, then, read, held, carried, beams * _multiplied(skeleton, ["encoder"]), how)


def _carried(tree: Any, places: int, filled: float) -> float:
    """Bytes of a tree, of what has `places` places the part that is filled on average."""
    return sum(
        leaf.size * leaf.dtype.itemsize * (filled if leaf.ndim > 2 and leaf.shape[1] == places else 1.0)
        for leaf in jax.tree.leaves(tree)
    )


def _leaves(skeleton: Skeleton, skipped: list[str]) -> list[Any]:
    """List the parameters that writing a token reads: whole parts of the model are left out by name."""
    return jax.tree.leaves({name: part for name, part in skeleton.abstract.items() if name not in skipped})


def _read(skeleton: Skeleton, skipped: list[str]) -> tuple[int, int]:
    leaves, width = _leaves(skeleton, skipped), jnp.dtype(skeleton.compute.dtype).itemsize
    return width * _multiplied(skeleton, skipped), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _multiplied(skeleton: Skeleton, skipped: list[str]) -> int:
    return sum(leaf.size for leaf in _leaves(skeleton, skipped))
