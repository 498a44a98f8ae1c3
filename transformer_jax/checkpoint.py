"""Checkpoints: parameters, optimizer, step, random key, data iterator and experiment, saved together by Orbax.

`restore_or_init` is the only entry: start and resume are the same call. Layers are stored stacked, whichever way the
model runs, and every array is restored onto the mesh at hand, so a pod's checkpoint opens on a laptop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from transformer_jax.config import Experiment, differences
from transformer_jax.errors import UserError
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.nn.stack import stack_layers, unstack_layers
from transformer_jax.sharding import parameter_shardings
from transformer_jax.storage import absolute, is_remote, move, run_path
from transformer_jax.train import Trainer, TrainState

BROKEN = (ValueError, OSError, KeyError, TypeError)
"""What Orbax and TensorStore raise on files that are missing, cut short or overwritten."""

MAY_CHANGE = (
    "compute.",
    "init.",
    "mesh.",
    "decode.",
    "published",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.on_",
    "train.spike_",
    "train.max_rollbacks",
)
"""Fields in which a resumed run may differ: they change how and how long it runs, not what step n computes."""


@dataclass(frozen=True)
class Restored:
    """What `restore_or_init` found."""

    state: TrainState
    step: int
    """0 if the run is new."""
    losses: Sequence[tuple[int, float]] = ()
    """(step, loss) of the last steps before it."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, run: Path, trainer: Trainer, tokenizer_json: str, labels: Sequence[str], log: Callable[[str], None]
    ) -> None:
        self.run, self.trainer, self.log = run, trainer, log
        self.tokenizer_json, self.labels = tokenizer_json, list(labels)
        self.manager = self._open()
        # Once: the loop stands still while a save begins, and tracing the model takes longer than a small step.
        self._experiment_json = trainer.experiment.to_json()
        layout = stack_layers(trainer.shardings(), _stack_shardings)
        self._stacked: Any = jax.jit(stack_layers, out_shardings=layout)
        self._size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state()))

    def _open(self) -> ocp.CheckpointManager:
        latest = checkpoint_managers.LatestN(self.trainer.experiment.train.keep)
        best = checkpoint_managers.BestN(get_metric_fn=_validation_loss, n=1, reverse=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
            step_name_format=ocp.path.step.standard_name_format(),
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(_directory(self.run), options=options, item_handlers=_handlers())

    def restore_or_init(self, iterator: grain.DatasetIterator) -> Restored:
        """Return the newest complete state, with `iterator` moved to its place, or a fresh state.

        A checkpoint that cannot be read is set aside under `broken/`, said so, and the one before it is taken.

        Raises:
            UserError: there are checkpoints and none of them can be read.
        """
        broken = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, meta = read_state(self.run, step, self.trainer)
            except BROKEN as error:
                broken.append(step)
                reason = " ".join(str(error).split())[:200]
                self.log(f"checkpoint {step} cannot be read ({reason}); trying the one before it")
                continue
            if broken:
                self._set_aside(broken)
            # The same on every host, and so for any number of hosts: the order of examples does not depend on it.
            iterator.set_state(meta["data"])
            return Restored(state, step, meta.get("losses", ()))
        if broken:
            raise UserError(
                f"none of the checkpoints {broken} in {_directory(self.run)} can be read; nothing was changed. "
                "Name another --out to start anew."
            )
        state = self.trainer.init()
        return Restored(warm_start(self.trainer, state, self.log) if self.trainer.experiment.init.run else state, 0)

    def _set_aside(self, steps: list[int]) -> None:
        self.manager.close()
        if jax.process_index() == 0:
            for step in steps:
                move(_directory(self.run) / str(step), self.run / "broken" / str(step))
        self.manager = self._open()

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: grain.DatasetIterator,
        validation_loss: float | None,
        losses: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Start writing a checkpoint; the write goes on in the background.

        `losses` are the last ones, (step, loss), from which the next steps are judged.

        Raises:
            UserError: the disk cannot hold it, or the previous write failed.
        """
        if step in self.manager.all_steps():
            return
        self.wait()
        self._check_space()
        stacked = self._stacked(state)
        meta = {
            "experiment": self._experiment_json,
            "tokenizer": self.tokenizer_json,
            "labels": self.labels,
            "data": iterator.get_state(),
            "losses": list(losses),
        }
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(stacked.params),
                    optimizer=ocp.args.StandardSave(_optimizer_item(stacked)),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            )
        except BROKEN as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until the last save is on disk; raises `UserError` if it failed."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except BROKEN as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Wait, then release Orbax's threads."""
        self.wait()
        self.manager.close()

    def last_complete(self) -> str:
        """Say where the newest complete checkpoint is, for error messages."""
        steps = steps_of(self.run)
        return (
            f"the last complete checkpoint is {_directory(self.run) / str(steps[-1])}"
            if steps
            else "there is no checkpoint yet"
        )

    def _check_space(self) -> None:
        if is_remote(self.run):
            return
        need = self._size // jax.process_count()
        free = shutil.disk_usage(self.run).free
        if free < need:
            raise UserError(
                f"the disk of {self.run} has {free / 2**20:.1f} MiB free, a checkpoint needs {need / 2**20:.1f} MiB; "
                f"make room and run the same command again; {self.last_complete()}."
            )

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"saving a checkpoint under {self.run} failed ({error}); {self.last_complete()}.")


