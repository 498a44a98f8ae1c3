"""Makes the two Shakespeare tasks from the bundled plays: `python -m transformer_jax.tasks.make_shakespeare`.

Questions come from the scenes of the test split of `tjax_text/shakespeare`, examples from those of the validation
split: no model that was trained on that dataset has seen either. All are so short that a question and four examples fit
the 128 tokens that `gpt2_demo` reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from transformer_jax.data.documents import open_documents

SHORT: Final = {"Ham": "Hamlet", "Hor": "Horatio", "Laer": "Laertes", "Osr": "Osric", "Mess": "Messenger"}
"""Names that Hamlet abbreviates."""
SOURCE: Final = "four plays of Shakespeare as bundled (tjax_text/shakespeare), scenes held out from training"
LICENCE: Final = "public domain"
ASKED: Final = "By:"
LINE: Final = range(15, 41)
"""Characters of a line whose speaker is asked for."""
PASSAGE: Final = range(20, 61)
"""Characters before and with the last word that is asked for."""
_HEADER: Final = re.compile(r"\n\n((?:\d )?[A-Z][A-Za-z' ]{2,20})\.?\n(?=\S)")


def speeches(scene: str) -> Iterator[tuple[str, str]]:
    """Yield who speaks, and what, without stage directions."""
    parts = _HEADER.split(re.sub(r"\s*[\[(][^\])]*[\])]", "", f"\n\n{scene}"))
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        said = re.sub(r"\n\s*\n", "\n", text).strip()
        yield SHORT.get(name, " ".join(word.capitalize() for word in name.split())), said


def who_speaks(scene: str) -> Iterator[dict[str, Any]]:
    """Ask who of those that speak at least twice in a scene says a line."""
    said = list(speeches(scene))
    names = sorted(name for name, times in Counter(name for name, _ in said).items() if times > 1)
    for name, text in said:
        line = " ".join(text.split())
        untold = not any(f"{other}." in line for other in names)
        if len(names) > 1 and name in names and untold and len(line) in LINE:
            choices = [f" {other}" for other in names]
            yield {"context": f"{line}\n{ASKED}", "choices": choices, "answer": names.index(name)}


def last_word(scene: str) -> Iterator[dict[str, Any]]:
    """Ask for the last word of a speech, after as many of its last lines as are short enough."""
    for _, text in speeches(scene):
        passage, *before = reversed(re.sub(r"[^\w]+$", "", text).split("\n"))
        word = passage.rpartition(" ")[2]
        for line in before:
            if len(longer := f"{line}\n{passage}") not in PASSAGE:
                break
            passage = longer
        if len(passage) in PASSAGE and passage != word and re.fullmatch(r"[a-z]{4,}", word):
            yield {"text": passage}


def main() -> None:
    """Write both files beside this one."""
    splits = open_documents("tjax_text/shakespeare", "text", "file", {"train": "", "validation": "", "test": ""})
    scenes = {"train": splits.validation, "test": splits.test}
    common = {"source": SOURCE, "licence": LICENCE}
    heads: dict[str, dict[str, Any]] = {
        "shakespeare_who_speaks": {
            "kind": "choice",
            "about": "Who of those on the stage says this?",
            **common,
            "answer_context": ASKED,
        },
        "shakespeare_last_word": {
            "kind": "last_word",
            "about": "The last word of a speech.",
            **common,
            "separator": ".\n\n",
            "max_tokens": 12,
        },
    }
    for (name, head), items in zip(heads.items(), (who_speaks, last_word), strict=True):
        lines: list[dict[str, Any]] = [{"name": name, **head}]
        for split, parts in scenes.items():
            lines += [{"split": split, **item} for part in parts for scene in part.texts() for item in items(scene)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
