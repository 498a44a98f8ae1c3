"""From a Hugging Face folder to a run of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.checkpoint import write_params
from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.interop.certify import attest, host, inputs, load, our_outputs
from transformer_jax.interop.experiments import experiment_of
from transformer_jax.interop.families import reader_of
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.table import Array, Family, Row, Slot, import_row, names, slots, tree_of, used
from transformer_jax.interop.tensors import Tensors, require_space, some
from transformer_jax.logs import meter
from transformer_jax.nn.module import Params, Skeleton

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "encoder.json")


def import_folder(folder: Path, run: Path, source: str, tokenizer: str, ignore: Sequence[str]) -> dict[str, Any]:
    """Write a Hugging Face folder as a run, and return its certificate.

    Raises:
        UserError: a field, a tensor or the tokenizer does not fit, or the certificate fails.
    """
    fields = Fields.load(folder / "config.json")
    family = reader_of(fields)
    with Tensors(folder) as tensors:
        config, params, left_out = read_model(family, fields, tensors, ignore)
        labels = _labels(fields, config)
        place = Path(tokenizer) if tokenizer else folder
        found = bool(tokenizer) or any((folder / name).is_file() for name in TOKENIZER_FILES)
        words = Tokenizer.load(place) if found else None
        if words is not None:
            words.require(config.vocab_size, f"the tokenizer of {place}")
        name = re.sub(r"[^\w.-]+", "_", Path(source).absolute().name if Path(source).is_dir() else source)
        experiment = experiment_of(name, config, labels)
        require_space(run, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        write_params(run, params, experiment, words.to_json() if words else "", labels)
    architecture = family.write(config)["architectures"][0]
    facts = {"direction": "import", "source": source, "architecture": architecture, "left_out": left_out}
    del params  # what is certified is what was written
    skeleton, params = load(run, config)
    given = inputs(config, words)
    return attest(family, folder, given, our_outputs(family, skeleton, params, given), facts, run)


def read_model(
    family: Family, fields: Fields, tensors: Tensors, ignore: Sequence[str] = ()
) -> tuple[ModelConfig, Params, list[str]]:
    """Read configuration and parameters, stacked; also the names of the tensors that were left out.

    Every tensor of the folder and every parameter of the model must have its counterpart, which is looked at before
    anything large is read.

    Raises:
        UserError: a field, a tensor or its shape does not fit; it is named.
    """
    actual: dict[str, str] = {}
    for name in tensors:
        if (other := actual.setdefault(family.canonical(name), name)) != name:
            raise UserError(f"{tensors.folder}: the tensors {other} and {name} are the same one.")
    config = family.read(fields, frozenset(actual))
    fields.finish(ignore)
    config.check()
    holes = slots(Skeleton.of(config, ComputeConfig(layers="scan")))
    rows = used(family.rows(config), holes)
    left_out = _account(family, config, rows, holes, actual, tensors)
    arrays: dict[str, jax.Array] = {}

    def read(name: str) -> Array:
        return tensors.read(actual[name])

    with meter(0, len(rows)) as bar:
        for i, row in enumerate(rows, start=1):
            # As JAX arrays, which Orbax does not copy before it writes; once they are there, NumPy's are let go.
            arrays |= jax.block_until_ready(jax.device_put(import_row(row, holes, read), host()))
            bar.update(i, row.theirs)
    return config, tree_of(arrays), left_out


def _account(
    family: Family,
    config: ModelConfig,
    rows: Sequence[Row],
    holes: Mapping[str, Slot],
    actual: Mapping[str, str],
    tensors: Tensors,
) -> list[str]:
    """Check that nothing is missing and nothing is left over; return what is left out on purpose."""
    wanted = {name for row in rows for name, _ in names(row, holes)}
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
    return sorted(actual[name] for name in buffers)


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
