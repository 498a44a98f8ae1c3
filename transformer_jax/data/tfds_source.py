"""Pairs from TFDS by random access (array_record), without TensorFlow and without touching the network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tensorflow_datasets as tfds

# Without h5py the automatic registration of TFDS stops before these datasets, silently.
import tensorflow_datasets.text
import tensorflow_datasets.translate

from transformer_jax.data import bundled_parallel, bundled_tasks, bundled_text
from transformer_jax.data.bundled_dataset import prepare
from transformer_jax.data.files import FORMS, pick
from transformer_jax.data.holdout import Split
from transformer_jax.data.sources import Pairs
from transformer_jax.errors import UserError, closest

_PROBES: Final = 64
_BUNDLED: Final = (bundled_parallel.NAME, bundled_tasks.NAME, bundled_text.NAME)


class TfdsPairs:
    """The pairs of one split of a prepared TFDS dataset."""

    def __init__(self, name: str, examples: Sequence[dict[str, Any]], source: str, target: str) -> None:
        self.name = name
        self._examples = examples
        self._source = source
        self._target = target
        # Reading all of a large set only to hash it would take minutes.
        probes = range(0, len(examples), max(1, len(examples) // _PROBES))
        content = [name, len(examples), source, target, [self.read(i, i + 1) for i in probes]]
        self.digest = hashlib.sha256(repr(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, start: int, stop: int) -> list[tuple[str, str]]:
        """Return the pairs `start` to `stop` (exclusive)."""
        return [
            pick(self._examples[row], self._source, self._target, f"{self.name} example {row}")
            for row in range(start, stop)
        ]


def tfds_splits(
    dataset: str, source: str, target: str, expressions: dict[Split, str], data_dir: str
) -> dict[Split, Pairs]:
    """Open the split `expressions` of a TFDS `dataset` of aligned texts; raises what `open_tfds` does."""
    info, opened = open_tfds(dataset, expressions, data_dir)
    return {
        split: TfdsPairs(f"{info.full_name}:{expressions[split]}", examples, source, target)
        for split, examples in opened.items()
    }


def open_tfds(
    dataset: str, expressions: dict[Split, str], data_dir: str, forms: str = FORMS
) -> tuple[tfds.core.DatasetInfo, dict[Split, Sequence[dict[str, Any]]]]:
    """Open the split `expressions` of the TFDS `dataset`; the bundled datasets are prepared if they are not yet.

    Returns what TFDS knows of the dataset, and the examples of each split by random access. `forms` says in messages
    how files would be given instead.

    Raises `UserError` with the command to type where a dataset is unknown, not prepared, or not in array_record.
    """
    builder = _builder(dataset, data_dir, forms)
    if dataset.partition("/")[0].partition(":")[0] in _BUNDLED:
        prepare(builder)
        builder = _builder(dataset, data_dir, forms)
    opened = {split: _open(builder, dataset, split, expression, data_dir) for split, expression in expressions.items()}
    return builder.info, opened


def _builder(dataset: str, data_dir: str, forms: str) -> tfds.core.DatasetBuilder:
    name, _, config = dataset.partition(":")[0].partition("/")
    try:
        return tfds.builder(dataset, data_dir=Path(data_dir).expanduser() if data_dir else None)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(with_community_datasets=False), *_BUNDLED]
        raise UserError(
            f"'{dataset}' is neither a TFDS dataset nor a file.{closest(name, known)} Files are given as {forms}."
        ) from error
    except (ValueError, AssertionError) as error:  # unknown configuration, malformed name; unknown version
        if name not in tfds.list_builders(with_community_datasets=False):
            raise UserError(f"TFDS cannot open '{dataset}': {error}") from error
        configs = tfds.builder_cls(name).builder_configs
        if config in configs:
            raise UserError(f"TFDS cannot open '{dataset}': {error}") from error
        raise UserError(
            f"TFDS dataset '{name}' has no configuration '{config}'.{closest(config, configs)} "
            f"It has {', '.join(sorted(configs))}."
        ) from error


def _open(
    builder: tfds.core.DatasetBuilder, dataset: str, split: Split, expression: str, data_dir: str
) -> Sequence[dict[str, Any]]:
    # First try, then explain: whether a dataset is usable is for TFDS to say, but its own messages mislead.
    try:
        return builder.as_data_source(split=expression)
    except NotImplementedError as error:
        raise _not_readable(builder, dataset, data_dir) from error
    except ValueError as error:
        raise _no_split(builder, split, expression, error) from error


def _not_readable(builder: tfds.core.DatasetBuilder, dataset: str, data_dir: str) -> UserError:
    folder = Path(builder.data_dir)
    if (folder / "dataset_info.json").exists():
        return UserError(
            f"{folder} holds '{dataset}' as {builder.info.file_format.value}, which has no random access. Convert it "
            "once: pip install tensorflow-cpu h5py, then tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record"
        )
    if others := sorted(info.parent.name for info in folder.parent.glob("*/dataset_info.json")):
        return UserError(
            f"'{dataset}' is not prepared in {folder}, but in version {', '.join(others)}; "
            f"name it, as {dataset.partition(':')[0]}:{others[-1]}."
        )
    where = f" --data_dir={data_dir}" if data_dir else ""
    return UserError(
        f"'{dataset}' is not prepared in {folder}. Prepare it once, with a network: "
        f"pip install tensorflow-cpu h5py, then tfds build {dataset} --file_format=array_record{where}"
    )


def _no_split(builder: tfds.core.DatasetBuilder, split: Split, expression: str, error: ValueError) -> UserError:
    present = sorted(builder.info.splits)
    if split in present or expression != split:
        return UserError(f"data.{split} = '{expression}' does not fit {builder.info.full_name}: {error}")
    return UserError(
        f"{builder.info.full_name} has no split '{split}', only {', '.join(present)}. Cut one off the training split, "
        f"for example data.{split} = 'train[99%:]' with data.train = 'train[:99%]'."
    )
