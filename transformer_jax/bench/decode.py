"""Writing tokens: reading the prompt, then seconds a token, beside the least that the memory's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from transformer_jax.bench.batches import rows_of, shapes_of
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.timing import Timing, repeat
from transformer_jax.bench.train import Effort
from transformer_jax.config import Experiment, flatten
from transformer_jax.decoding import TURNS, Decoding
from transformer_jax.errors import UserError
from transformer_jax.models import LanguageModelConfig, RNNLMConfig
from transformer_jax.models.rnn_lm import PLACES
from transformer_jax.nn.module import Params, Skeleton, parameter_count
from transformer_jax.nn.weights import Weights, hold, holding
from transformer_jax.objectives import Seq2Seq
from transformer_jax.sampling import Sampling, Writing
from transformer_jax.sharding import batch_sharding, make_mesh, parameter_shardings
from transformer_jax.translate import search

GREEDY = Sampling(temperature=0.0).filters()

CACHED = 2**28
"""What takes fewer bytes may stay in a device's caches, and then be read faster than from memory."""


@dataclass(frozen=True)
class Prompted:
    """What is written."""

    prompt: int = 128
    """Tokens of a prompt, or of the source of a translation."""
    new: int = 128
    """Tokens written after it."""
    weights: Weights = "float"
    """How matrices are held."""


@dataclass(frozen=True)
class _Written:
    """What one family's way of writing gives."""

    prefill: Timing
    writing: Timing
    """Of all new tokens."""
    read: int
    """Bytes of parameters that each token reads, as the program holds them."""
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
    check_prompted(experiment, prompted)
    rows = rows_of(shapes_of(experiment))
    written = (_decoder_only if _continues(experiment) else _translator)(experiment, rows, prompted, effort)
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
        "weights": prompted.weights,
        "parameters": parameter_count(Skeleton.of(experiment.model, experiment.compute).abstract),
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
        "parameter_bytes": written.read,
        "floor_seconds": floor,
        "floor_bound": "memory" if floor == memory else "compute",
        "share_of_floor": floor / token,
        "share_of_measured_bandwidth": (written.read + written.carried) / token / ceilings.copy,
        "in_cache": written.read + written.carried <= CACHED,
        "ceilings": asdict(ceilings),
    }


def check_prompted(experiment: Experiment, prompted: Prompted) -> None:
    """Raise `UserError` for a model that does not write, or more tokens than its context."""
    if min(prompted.prompt, prompted.new) < 1:
        raise UserError(f"--prompt and --new must be at least 1, got {prompted.prompt} and {prompted.new}.")
    if not _continues(experiment):
        if not isinstance(experiment.objective, Seq2Seq):
            raise UserError(f"{experiment.name} writes nothing: --what decode takes a language model or a translator.")
    elif prompted.prompt + prompted.new > (context := dict(flatten(experiment))["model.context"]):
        raise UserError(f"--prompt {prompted.prompt} and --new {prompted.new} are more than model.context={context}.")


def _continues(experiment: Experiment) -> bool:
    model = experiment.model
    return isinstance(model, LanguageModelConfig) and getattr(model, "task", "lm") == "lm"


@dataclass(frozen=True)
class Opened:
    """A model as `Completer` and `Translator` open one."""

    skeleton: Skeleton
    mesh: jax.sharding.Mesh
    params: Params

    @staticmethod
    def drawn(experiment: Experiment) -> Opened:
        """Draw parameters, as they are stored."""
        compute = replace(experiment.compute, layers="unrolled", attention="xla", remat="none")
        skeleton, mesh = Skeleton.of(experiment.model, compute), make_mesh(experiment.mesh)
        shardings = parameter_shardings(skeleton.abstract, skeleton.letters, mesh)
        return Opened(skeleton, mesh, jax.jit(skeleton.init, out_shardings=shardings)(jax.random.key(0)))

    def holding(self, weights: Weights) -> Opened:
        """Return it with its matrices held as while it writes."""
        return Opened(holding(self.skeleton, weights), self.mesh, hold(self.skeleton, self.params, weights, self.mesh))


def random_prompts(vocabulary: int, rows: int, prompted: Prompted) -> list[list[int]]:
    """Make up tokens [B, T]."""
    return np.random.default_rng(0).integers(0, vocabulary, (rows, prompted.prompt)).tolist()


