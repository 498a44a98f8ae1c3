"""Writing tokens: reading the prompt, then seconds a token, beside the least that the memory's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from transformer_jax.bench.batches import RESERVED, context_of, rows_of, shapes_of
from transformer_jax.bench.ceilings import Ceilings
from transformer_jax.bench.timing import Timing, repeat
from transformer_jax.bench.train import Effort
from transformer_jax.config import Experiment
from transformer_jax.decoding import TURNS, Decoding
from transformer_jax.errors import UserError
from transformer_jax.models import GPTConfig, LanguageModelConfig, RNNLMConfig
from transformer_jax.models.rnn_lm import PLACES
from transformer_jax.nn.module import Params, Skeleton, parameter_count
from transformer_jax.nn.moe import DENSE
from transformer_jax.nn.weights import Weights, hold, holding
from transformer_jax.objectives import Seq2Seq
from transformer_jax.sampling import Sampling, Writing
from transformer_jax.sharding import batch_sharding, batch_shards, make_mesh, parameter_shardings
from transformer_jax.translate import search

GREEDY = Sampling(temperature=0.0).filters()

START = 1
"""The token that a translation begins with here; like padding (0), it is never written."""

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

    @staticmethod
    def fitting(experiment: Experiment, prompt: int | None, new: int | None, weights: Weights = "float") -> Prompted:
        """Take 128 tokens of what is not given, or what a smaller context leaves for it."""
        context = context_of(experiment)
        left = [min(Prompted.new, context / 2 if other is None else context - other) for other in (new, prompt)]
        before, after = (
            max(int(rest), 1) if own is None else own for own, rest in zip((prompt, new), left, strict=True)
        )
        return Prompted(before, after, weights)


@dataclass(frozen=True)
class _Written:
    """What one family's way of writing gives."""

    prefill: Timing
    writing: Timing
    """Of all new tokens."""
    prefill_flops: int
    """Of the matrix products that reading the prompts takes at least."""
    read: float
    """Bytes of parameters that a token reads at least, as the program holds them."""
    carried: float
    """Bytes of caches and memory that each step reads, on average over the tokens."""
    multiplied: float
    """Parameters that each row multiplies."""
    how: str


@dataclass(frozen=True)
class _Floors:
    """Least seconds."""

    prefill: float
    """To read all prompts: its products."""
    memory: float
    """Of a token of every row: to deliver what it reads."""
    compute: float
    """Of the same: its products."""

    @staticmethod
    def of(written: _Written, rows: int, limits: Ceilings) -> _Floors:
        """Say what the device needs."""
        memory = (written.read + written.carried) / limits.bandwidth
        return _Floors(written.prefill_flops / limits.peak, memory, 2 * written.multiplied * rows / limits.peak)

    @property
    def token(self) -> float:
        """Of a token of every row."""
        return max(self.memory, self.compute)


def bench_decode(experiment: Experiment, prompted: Prompted, effort: Effort, ceilings: Ceilings) -> dict[str, Any]:
    """Time reading prompts and writing after them, with random parameters; no row ends early.

    Raises:
        UserError: a model that does not write, more tokens than its context, or writing faster than memory allows.
    """
    check_prompted(experiment, prompted)
    rows, drawn = rows_of(shapes_of(experiment)), Opened.drawn(experiment)
    setup, parameters = drawn.describe(experiment.name, prompted), parameter_count(drawn.skeleton.abstract)
    opened = drawn.holding(prompted.weights)
    del drawn  # its matrices take twice the room of those that are held
    written = (_decoder_only if _continues(experiment) else _translator)(experiment, opened, rows, prompted, effort)
    token, moved = written.writing.median / prompted.new, written.read + written.carried
    floors = _Floors.of(written, rows, ceilings)

    def impossible() -> str:
        if token < (floors.token if moved > CACHED else floors.compute):
            return f"a token took {token * 1e3:.3g} ms, less than the {floors.token * 1e3:.3g} ms"
        if written.prefill.median < floors.prefill:
            return f"reading took {written.prefill.median * 1e3:.3g} ms, less than the {floors.prefill * 1e3:.3g} ms"
        return ""

    if impossible():  # what was measured may have been disturbed
        ceilings = ceilings.again()
        floors = _Floors.of(written, rows, ceilings)
    if told := impossible():
        raise UserError(
            f"{told} that memory and arithmetic allow: the clock, the bandwidth or the peak is wrong, no figure is "
            "given."
        )
    return {
        "rows": rows,
        "length": prompted.prompt,
        "new": prompted.new,
        "setup": setup,
        "how": written.how,
        "weights": prompted.weights,
        "parameters": parameters,
        "prefill_seconds": written.prefill.figures(),
        "step_seconds": {
            key: value / prompted.new if key in ("median", "low", "high", "min") else value
            for key, value in written.writing.figures().items()
            if key != "seconds"
        }
        | {"seconds": [seconds / prompted.new for seconds in written.writing.seconds]},
        "tokens_per_second": rows / token,
        "prefill_tokens_per_second": rows * prompted.prompt / written.prefill.median,
        "bytes_per_token": moved,
        "parameter_bytes": written.read,
        "floor_seconds": floors.token,
        "floor_bound": "memory" if floors.memory >= floors.compute else "compute",
        "share_of_floor": floors.token / token,
        "share_of_measured_bandwidth": moved / token / ceilings.copy,
        "in_cache": moved <= CACHED,
        "ceilings": asdict(ceilings),
    }