def read_state(run: Path, step: int, trainer: Trainer) -> tuple[TrainState, dict[str, Any]]:
    """Read the state of a checkpoint onto the mesh, and its "meta"; raises one of `BROKEN` if it cannot be read."""
    abstract, shardings = trainer.abstract_state(), trainer.shardings()
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(stack_layers, abstract),
        stack_layers(shardings, _stack_shardings),
    )
    wanted = ocp.args.Composite(
        params=ocp.args.StandardRestore(target.params),
        optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
        meta=ocp.args.JsonRestore(),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers())) as checkpointer:
        items = checkpointer.restore(_directory(run) / str(step), args=wanted)
    stored = TrainState(params=items.params, **items.optimizer)
    return jax.jit(lambda tree: unstack_layers(tree, abstract), out_shardings=shardings)(stored), items.meta


def check_same_run(stored: Experiment, new: Experiment, run: Path) -> None:
    """Refuse to continue a run folder with another experiment; raises `UserError` that lists the differences."""
    if stored.name != new.name:
        raise UserError(f"{run} holds the experiment '{stored.name}', not '{new.name}'; name another --out.")
    changed = [line for line in differences(stored, new) if not line.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            f"{run} was trained with other settings ({'; '.join(changed)}); name another --out, or drop the change."
        )


def steps_of(run: Path) -> list[int]:
    """List the complete checkpoints of a run, oldest first, without opening them."""
    folders = [path for path in _directory(run).glob("*") if path.name.isdecimal()]
    # A bucket cannot rename a folder that is complete: Orbax writes a file into it last.
    return sorted(int(path.name) for path in folders if not is_remote(run) or (path / "commit_success.txt").exists())


def load_meta(run: Path) -> tuple[Experiment, str]:
    """Read the experiment and the tokenizer that the newest readable checkpoint carries.

    Raises:
        UserError: there is no checkpoint, or none can be read.
    """
    experiment, tokenizer, _ = _newest_meta(run)
    return experiment, tokenizer


def load_labels(run: Path) -> list[str]:
    """Read the names of the classes or tags that a run tells apart; empty if it tells none. Raises as `load_meta`."""
    return _newest_meta(run)[2]


def _newest_meta(run: Path) -> tuple[Experiment, str, list[str]]:
    steps = steps_of(run)
    if not steps:
        raise UserError(f"{run} holds no checkpoint; train first, or name the run folder that `tjax train` printed.")
    for step in reversed(steps):
        path = _directory(run) / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            return Experiment.from_json(meta["experiment"], where=str(path)), meta["tokenizer"], meta["labels"]
        except (OSError, ValueError, KeyError):
            continue
    raise UserError(f"none of the checkpoints {steps} in {_directory(run)} can be read.")


