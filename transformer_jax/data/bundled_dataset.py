"""What the texts this library ships have in common: TFDS datasets, prepared offline and without TensorFlow."""

from __future__ import annotations

import abc
import contextlib
import io
import lzma
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from transformer_jax.data.holdout import SPLITS, Split


class Bundled(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A dataset made of files under `bundled/`; its examples keep their order."""

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def features(self) -> dict[str, Any]:
        """Return the TFDS features of an example."""

    def _info(self) -> tfds.core.DatasetInfo:
        # Made here rather than with `dataset_info_from_configs`, which wants metadata files beside the module.
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(self.features()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    @abc.abstractmethod
    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]: ...


def read_bundled(file: str) -> str:
    """Return the text of a file under `bundled/`."""
    resource = resources.files("transformer_jax.data") / "bundled" / file
    return lzma.decompress(resource.read_bytes()).decode("utf-8")


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Write the data of a builder of this library into its TFDS folder, unless it is there.

    Safe when several processes do it at once: each writes a folder of its own, and the first to rename it wins.
    """
    final = Path(builder.data_dir)
    if (final / "dataset_info.json").exists():
        return
    sys.stderr.write(f"Preparing the bundled texts {builder.info.full_name} in {final} (once).\n")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=final.parent) as scratch:
        config = builder.builder_config
        copy = type(builder)(config=config.name if config else None, data_dir=scratch, file_format="array_record")
        _prepare_quietly(copy)
        _publish(Path(copy.data_dir), final)


def _prepare_quietly(builder: tfds.core.DatasetBuilder) -> None:
    # TFDS narrates on stdout, which belongs to the result of the command, and draws bars of a scratch folder.
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.display_progress_bar(True)


def _publish(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)
    except OSError:
        if not (final / "dataset_info.json").exists():
            raise
        shutil.rmtree(folder)  # another process was first, with the same content