def check_prompted(experiment: Experiment, prompted: Prompted) -> None:
    """Raise `UserError` for a model that does not write, or more tokens than its context."""
    if min(prompted.prompt, prompted.new) < 1:
        raise UserError(f"--prompt and --new must be at least 1, got {prompted.prompt} and {prompted.new}.")
    if not _continues(experiment):
        if not isinstance(experiment.objective, Seq2Seq):
            raise UserError(f"{experiment.name} writes nothing: --what decode takes a language model or a translator.")
    elif prompted.prompt + prompted.new > (context := context_of(experiment)):
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

    def describe(self, name: str, prompted: Prompted) -> str:
        """Say in one line what runs where."""
        count, device = parameter_count(self.skeleton.abstract), self.mesh.devices.flat[0].device_kind
        where = f"{self.mesh.size} x {device}, {self.skeleton.compute.dtype}"
        return f"{name}: {count:,} parameters on {where}, weights {prompted.weights}"

    def holding(self, weights: Weights) -> Opened:
        """Return it with its matrices held as while it writes."""
        return Opened(holding(self.skeleton, weights), self.mesh, hold(self.skeleton, self.params, weights, self.mesh))


def random_prompts(vocabulary: int, rows: int, prompted: Prompted, least: int = 0) -> list[list[int]]:
    """Make up tokens [B, T], none below `least`."""
    drawn = np.random.default_rng(0).integers(min(least, vocabulary - 1), vocabulary, (rows, prompted.prompt))
    return drawn.tolist()


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

    @property
    def how(self) -> str:
        """Say how the next token is chosen."""
        return "greedy"

    def read_and_write(self) -> NDArray[np.int32]:
        """Do all of it: tokens [B, T]."""
        self.prefill()
        return self.write()

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


@dataclass(frozen=True)
class Searcher:
    """A translator that reads random sentences as long as a prompt, and searches for what is most probable."""

    opened: Opened
    experiment: Experiment
    rows: int
    prompted: Prompted

    @property
    def how(self) -> str:
        """Say how it searches."""
        return f"beam of {beams}" if (beams := self.experiment.decode.beam) > 1 else "greedy"

    @cached_property
    def _source(self) -> jax.Array:
        ids = random_prompts(self.experiment.model.vocab_size, self.rows, self.prompted, RESERVED)
        ids += ids[:1] * (-self.rows % batch_shards(self.opened.mesh))  # as many rows as the devices divide
        return jax.device_put(np.asarray(ids, np.int32), batch_sharding(self.opened.mesh))

    @cached_property
    def _start(self) -> Any:
        skeleton, places = self.opened.skeleton, self.prompted.new + 1
        return jax.jit(lambda params, source: skeleton.bind(params).start(source, places))

    @cached_property
    def _search(self) -> Any:
        return jax.jit(partial(search, self.opened.skeleton, specials=(START, -1)), static_argnums=2)

    def described(self) -> Any:
        """Return the shapes of the state and the memory that writing begins with."""
        return jax.eval_shape(self._start, self.opened.skeleton.abstract, self._source)

    def prefill(self) -> None:
        """Read the sentences alone."""
        jax.block_until_ready(self._start(self.opened.params, self._source))

    def read_and_write(self) -> NDArray[np.int32]:
        """Do all of it: tokens [B, T]."""
        # An output is as long as the source, its end token not counted, and `extra_length`; no token ends it (-1).
        prompt, new = self.prompted.prompt, self.prompted.new
        decode = replace(self.experiment.decode, extra_length=new - prompt + 1)
        tokens_BT, _ = self._search(self.opened.params, self._source, decode)
        return np.asarray(jax.device_get(tokens_BT))[: self.rows, :new]


def writer_of(experiment: Experiment, opened: Opened, rows: int, prompted: Prompted) -> Writer | Searcher:
    """Return what writes with a model."""
    continues = _continues(experiment)
    return Writer(opened, rows, prompted) if continues else Searcher(opened, experiment, rows, prompted)


