"""The experiment: one frozen tree of dataclasses, its JSON round trip and its differences.

A run is a function that returns an `Experiment`; a variant is `dataclasses.replace` of another. Three nodes are
open to new kinds and are therefore abstract here: `ModelConfig` (one subclass per family, in `models/`),
`ObjectiveConfig` (in `objectives.py`) and `DataConfig` (in `data/`). In JSON such a node carries its class name
under "type".
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.v import format_exception

from transformer_jax.errors import UserError, closest

if TYPE_CHECKING:
    from pathlib import Path

    import jax
    from flax import nnx

    from transformer_jax.data.loader import OpenData
    from transformer_jax.objectives import Sums


@dataclass(frozen=True)
class Config(abc.ABC):  # noqa: B024 - ABC for the abstract methods of the open nodes below
    """A node of the experiment that can check itself before anything is compiled or allocated."""

    def check(self) -> None:
        """Raise `UserError` if the values of this node contradict each other."""
        return


@dataclass(frozen=True)
class ComputeConfig(Config):
    """How the numbers are computed; none of it changes what is learned, so a resumed run may differ in it."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision. Parameters, softmax and loss stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but the matmuls, or whole layers."""
    layers: Literal["auto", "scan", "unrolled"] = "auto"
    """Scan over stacked layers (compile time flat in depth) or unroll them; auto unrolls up to 24, but on TPU."""
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = "auto"
    """Attention backend: plain; in blocks, with memory linear in context; the kernels for GPU and TPU. auto takes the
    fastest that can serve; a named one that cannot is an error."""
    xla: tuple[str, ...] = ()
    """Options of XLA for the training step, each NAME=VALUE: as in XLA_FLAGS and LIBTPU_INIT_ARGS, without dashes."""

    def check(self) -> None:
        """Raise `UserError` for an option that has no name or no value."""
        for option in self.xla:
            if not re.fullmatch(r"\w+=.+", option):
                raise UserError(f"--compute.xla {option}: an option is given as NAME=VALUE, without dashes.")


@dataclass(frozen=True)
class MeshConfig(Config):
    """Devices along each axis of the mesh; one of them may be -1, which takes the devices that are left."""

    data: int = -1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = 1
    """Shares of parameters and optimizer state (and of the batch)."""
    tensor: int = 1
    """Shares of heads, feed-forward width and vocabulary."""
    context: int = 1
    """Shares of the positions of a row, for long ones: keys and values travel around the devices (ring attention)."""
    expert: int = 1
    """Shares of the experts (and of the batch): tokens travel to the devices that have theirs, and back."""


@dataclass(frozen=True)
class ModelConfig(Config):
    """Architecture of one family. Subclasses are frozen dataclasses beside their Flax modules, in `models/`."""

    vocab_size: int

    @abc.abstractmethod
    def build(self, key: jax.Array, compute: ComputeConfig) -> nnx.Module:
        """Construct the Flax module; under `jax.eval_shape` no memory is taken."""

    @abc.abstractmethod
    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products of a forward pass over a batch of arrays of these shapes, by name.

        Two a weight and position, and attention, halved where it is causal; no lookups, no norms, no recomputation.
        """

    @property
    def width_multiplier(self) -> float:
        """Width over the width that rates were tuned at (muP, Yang 2022); 1 for a family that has no such setting."""
        return 1.0


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    """What is minimised. Subclasses are frozen dataclasses in `objectives.py`."""

    @abc.abstractmethod
    def weights(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return what the sums are divided by, from the batch alone: "tokens" and others."""

    @abc.abstractmethod
    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Sums:
        """Return summed losses and metrics; `key=None` means deterministic."""

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Add what follows from the means (perplexity from the loss), for the log."""
        return values


@dataclass(frozen=True)
class DataConfig(Config):
    """Where examples come from. Subclasses are frozen dataclasses in `data/`."""

    @abc.abstractmethod
    def open(self, vocab_size: int, tokenizer_json: str | None = None) -> OpenData:
        """Read and tokenize the data; `tokenizer_json` is the saved tokenizer of a run, which then must be used."""

    @property
    @abc.abstractmethod
    def rows_multiple(self) -> int:
        """Every batch has a multiple of this many rows, so that a mesh can divide it."""

    @abc.abstractmethod
    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each array of the largest batch, over all hosts, without reading any data."""


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """Learning rate as a function of the step."""

    kind: Literal["inverse_sqrt", "cosine", "linear", "wsd", "constant"] = "constant"
    """inverse_sqrt: Vaswani 2017, section 5.3; cosine, linear: to `final` of the peak; wsd: stable, then linear."""
    peak: float = 1e-3
    """Learning rate at the end of the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    steps: int = 1000
    """Steps after which cosine, linear and wsd have decayed."""
    final: float = 0.0
    """Last learning rate as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps that wsd spends decaying."""


@dataclass(frozen=True)
class OptimConfig(Config):
    """The optax chain."""

    kind: Literal["adam", "lamb", "adafactor", "muon"] = "adam"
    """lamb (You 2020) for large batches; adafactor (Shazeer 2018) in little memory; muon (Jordan 2024) for matrices."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    """Decoupled (AdamW), on matrices and embeddings only."""
    clip_norm: float = 0.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""


@dataclass(frozen=True)
class DecodeConfig(Config):
    """Search: how a sequence-to-sequence model writes its output."""

    beam: int = 4
    """Hypotheses kept; 1 is greedy."""
    length_penalty: float = 0.6
    """Exponent alpha of ((5 + length) / 6)^alpha (Wu 2016, equation 14)."""
    extra_length: int = 50
    """Longest output, counted from the length of the input."""
    average: int = 1
    """Checkpoints whose parameters are averaged before evaluation."""
    batch: int = 64
    """Sentences decoded at once."""


@dataclass(frozen=True)
class TrainConfig(Config):
    """Length and rhythm of a run."""

    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    """Micro-batches whose gradients are summed before each update."""
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200
    keep: int = 3
    """Latest checkpoints kept, beside the best one by validation loss."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """When loss or gradient norm is not finite: stop, go on without that update, or go back and skip the data."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same when the loss is far above those of the last steps."""
    spike_window: int = 128
    """Steps whose losses say what is usual; nothing is a spike before half of them are there."""
    spike_deviations: float = 6.0
    """A spike lies so many standard deviations (1.4826 x the median absolute deviation) above the median."""
    max_rollbacks: int = 3
    """Rollbacks of a run; the next one stops it."""

    def check(self) -> None:
        """Every rhythm is at least one step."""
        for name, value in vars(self).items():
            if isinstance(value, int) and name not in ("seed", "max_rollbacks") and value < 1:
                raise UserError(f"train.{name} must be at least 1, got {value}.")
        if self.spike_window < 8:
            raise UserError(f"train.spike_window must be at least 8 steps, got {self.spike_window}.")
        if self.spike_deviations <= 0:
            raise UserError(f"train.spike_deviations must be positive, got {self.spike_deviations}.")


