"""The documents this library ships for pre-training, as the TFDS dataset `tjax_text`: prepared without TensorFlow."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import tensorflow_datasets as tfds

from transformer_jax.data.bundled_dataset import Bundled, read_bundled
from transformer_jax.data.holdout import Split, hold_out

_SCENE: Final = re.compile(r"(?:^ACT [IV]+\.?\n+)?^SCENE [IVX]+\b", re.MULTILINE | re.IGNORECASE)


@dataclass
class TextConfig(tfds.core.BuilderConfig):
    """One bundled file and how it falls into documents."""

    file: str = ""
    """Name under `bundled/`."""
    documents: Callable[[str], Iterator[tuple[str, str]]] = lambda text: iter([("", text)])
    """Yields the title and the text of each document."""


def _scenes(plays: str) -> Iterator[tuple[str, str]]:
    """Cut plays before every scene, or before the act that it opens; what precedes the first is a document too."""
    for play in re.split(r"\n(?=[^\n]+\n+by William Shakespeare\n)", plays):
        title = play.strip().partition("\n")[0]
        begins = [0, *(scene.start() for scene in _SCENE.finditer(play)), len(play)]
        for number, (begin, end) in enumerate(itertools.pairwise(begins)):
            yield f"{title}, {number}", play[begin:end].strip() + "\n"


def _pages(rows: str, title: Callable[[str], str] = str) -> Iterator[tuple[str, str]]:
    """Gather the first column of an aligned text by the third: a line for each row, in the order of the rows."""
    pages: dict[str, list[str]] = {}
    for row in rows.splitlines():
        text, _, group = row.split("\t")
        pages.setdefault(title(group), []).append(text)
    for name, lines in pages.items():
        yield name, "\n".join(lines) + "\n"


def _chapters(rows: str) -> Iterator[tuple[str, str]]:
    return _pages(rows, lambda verse: verse.partition(":")[0])


class TjaxText(Bundled):
    """Documents with the features `text` and `title`; see `bundled/ATTRIBUTION.md`."""

    BUILDER_CONFIGS: ClassVar = [
        TextConfig(
            name="shakespeare",
            file="shakespeare.txt.xz",
            documents=_scenes,
            description="Four plays of Shakespeare by scenes, public domain.",
        ),
        TextConfig(
            name="help_en",
            file="help.en-de.tsv.xz",
            documents=_pages,
            description="LibreOffice Help by pages, a paragraph a line, MPL-2.0.",
        ),
        TextConfig(
            name="bible_en",
            file="bible.en-es.tsv.xz",
            documents=_chapters,
            description="World English Bible by chapters, a verse a line, public domain.",
        ),
    ]

    def features(self) -> dict[str, Any]:
        """Return text and title."""
        return {"text": tfds.features.Text(), "title": tfds.features.Text()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        documents = list(config.documents(read_bundled(config.file)))
        # By lines, as the aligned texts are held out by rows: the same pages and chapters are in the same split.
        titles = [title for title, text in documents for _ in text.splitlines()]
        held = dict(zip(titles, hold_out(titles, where=config.file), strict=True))
        for number, (title, text) in enumerate(documents):
            if held[title] == split:
                yield number, {"text": text, "title": title}


NAME: Final = TjaxText.name
