"""The aligned texts this library ships, as the TFDS dataset `tjax_parallel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import tensorflow_datasets as tfds

from transformer_jax.data.bundled_dataset import Bundled, read_bundled
from transformer_jax.data.holdout import Split, hold_out


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


class TjaxParallel(Bundled):
    """Aligned texts with the features `<source>`, `<target>` and `group`; see `bundled/ATTRIBUTION.md`."""

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

    def features(self) -> dict[str, Any]:
        """Return both languages and the group."""
        return {name: tfds.features.Text() for name in (*self.builder_config.languages, "group")}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        rows = [line.split("\t") for line in read_bundled(config.file).split("\n")[:-1]]
        groups = [config.group(third) for _, _, third in rows]
        keys = [source for source, _, _ in rows] if config.split_by_row else groups
        for row, held in enumerate(hold_out(keys, where=config.file)):
            if held == split:
                values = (rows[row][0], rows[row][1], groups[row])
                yield row, dict(zip((*config.languages, "group"), values, strict=True))


NAME: Final = TjaxParallel.name
