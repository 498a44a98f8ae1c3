"""Checkpoints: parameters, optimizer, step, random key, data iterator and experiment, saved together by Orbax.

`restore_or_init` is the only entry: start and resume are the same call. Layers are stored stacked, whichever way the
model runs, and every array is restored onto the mesh at hand, so a pod's checkpoint opens on a laptop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from transformer_jax.train import Trainer, TrainState

BROKEN = (ValueError, OSError, KeyError, TypeError)
"""What Orbax and TensorStore raise on files that are missing, cut short or overwritten."""

MAY_CHANGE = (
    "compute.",
    "mesh.",
    "decode.",
    "published",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep",
)
"""Fields in which a resumed run may differ: they change how and how long it runs, not what step n computes."""


@dataclass(frozen=True)
class Restored:
    """What `restore_or_init` found."""

    state: TrainState
    step: int
    """0 if the run is new."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, trainer: Trainer, tokenizer_json: str, log: Callable[[str], None]) -> None:
        self.run, self.trainer, self.tokenizer_json, self.log = run, trainer, tokenizer_json, log
        self.manager = self._open()

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
                state = self._restore(step, iterator)
            except BROKEN as error:
                broken.append(step)
                reason = " ".join(str(error).split())[:200]
                self.log(f"checkpoint {step} cannot be read ({reason}); trying the one before it")
                continue
            if broken:
                self._set_aside(broken)
            return Restored(state, step)
        if broken:
            raise UserError(
                f"none of the checkpoints {broken} in {_directory(self.run)} can be read; nothing was changed. "
                "Name another --out to start anew."
            )
        return Restored(self.trainer.init(), 0)

    def _restore(self, step: int, iterator: grain.DatasetIterator) -> TrainState:
        abstract, shardings = self.trainer.abstract_state(), self.trainer.shardings()
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(stack_layers, abstract),
            stack_layers(shardings, _stack_shardings),
        )
        items = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        # The same on every host, and so for any number of hosts: the order of examples does not depend on it.
        iterator.set_state(items.meta["data"])
        stored = TrainState(params=items.params, **items.optimizer)
        return jax.jit(lambda tree: unstack_layers(tree, abstract), out_shardings=shardings)(stored)

    def _set_aside(self, steps: list[int]) -> None:
        self.manager.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self.run / "broken" / str(step)
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                (_directory(self.run) / str(step)).rename(target)
        self.manager = self._open()

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, validation_loss: float | None
    ) -> None:
        """Start writing a checkpoint; the write goes on in the background.

        Raises:
            UserError: the disk cannot hold it, or the previous write failed.
        """
        if step in self.manager.all_steps():
            return
        self.wait()
        self._check_space()
        stacked = jax.jit(stack_layers, out_shardings=stack_layers(self.trainer.shardings(), _stack_shardings))(state)
        meta = {
            "experiment": self.trainer.experiment.to_json(),
            "tokenizer": self.tokenizer_json,
            "data": iterator.get_state(),
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
        state = self.trainer.abstract_state()
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) // jax.process_count()
        free = shutil.disk_usage(self.run).free
        if free < need:
            raise UserError(
                f"the disk of {self.run} has {free / 2**20:.1f} MiB free, a checkpoint needs {need / 2**20:.1f} MiB; "
                f"make room and run the same command again; {self.last_complete()}."
            )

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"saving a checkpoint under {self.run} failed ({error}); {self.last_complete()}.")


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
    return sorted(int(path.name) for path in _directory(run).glob("*") if path.name.isdecimal())


def load_meta(run: Path) -> tuple[Experiment, str]:
    """Read the experiment and the tokenizer that the newest readable checkpoint carries.

    Raises:
        UserError: there is no checkpoint, or none can be read.
    """
    steps = steps_of(run)
    if not steps:
        raise UserError(f"{run} holds no checkpoint; train first, or name the run folder that `tjax train` printed.")
    for step in reversed(steps):
        path = _directory(run) / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            return Experiment.from_json(meta["experiment"], where=str(path)), meta["tokenizer"]
        except (OSError, ValueError, KeyError):
            continue
    raise UserError(f"none of the checkpoints {steps} in {_directory(run)} can be read.")


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
    with ocp.StandardCheckpointer() as checkpointer:
        for step in reversed(steps_of(run)):
            try:
                params = checkpointer.restore(_directory(run) / str(step) / "params", target)
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
    mean = jax.tree.map(lambda x: x / average, total)
    return jax.jit(lambda tree: unstack_layers(tree, skeleton.abstract), out_shardings=shardings)(mean), used


def _directory(run: Path) -> Path:
    return run.absolute() / "checkpoints"


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "key": state.key}


def _stack_shardings(shardings: list[NamedSharding]) -> NamedSharding:
    return NamedSharding(shardings[0].mesh, PartitionSpec(None, *shardings[0].spec))


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