@dataclass(frozen=True)
class Writer:
    """A language model that reads random prompts, and writes after them what is most probable."""

    opened: Opened
    rows: int
    prompted: Prompted
    _writing: list[Writing] = field(default_factory=list)

    @cached_property
    def _decoding(self) -> Decoding:
        config = self.opened.skeleton.config
        assert isinstance(config, LanguageModelConfig)
        return Decoding((self.opened.skeleton,), self.opened.mesh, config.context, eos=-1, pad=0)

    def prefill(self) -> None:
        """Read the prompts."""
        started = self._decoding.prefill(
            (self.opened.params,),
            random_prompts(self.opened.skeleton.config.vocab_size, self.rows, self.prompted),
            list(range(self.rows)),
            sample_R=[0] * self.rows,
            limit_R=[self.prompted.new] * self.rows,
            seed=0,
            filters=GREEDY,
        )
        self._writing[:] = [jax.block_until_ready(started)]

    def write(self) -> NDArray[np.int32]:
        """Write after the prompts that were read: tokens [B, T]."""
        chunks = []
        for start in range(0, self.prompted.new, TURNS):
            turns = min(TURNS, self.prompted.new - start)
            self._writing[0], chunk = self._decoding.advance(
                (self.opened.params,), self._writing[0], [False] * self.rows, GREEDY, turns, alternatives=0
            )
            chunks.append(jax.device_get(chunk.tokens_BC)[: self.rows, :turns])
        return np.concatenate(chunks, axis=1)


def _decoder_only(experiment: Experiment, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    model, writer = experiment.model, Writer(Opened.drawn(experiment).holding(prompted.weights), rows, prompted)
    assert isinstance(model, LanguageModelConfig)
    first = repeat(writer.prefill, budget=effort.budget / 3, width=effort.width)
    then = repeat(writer.write, budget=effort.budget, width=effort.width, before=writer.prefill)
    places, tokens = prompted.prompt + prompted.new, jnp.zeros((rows, prompted.prompt), jnp.int32)
    lengths, skeleton = jnp.full(rows, prompted.prompt), writer.opened.skeleton

    def start(params: Params) -> Any:
        return skeleton.bind(params).start(tokens, lengths, places)[1].past

    filled = (prompted.prompt + prompted.new / 2) / places
    if isinstance(model, RNNLMConfig):
        places, filled = PLACES, 1 / PLACES  # of the states that are kept, one is read
    carried = _carried(jax.eval_shape(start, skeleton.abstract), places, filled)
    skipped = ["positions", *([] if model.tied else ["embedding"])]
    return _Written(first, then, _read(skeleton, skipped), carried, _multiplied(skeleton, skipped), "greedy")


def _translator(experiment: Experiment, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    opened = Opened.drawn(experiment).holding(prompted.weights)
    skeleton, params = opened.skeleton, opened.params
    vocabulary, beams = experiment.model.vocab_size, experiment.decode.beam
    ids = np.random.default_rng(0).integers(min(4, vocabulary - 1), vocabulary, (rows, prompted.prompt), np.int32)
    source = jax.device_put(ids, batch_sharding(opened.mesh))
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
    how = f"beam of {beams}" if beams > 1 else "greedy"
    multiplied = beams * _multiplied(skeleton, ["encoder"])
    return _Written(first, then, _read(skeleton, ["encoder"]), carried, multiplied, how)


def _carried(tree: Any, places: int, filled: float) -> float:
    """Bytes of a tree, of what has `places` places the part that is filled on average."""
    return sum(
        leaf.size * leaf.dtype.itemsize * (filled if leaf.ndim > 2 and leaf.shape[1] == places else 1.0)
        for leaf in jax.tree.leaves(tree)
    )


def _leaves(skeleton: Skeleton, skipped: list[str]) -> list[Any]:
    """List the parameters that writing a token reads: whole parts of the model are left out by name."""
    return jax.tree.leaves({name: part for name, part in skeleton.abstract.items() if name not in skipped})


def _read(skeleton: Skeleton, skipped: list[str]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(skeleton, skipped))


def _multiplied(skeleton: Skeleton, skipped: list[str]) -> int:
    return sum(leaf.size for leaf in _leaves(skeleton, skipped))