def warm_start(trainer: Trainer, state: TrainState, log: Callable[[str], None]) -> TrainState:
    """Take the parameters of a fresh state from the run that `experiment.init` names, as far as that has them.

    Raises:
        UserError: nothing matches, or a parameter has another shape there.
    """
    init = trainer.experiment.init
    source = load_meta(run_path(init.run))[0]
    skeleton = Skeleton.of(source.model, trainer.skeleton.compute)
    theirs, _ = load_params(run_path(init.run), skeleton, trainer.mesh)
    found = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)}
    fresh: list[str] = []

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = _dotted(path)
        wanted = (
            [name]
            if not init.rename
            else [
                ours.replace(to, origin, 1)
                for origin, to in init.rename
                if (ours := name) == to or name.startswith(f"{to}.")
            ]
        )
        match = next((found[candidate] for candidate in wanted if candidate in found), None)
        if match is None:
            fresh.append(name)
            return leaf
        if match.shape != leaf.shape:
            raise UserError(
                f"init.run {init.run}: parameter {name} has the shape {match.shape} there and {leaf.shape} here; "
                "give the model the same sizes and the same vocabulary."
            )
        # A copy: one part may start several, and the step gives every buffer of its state away.
        return match.copy()

    params = jax.tree_util.tree_map_with_path(one, state.params)
    total = len(jax.tree.leaves(params))
    if len(fresh) == total:
        raise UserError(f"init.run {init.run}: none of its parameters belongs to this model; see init.rename.")
    parts = sorted({".".join(part for part in name.split(".")[:-1] if not part.isdecimal()) or name for name in fresh})
    drawn = f"; drawn anew: {', '.join(parts)}" if parts else ""
    log(f"initialised {total - len(fresh)} of {total} parameter arrays from {init.run}{drawn}")
    return replace(state, params=params)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def load_params(run: Path, skeleton: Skeleton, mesh: jax.sharding.Mesh, average: int = 1) -> tuple[Params, list[int]]:
    """Load parameters only, averaged over the newest `average` checkpoints (Vaswani 2017, section 6.1).

    Returns:
        The parameters, laid out on `mesh`, and the steps they come from.

    Raises:
        UserError: fewer than `average` checkpoints can be read.
    """
    shardings = parameter_shardings(skeleton.abstract, skeleton.letters, mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(stack_layers, skeleton.abstract),
        stack_layers(shardings, _stack_shardings),
    )
    total, used, reasons = None, [], []
    with ocp.Checkpointer(_frugal(target)) as checkpointer:
        for step in reversed(steps_of(run)):
            try:
                path = _directory(run) / str(step) / "params"
                params = checkpointer.restore(path, args=ocp.args.StandardRestore(target))
            except BROKEN as error:
                reasons.append(f"{step}: {' '.join(str(error).split())[:120]}")
                continue
            total = params if total is None else jax.tree.map(np.add, total, params)
            used.append(step)
            if len(used) == average:
                break
    if total is None or len(used) < average:
        raise UserError(
            f"{run} has {len(used)} readable checkpoint(s), decode.average={average} wants {average}"
            + (f" (unreadable: {'; '.join(reasons)})." if reasons else ".")
        )
    mean = total if average == 1 else jax.tree.map(lambda x: x / average, total)
    if jax.tree.structure(mean) == jax.tree.structure(skeleton.abstract):  # type: ignore[operator]
        return mean, used  # the layers stay stacked: no copy
    return jax.jit(lambda tree: unstack_layers(tree, skeleton.abstract), out_shardings=shardings)(mean), used


def write_params(run: Path, params: Params, experiment: Experiment, tokenizer_json: str, labels: Sequence[str]) -> None:
    """Make a run folder of stacked parameters that were not trained here: checkpoint 0, without optimizer and data."""
    handlers = _handlers() | {"params": _frugal(params)}
    meta = {"experiment": experiment.to_json(), "tokenizer": tokenizer_json, "labels": list(labels), "data": None}
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with ocp.CheckpointManager(_directory(run), item_handlers=handlers) as manager:
        manager.save(0, args=items)
        manager.wait_until_finished()
    (run / "experiment.json").write_text(experiment.to_json() + "\n", encoding="utf-8")
    if tokenizer_json:
        (run / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


def _directory(run: Path) -> Path:
    return absolute(run) / "checkpoints"


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "key": state.key}


def _stack_shardings(shardings: list[NamedSharding]) -> NamedSharding:
    return NamedSharding(shardings[0].mesh, PartitionSpec(None, *shardings[0].spec))


def _frugal(params: Params) -> ocp.StandardCheckpointHandler:
    """Read or write few arrays at a time, so that no second copy of a large model arises."""
    most = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) // 10**9
    return ocp.StandardCheckpointHandler(save_concurrent_gb=most, restore_concurrent_gb=most)


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
