"""From a Hugging Face folder to a run of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.checkpoint import write_params
from transformer_jax.config import ModelConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.interop.certify import COMPUTE, attest, host, inputs, our_outputs
from transformer_jax.interop.experiments import experiment_of
from transformer_jax.interop.families import reader_of
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.table import Family, Row, Slot, import_row, names, shape_of, slots, tree_of, used
from transformer_jax.interop.tensors import Tensors, require_space, some
from transformer_jax.logs import meter
from transformer_jax.nn.module import Params, Skeleton

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "encoder.json")


def import_folder(folder: Path, run: Path, source: str, tokenizer: str, ignore: Sequence[str]) -> dict[str, Any]:
    """Write a Hugging Face folder as a run, and return its certificate.

    Raises:
        UserError: a field, a tensor or the tokenizer does not fit, the disk is full, or the certificate fails.
    """
    fields = Fields.load(folder / "config.json")
    family = reader_of(fields)
    with Tensors(folder) as tensors:
        plan = plan_of(family, fields, tensors, ignore)
        labels = _labels(fields, plan.config)
        words = _tokenizer(Path(tokenizer) if tokenizer else folder, plan.config, required=bool(tokenizer))
        name = re.sub(r"[^\w.-]+", "_", Path(source).absolute().name if Path(source).is_dir() else source)
        experiment = experiment_of(name, plan.config, labels)
        require_space(run, 4 * sum(math.prod(slot.shape) for slot in plan.slots.values()))
        params = read_params(plan, tensors)
    architecture = family.write(plan.config)["architectures"][0]
    facts = {"direction": "import", "source": source, "architecture": architecture, "left_out": plan.left_out}
    given = inputs(plan.config, words)
    ours = our_outputs(family, Skeleton.of(plan.config, COMPUTE), params, given)
    certificate = attest(family, folder, given, ours, facts, run)
    write_params(run, params, experiment, words.to_json() if words else "", labels)
    return certificate


def _tokenizer(place: Path, config: ModelConfig, *, required: bool) -> Tokenizer | None:
    """Read the tokenizer of a folder, if it has one; raises `UserError` if it does not fit the model."""
    if not required and not any((place / name).is_file() for name in TOKENIZER_FILES):
        return None
    words = Tokenizer.load(place)
    words.require(config.vocab_size, f"the tokenizer of {place}")
    return words


@dataclass(frozen=True)
class Plan:
    """What is in a folder, accounted for before anything large is read."""

    config: ModelConfig
    rows: list[Row]
    slots: dict[str, Slot]
    """Our parameters."""
    actual: dict[str, str]
    """Their tensors: canonical name -> name in the file."""
    left_out: list[str]


def plan_of(family: Family, fields: Fields, tensors: Tensors, ignore: Sequence[str] = ()) -> Plan:
    """Read the configuration, and find the counterpart of every tensor of the folder and of every parameter of ours.

    Raises:
        UserError: a field is not supported, or a tensor is missing, left over, of another shape or there twice.
    """
    actual: dict[str, str] = {}
    for name in tensors:
        if (other := actual.setdefault(family.canonical(name), name)) != name:
            raise UserError(f"{tensors.folder}: the tensors {other} and {name} are the same one.")
    config = family.read(fields, frozenset(actual))
    fields.finish(ignore)
    config.check()
    ours = slots(Skeleton.of(config, COMPUTE))
    rows = used(family.rows(config), ours)
    wanted = {name for row in rows for name, _ in names(row, ours)}
    if missing := sorted(wanted - actual.keys()):
        raise UserError(f"{tensors.folder}: {some([family.full(name, config) for name in missing])} missing.")
    extra = set(actual) - wanted
    for name, same in family.tied:
        if name in extra:
            if not np.array_equal(tensors.read(actual[name]), tensors.read(actual[same])):
                raise UserError(
                    f"{tensors.folder}: tensors {actual[name]} and {actual[same]} differ, though the model ties them."
                )
            extra.remove(name)
    buffers = {name for name in extra if family.is_buffer(name)}
    if over := sorted(actual[name] for name in extra - buffers):
        raise UserError(f"{tensors.folder}: {some(over)} left over; a {family.name} of this kind has no place for it.")
    for row in rows:
        expected = shape_of(row, ours)
        for name, _ in names(row, ours):
            if (shape := tensors.shape(actual[name])) != expected:
                raise UserError(
                    f"{tensors.folder}: tensor {actual[name]} has the shape {shape}, config.json says {expected}."
                )
    return Plan(config, rows, ours, actual, sorted(actual[name] for name in buffers))


def read_params(plan: Plan, tensors: Tensors) -> Params:
    """Read our parameters into host memory, layers stacked, one tensor of theirs at a time.

    Raises:
        UserError: the numbers of a tensor are none that we compute with.
    """
    arrays: dict[str, jax.Array] = {}
    with meter(0, len(plan.rows)) as bar:
        for i, row in enumerate(plan.rows, start=1):
            read = import_row(row, plan.slots, lambda name: tensors.read(plan.actual[name]))
            # As JAX arrays, which Orbax does not copy before it writes; once they are there, NumPy's are let go.
            arrays |= jax.block_until_ready(jax.device_put(read, host()))
            del read
            bar.update(i, row.theirs)
    return tree_of(arrays)


def _labels(fields: Fields, config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the classes by number."""
    count = getattr(config, "labels", 0)
    if count < 2:
        return ()
    by_number = fields.take("id2label", dict, {}) or {str(i): f"LABEL_{i}" for i in range(count)}
    labels = tuple(str(by_number.get(str(i), "")) for i in range(count))
    if len(set(labels)) < count or "" in labels:
        raise UserError(f"{fields.where}: id2label does not name {count} different labels.")
    return labels
