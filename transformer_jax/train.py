"""The training step: a pure function of a state and a batch, jitted in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey

from transformer_jax.config import Experiment
from transformer_jax.errors import UserError
from transformer_jax.kernels.attention import Backend, Demand, chosen
from transformer_jax.nn.block import BlockConfig
from transformer_jax.nn.module import Params, Skeleton, parameter_count
from transformer_jax.objectives import Sums, Weights, means
from transformer_jax.optim import optimizer, schedule
from transformer_jax.sharding import (
    CONTEXT,
    axes_shown,
    batch_sharding,
    batch_shards,
    make_mesh,
    parameter_shardings,
    replicated,
)

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
BatchShapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each array of a batch, by name."""


def abstract_batch(shapes: BatchShapes, parts: int = 1, sharding: NamedSharding | None = None) -> Batch:
    """Shape what a step reads of a batch, or of one of its parts by rows; example ids are for people."""
    return {
        name: jax.ShapeDtypeStruct((-(-shape[0] // parts), *shape[1:]), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
        if name != "example"
    }


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "key"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step: a tree of arrays, or of their shapes or layouts."""

    step: Any
    params: Params
    opt_state: optax.OptState
    key: Any
    """Raw data of the run's random key; step n uses `fold_in(key, n)`."""


class Guard(NamedTuple):
    """What keeps a bad step out of the state, beside a loss or gradient that is not finite."""

    limit: Any = float("inf")
    """Highest loss whose update is applied."""
    applied: Any = True
    """Whether the step before was. If not, this one is not either: the host, a step behind, has yet to see why."""


FINITE = Guard()
"""Refuses only what is not finite."""


@dataclass(frozen=True)
class Trainer:
    """An experiment on a mesh: the abstract state with its layout, and the compiled steps."""

    experiment: Experiment
    skeleton: Skeleton
    tx: optax.GradientTransformation
    mesh: Mesh

    @staticmethod
    def of(experiment: Experiment, devices: list[jax.Device] | None = None) -> Trainer:
        """Check everything that can be checked before compiling or allocating; raises `UserError`."""
        experiment.check()
        mesh = make_mesh(experiment.mesh, devices)
        compute = replace(experiment.compute, attention=_attention(experiment, mesh))
        skeleton = Skeleton.of(experiment.model, compute)
        parameter_shardings(skeleton.abstract, skeleton.letters, mesh)
        parts = batch_shards(mesh) * experiment.train.accumulate
        if experiment.data.rows_multiple % parts:
            raise UserError(
                f"batches have a multiple of data.rows_multiple={experiment.data.rows_multiple} rows, which "
                f"{batch_shards(mesh)} batch shard(s) x train.accumulate={experiment.train.accumulate} do not divide; "
                f"set --data.rows-multiple {parts}."
            )
        tx = optimizer(experiment.optim, skeleton.letters, experiment.model.width_multiplier)
        trainer = Trainer(experiment, skeleton, tx, mesh)
        trainer.check_compiler()
        if mesh.shape[CONTEXT] > 1:
            trainer.check_positions()
        return trainer

    def check_compiler(self) -> None:
        """Raise `UserError` if the compiler of these devices does not know an option of `compute.xla`."""
        if not isinstance(self.mesh.devices.flat[0], jax.Device):
            return  # a stand-in of an estimate, which has no compiler
        for option in self.experiment.compute.xla:
            nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=replicated(self.mesh))
            try:
                nothing.lower().compile(_compiler_options([option]))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                raise UserError(f"--compute.xla {option}: {str(error).splitlines()[0]}") from error

    def check_positions(self) -> None:
        """Raise `UserError` if the mesh does not divide the positions of the largest batch, by tracing its loss.

        With a key, as in training.
        """
        batch = abstract_batch(self.experiment.data.batch_shapes())
        objective, key = self.experiment.objective, jax.eval_shape(jax.random.key, 0)
        with jax.set_mesh(self.mesh):
            jax.eval_shape(
                lambda params, batch, key: objective(self.skeleton.bind(params), batch, key),
                *(self.skeleton.abstract, batch, key),
            )

    def describe(self) -> str:
        """Say in one line what runs where."""
        device, compute = self.mesh.devices.flat[0], self.skeleton.compute
        scanned = any(names.startswith("L") for names in jax.tree.leaves(self.skeleton.letters))
        layers = "scanned" if scanned else "unrolled"
        axes = ", ".join(axes_shown(self.mesh.shape))
        context = self.mesh.shape[CONTEXT]
        around = f" around {context} devices" if context > 1 else ""
        return (
            f"{self.experiment.name}: {parameter_count(self.skeleton.abstract):,} parameters on "
            f"{self.mesh.size} x {device.device_kind} ({axes}), {compute.dtype}, {layers} layers, "
            f"attention by {compute.attention}{around}, remat {compute.remat}"
            f"{', xla ' * bool(compute.xla)}{' '.join(compute.xla)}"
        )

    def init(self) -> TrainState:
        """Draw a fresh state, laid out on the mesh."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self.shardings())()

    def _init(self) -> TrainState:
        key = jax.random.key(self.experiment.train.seed)
        params = self.skeleton.init(jax.random.fold_in(key, 0))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.tx.init(params),
            key=jax.random.key_data(jax.random.fold_in(key, 1)),
        )

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, without memory."""
        return jax.eval_shape(self._init)

    def shardings(self) -> TrainState:
        """Layout of the state: moments lie like their parameters; counters, factors and norms on every device."""
        whole = replicated(self.mesh)
        params = parameter_shardings(self.skeleton.abstract, self.skeleton.letters, self.mesh)
        shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(self.skeleton.abstract)}
        layouts = dict(jax.tree_util.tree_leaves_with_path(params))

        def layout(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            # Every transformation keeps its moments in trees like that of the parameters, some with parts left out.
            inside = tuple(reversed(list(takewhile(lambda key: isinstance(key, DictKey), reversed(path)))))
            return layouts[inside] if shapes.get(inside) == leaf.shape else whole

        opt_state = jax.tree_util.tree_map_with_path(layout, self.abstract_state().opt_state)
        return TrainState(step=whole, params=params, opt_state=opt_state, key=whole)

    def put(self, batch: Batch) -> Batch:
        """Lay this process's rows of a batch out on the mesh; example ids stay behind, they are for people."""
        rows: NamedSharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(rows, value)
            for name, value in batch.items()
            if name != "example"
        }

    def train_step(self) -> Any:
        """Return the jitted (state, batch, guard) -> (state, metrics); the old state's memory is reused."""
        # Metrics lie on every device, as "applied" does when it comes back in the next guard: one compilation.
        layout = (self.shardings(), replicated(self.mesh))
        return self._under_mesh(self._jit_step(layout))

    def lower_train_step(self, shapes: BatchShapes) -> jax.stages.Lowered:
        """Lower the training step for a batch of these shapes, without arrays and without devices that are there."""
        layout, batch = self.shardings(), abstract_batch(shapes, sharding=batch_sharding(self.mesh))
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract_state(),
            layout,
        )
        step = self._jit_step((layout, None))
        with jax.set_mesh(self.mesh):
            return step.lower(state, batch)

    def _jit_step(self, layout: Any) -> Any:
        options = _compiler_options(self.experiment.compute.xla)
        return jax.jit(
            partial(train_step, self), out_shardings=layout, donate_argnums=0, compiler_options=options or None
        )

    def eval_step(self) -> Any:
        """Return the jitted (params, batch) -> (sums, weights), deterministic."""
        return self._under_mesh(jax.jit(self._objective))

    def _objective(self, params: Params, batch: Batch) -> tuple[Sums, Weights]:
        objective = self.experiment.objective
        return objective(self.skeleton.bind(params), batch, None), objective.weights(batch)

    def pmap_train_step(self) -> Any:
        """Return the data-parallel step by `jax.pmap`, for comparison: everything leads with a device axis."""
        return jax.pmap(partial(train_step, self, axis_name="devices"), axis_name="devices", donate_argnums=0)

    def _under_mesh(self, jitted: Any) -> Any:
        def call(*args: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return jitted(*args)

        return call


def _compiler_options(options: Sequence[str]) -> dict[str, str | bool]:
    """Split NAME=VALUE; XLA reads numbers itself, and spells switches with capitals."""
    switches = {"true": True, "false": False}
    return {name: switches.get(value, value) for name, _, value in (option.partition("=") for option in options)}


def train_step(
    trainer: Trainer, state: TrainState, batch: Batch, guard: Guard = FINITE, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One update from one batch. With `axis_name` (pmap), sums of gradients and losses are added over that axis.

    The step is counted, but leaves parameters and optimizer as they were where loss or gradient norm is not finite or
    the guard forbids it: such an update does not count in the schedule either.

    Metrics: the means of the objective, its "tokens", the global gradient norm before clipping, the learning rate, and
    whether the update was "applied".
    """
    grads, sums, weights = gradients(trainer, state, batch, axis_name=axis_name)
    updates, opt_state = trainer.tx.update(grads, state.opt_state, state.params)
    metrics = means(sums, weights) | {
        "tokens": weights["tokens"],
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(trainer.experiment.optim.schedule)(_updates(state.opt_state)),
    }
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & (metrics["loss"] <= guard.limit)
    applied = sound & guard.applied
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key)
    return new, metrics | {"applied": applied}


def _updates(opt_state: optax.OptState) -> jax.Array:
    """Count the updates applied so far; every counter of the optimizer says the same."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def gradients(
    trainer: Trainer, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[Params, Sums, Weights]:
    """Gradients of the loss at a state, the objective's sums, and what these are divided by."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    weights = trainer.experiment.objective.weights(batch)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        weights = jax.lax.psum(weights, axis_name)
    grads, sums = _accumulated(trainer, state.params, batch, weights, key)
    if axis_name is not None:
        grads, sums = jax.lax.psum((grads, sums), axis_name)
    return grads, sums, weights


def _accumulated(
    trainer: Trainer, params: Params, batch: Batch, weights: Weights, key: jax.Array
) -> tuple[Params, Sums]:
    """Gradients of the loss over the weights of the whole batch, and all sums, over `accumulate` micro-batches."""

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        sums = trainer.experiment.objective(trainer.skeleton.bind(params), batch, key)
        return means(sums, weights)["loss"], sums

    gradient = jax.grad(loss, has_aux=True)
    n = trainer.experiment.train.accumulate
    if n == 1:
        return gradient(params, batch, key)

    # Row i goes to micro-batch i mod n: every device keeps the rows it holds.
    micro = jax.tree.map(lambda x: x.reshape(len(x) // n, n, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: tuple[Params, Sums], part: tuple[Batch, jax.Array]) -> tuple[tuple[Params, Sums], None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    keys = jax.random.split(key, n)
    first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zeros, (micro, keys))[0]


def _attention(experiment: Experiment, mesh: Mesh) -> Backend:
    """Choose the attention backend; raises `UserError` if the one asked for cannot serve."""
    block, context = getattr(experiment.model, "block", None), mesh.shape[CONTEXT]
    if not isinstance(block, BlockConfig):
        if context > 1:
            raise UserError(
                f"mesh.context={context} divides the positions of a row, which a recurrent model reads one after the "
                "other; set --mesh.context 1."
            )
        return "xla"
    platform, dtype = mesh.devices.flat[0].platform, experiment.compute.dtype
    length = max(shape[1] for shape, _ in experiment.data.batch_shapes().values() if len(shape) > 1)
    demand = Demand(platform, dtype, block.size, block.attention_dropout, length, context)
    return chosen(experiment.compute.attention, demand)