def _decoder_only(experiment: Experiment, opened: Opened, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    model, writer = experiment.model, Writer(opened, rows, prompted)
    assert isinstance(model, LanguageModelConfig)
    first = repeat(writer.prefill, budget=effort.budget / 3, width=effort.width)
    then = repeat(writer.write, budget=effort.budget, width=effort.width, before=writer.prefill)
    skeleton, places = opened.skeleton, prompted.prompt + prompted.new
    tokens, lengths = jnp.zeros((rows, prompted.prompt), jnp.int32), jnp.full(rows, prompted.prompt)
    begun = jax.eval_shape(lambda params: skeleton.bind(params).start(tokens, lengths, places)[1], skeleton.abstract)
    if isinstance(model, RNNLMConfig):
        carried = _bytes(begun.past) / PLACES  # of the states that are kept, one is read
    else:
        seen = (_seen(prompted, model.window(i)) / cache.positions_BS.shape[1] for i, cache in enumerate(begun.past))
        carried = sum(share * _bytes(cache) for share, cache in zip(seen, begun.past, strict=True))
    met = _met(skeleton, lambda model, *rest: model.extend(*rest), begun, tokens[:, :1])
    read = model.forward_flops({"tokens": (rows, prompted.prompt), "targets": (rows, prompted.prompt)})
    read -= 2 * rows * (prompted.prompt - 1) * model.width * model.vocab_size  # the last token alone is scored
    return _Written(first, then, read, _read(met), carried, _multiplied(met), writer.how)


def _translator(experiment: Experiment, opened: Opened, rows: int, prompted: Prompted, effort: Effort) -> _Written:
    searcher, beams = Searcher(opened, experiment, rows, prompted), experiment.decode.beam
    first = repeat(searcher.prefill, budget=effort.budget / 3, width=effort.width)
    whole = repeat(searcher.read_and_write, budget=effort.budget, width=effort.width)
    if min(whole.seconds) <= first.median:
        raise UserError(
            f"writing {prompted.new} tokens takes so much less than reading {prompted.prompt} that it cannot be told "
            "from noise; give more of them by --new."
        )
    then = Timing(tuple(seconds - first.median for seconds in whole.seconds))
    state, memory = searcher.described()
    carried = beams * _carried(state, prompted.new + 1, 0.5) + _carried(memory, 0, 1.0)
    read = experiment.model.forward_flops({"source": (rows, prompted.prompt), "target": (rows, 1)})
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    met = _met(opened.skeleton, lambda model, *rest: model.step(*rest), state, memory, token)
    return _Written(first, then, read, _read(met), carried, beams * _multiplied(met), searcher.how)


def _seen(prompted: Prompted, window: int) -> float:
    """Positions that a new token looks back at in a layer, on average; window 0 is all."""
    behind_T = prompted.prompt + np.arange(prompted.new) + 0.5
    return float(np.minimum(behind_T, window or np.inf).mean())


def _carried(tree: Any, places: int, filled: float) -> float:
    """Bytes of a tree, of what has `places` places the part that is filled on average."""
    return sum(
        _bytes(leaf) * (filled if leaf.ndim == 4 and leaf.shape[2] == places else 1.0) for leaf in jax.tree.leaves(tree)
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _met(skeleton: Skeleton, step: Callable[..., Any], *arguments: Any) -> list[tuple[Any, float]]:
    """List the parameters that a step reads, and the share that it reads at least: of experts, those of one token.

    Of tables that are looked up it reads next to nothing.
    """
    experts = skeleton.config.experts if isinstance(skeleton.config, GPTConfig) else DENSE
    traced = jax.make_jaxpr(lambda params, *rest: step(skeleton.bind(params), *rest))(skeleton.abstract, *arguments)
    leaves, letters = jax.tree.leaves(skeleton.abstract), jax.tree.leaves(skeleton.letters)
    return [
        (leaf, experts.chosen / experts.count if names.startswith("E") else 1.0)
        for leaf, names, variable in zip(leaves, letters, traced.jaxpr.invars, strict=False)
        if _whole(traced.jaxpr, variable)
    ]


def _whole(program: core.Jaxpr, variable: core.Var) -> bool:
    """Tell whether a program reads all of an input, and not only rows of it by their number."""
    for equation in program.eqns:
        for place in (i for i, v in enumerate(equation.invars) if v is variable):
            found = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
            inner = getattr(found, "jaxpr", found)
            if inner is not None and len(inner.invars) == len(equation.invars):
                if _whole(inner, inner.invars[place]):
                    return True
            elif equation.primitive.name != "gather":
                return True
    return False


def _read(met: list[tuple[Any, float]]) -> float:
    return sum(share * _bytes(leaf) for leaf, share in met)


def _multiplied(met: list[tuple[Any, float]]) -> float:
    return sum(share * leaf.size for leaf, share in met)