@dataclass(frozen=True)
class InitConfig(Config):
    """Where a new run takes its first parameters from: another run, and with them its tokenizer."""

    run: str = ""
    """Run folder; empty draws all parameters anew."""
    rename: tuple[tuple[str, str], ...] = ()
    """Parts of that run and of this model that stand for each other: (("encoder", "decoder"),); empty: by name.

    A part may appear several times. What this model has and the run has not is drawn anew, and said.
    """


@dataclass(frozen=True)
class Published(Config):
    """What the paper reports, printed beside what we count and measure; never as ours."""

    parameters: int
    source: str
    note: str = ""
    """Why our count differs, if it does."""


@dataclass(frozen=True)
class Experiment(Config):
    """Everything that determines a run. Every verb of the library takes one."""

    name: str
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    init: InitConfig = field(default_factory=InitConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    published: Published | None = None

    def check(self) -> None:
        """Check every node; raises `UserError` with one line."""
        for node in vars(self).values():
            if isinstance(node, Config):
                node.check()

    def to_json(self) -> str:
        """Return the experiment as indented JSON."""
        return json.dumps(_converter().unstructure(self, unstructure_as=Experiment), indent=2, ensure_ascii=False)

    @staticmethod
    def from_json(text: str, where: str = "experiment") -> Experiment:
        """Read back what `to_json` wrote. Raises `UserError` naming `where` and every field that does not fit."""
        try:
            return _converter().structure(json.loads(text), Experiment)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}).") from error
        except cattrs.BaseValidationError as error:
            reasons = cattrs.transform_error(error, path="experiment", format_exception=_reason)
            raise UserError(f"{where}: {'; '.join(reasons)}") from error


def _converter() -> cattrs.Converter:
    # Made at the call: the package's __init__ imports the subclasses after this module.
    converter = cattrs.Converter(forbid_extra_keys=True)

    def tagged(node: Config) -> dict[str, Any]:
        return {"type": type(node).__name__, **make_dict_unstructure_fn(type(node), converter)(node)}

    def untagged(value: dict[str, Any], base: type[Config]) -> Config:
        kinds = {kind.__name__: kind for kind in _descendants(base)}
        name = value.get("type", "")
        if name not in kinds:
            raise UserError(f"there is no {base.__name__} '{name}'.{closest(name, kinds)}")
        fields = {key: field for key, field in value.items() if key != "type"}
        return make_dict_structure_fn(kinds[name], converter, _cattrs_forbid_extra_keys=True)(fields, kinds[name])

    for base in (ModelConfig, ObjectiveConfig, DataConfig):
        converter.register_unstructure_hook(base, tagged)
        converter.register_structure_hook_func(functools.partial(operator.is_, base), untagged)
    return converter


def _descendants(base: type[Config]) -> Iterator[type[Config]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _descendants(kind)


def _reason(error: BaseException, kind: type | None) -> str:
    return str(error) if isinstance(error, UserError) else format_exception(error, kind)


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of an experiment as ("optim.schedule.peak", value)."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield f"{prefix}{f.name}.type", type(value).__name__
            yield from flatten(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def differences(old: Experiment, new: Experiment) -> list[str]:
    """List the fields in which two experiments differ, as "model.width: 512 -> 256"."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def read_experiment(path: Path) -> Experiment:
    """Read `experiment.json` of a run folder."""
    return Experiment.from_json(path.read_text(encoding="utf-8"), where=str(path))


def with_changes(experiments: Sequence[Experiment], settings: Mapping[str, Config]) -> list[Experiment]:
    """Change in every experiment of a plan what was changed in its first; a schedule as long as its run stays so.

    Args:
        experiments: the plan.
        settings: nodes of the first experiment ("data", "train", ...) as they are wanted.
    """
    first = experiments[0]
    changes = {
        node: {name: value for name, value in vars(wanted).items() if getattr(getattr(first, node), name) != value}
        for node, wanted in settings.items()
    }

    def changed(experiment: Experiment) -> Experiment:
        nodes = {
            node: dataclasses.replace(getattr(experiment, node), **fields) for node, fields in changes.items() if fields
        }
        new, plan = dataclasses.replace(experiment, **nodes), experiment.optim.schedule
        if plan.steps == experiment.train.steps:
            plan = dataclasses.replace(plan, steps=new.train.steps)
        return dataclasses.replace(new, optim=dataclasses.replace(new.optim, schedule=plan))

    return [changed(experiment) for experiment in experiments]
