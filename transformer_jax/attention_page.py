"""What a model looks at: attention weights with their tokens, as pictures and as a page to explore them.

The page is `attention_page.html` with the data put in: one file without anything external, so it can be mailed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transformer_jax.errors import UserError, closest
from transformer_jax.plots import attention_grid, visible

Heads = Literal["mean", "all"] | tuple[int, ...]
"""The mean of all heads, each of them, or those with these numbers."""

DIGITS = 4
"""Of the weights in a page."""


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one kind of attention, and the tokens they connect."""

    kind: str
    weights_LNTS: np.ndarray
    rows: list[str]
    """T tokens that look."""
    columns: list[str]
    """S tokens they look at."""

    def draw(self, choice: Choice, path: Path, title: str) -> None:
        """Draw the chosen layers and heads as a PNG: heads beside each other, layers below each other."""
        L, N = self.weights_LNTS.shape[:2]
        layers = choice.layers or range(1, L + 1)
        if choice.heads == "mean":
            panels = {f"layer {i}": self.weights_LNTS[i - 1].mean(0) for i in layers}
            across = 4
        else:
            heads = range(1, N + 1) if choice.heads == "all" else choice.heads
            panels = {f"layer {i}, head {n}": self.weights_LNTS[i - 1, n - 1] for i in layers for n in heads}
            across = len(heads)
        attention_grid(panels, self.rows, self.columns, path, title, across=across)


@dataclass(frozen=True)
class Choice:
    """Which attention a person wants to see; layers and heads are numbered from 1."""

    kinds: tuple[str, ...] = ()
    """Empty: every kind that the model has; so for the layers."""
    layers: tuple[int, ...] = ()
    heads: Heads = "mean"

    def check(self, sizes: dict[str, tuple[int, int]]) -> None:
        """Raise `UserError` unless a model with these layers and heads by kind has all that is chosen."""
        if not sizes:
            raise UserError("this model has no attention, so there is nothing to draw.")
        for kind in self.kinds:
            if kind not in sizes:
                raise UserError(f"there is no attention '{kind}' (there is {', '.join(sizes)}).{closest(kind, sizes)}")
        if not self.heads:
            raise UserError("no head is chosen; name some by number, or 'mean' or 'all'.")
        heads = self.heads if isinstance(self.heads, tuple) else ()
        for kind in self.kinds or sizes:
            for what, numbers, count in zip(("layer", "head"), (self.layers, heads), sizes[kind], strict=True):
                for number in numbers:
                    if not 1 <= number <= count:
                        has = f"{what} 1" if count == 1 else f"{what}s 1 to {count}"
                        raise UserError(f"'{kind}' attention has no {what} {number}; it has {has}.")

    def start(self, maps: Sequence[AttentionMap]) -> dict[str, int]:
        """Return the indices of the first map of the choice; head -1 is the mean."""
        kind = next((i for i, shown in enumerate(maps) if shown.kind in self.kinds), 0)
        layer = self.layers[0] if self.layers else len(maps[kind].weights_LNTS)
        first = {"mean": 0, "all": 1}[self.heads] if isinstance(self.heads, str) else self.heads[0]
        return {"kind": kind, "layer": layer - 1, "head": first - 1}


def attention_page(source: str, target: str, note: str, maps: Sequence[AttentionMap], choice: Choice) -> str:
    """Return an HTML page with every kind, layer and head, opened at the first of the choice.

    Args:
        source: what was read.
        target: what was written.
        note: a line below them.
        maps: what to show.
        choice: where to open.

    Raises:
        UserError: weights that are not finite.
    """
    texts = {"source": source, "target": target, "note": note}
    data = texts | {"start": choice.start(maps), "kinds": [_plain(shown) for shown in maps]}
    # Inside a script element nothing is special but a tag, and in JSON "<" occurs only within strings.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", r"\u003c")
    template = resources.files("transformer_jax").joinpath("attention_page.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", text)


def _plain(shown: AttentionMap) -> dict[str, Any]:
    if not np.all(np.isfinite(shown.weights_LNTS)):
        raise UserError(f"the weights of '{shown.kind}' attention are not finite.")
    return {
        "kind": shown.kind,
        "rows": [*map(visible, shown.rows)],
        "columns": [*map(visible, shown.columns)],
        "weights": np.round(shown.weights_LNTS.astype(np.float64), DIGITS).tolist(),
    }
