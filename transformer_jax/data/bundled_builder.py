"""The texts this library ships, as the TFDS dataset `tjax_parallel`: prepared offline, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Final

import tensorflow_datasets as tfds

from transformer_jax.data.holdout import SPLITS, Split, hold_out


@dataclass
class BundledConfig(tfds.core.BuilderConfig):
    """One bundled file: its languages and what stays together when rows are held out."""

    languages: tuple[str, str] = ("en", "ko")
    file: str = ""
    """Name under `bundled/`."""
    group: Callable[[str], str] = str
    """The group of a row, from its third column."""
    split_by_row: bool = False
    """Hold out single rows: for lists of names, where a row says nothing of the next."""


def _chapter(verse: str) -> str:
    return verse.partition(":")[0]


class TjaxParallel(tfds.core.GeneratorBasedBuilder):
    """Aligned texts with the features `<source>`, `<target>` and `group`; see `bundled/ATTRIBUTION.md`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        BundledConfig(name="help_en_ko", file="help.en-ko.tsv.xz", description="LibreOffice Help, MPL-2.0."),
        BundledConfig(
            name="help_en_de",
            file="help.en-de.tsv.xz",
            languages=("en", "de"),
            description="LibreOffice Help, MPL-2.0.",
        ),
        BundledConfig(
            name="bible_en_es",
            file="bible.en-es.tsv.xz",
            languages=("en", "es"),
            group=_chapter,
            description="World English Bible and Reina-Valera 1909, public domain.",
        ),
        BundledConfig(
            name="emoji_en_ko",
            file="emoji.en-ko.tsv.xz",
            split_by_row=True,
            description="Unicode CLDR short names, Unicode-3.0.",
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in (*self.builder_config.languages, "group")}
        # Made here rather than with `dataset_info_from_configs`, which wants metadata files beside the module.
        return tfds.core.DatasetInfo(
            builder=self,
            description="Small real parallel texts bundled with transformer_jax.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        rows = _read(config.file)
        groups = [config.group(third) for _, _, third in rows]
        keys = [source for source, _, _ in rows] if config.split_by_row else groups
        for row, held in enumerate(hold_out(keys, where=config.file)):
            if held == split:
                values = (rows[row][0], rows[row][1], groups[row])
                yield row, dict(zip((*config.languages, "group"), values, strict=True))


NAME: Final = TjaxParallel.name


def _read(file: str) -> list[list[str]]:
    resource = resources.files("transformer_jax.data") / "bundled" / file
    text = lzma.decompress(resource.read_bytes()).decode("utf-8")
    return [line.split("\t") for line in text.split("\n")[:-1]]


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
