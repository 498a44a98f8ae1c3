"""Progress of long preparations, on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES: Final = 10.0


def shown(items: Iterable[Item], doing: str, total: int | None) -> Iterator[Item]:
    """Yield `items`, of which there are `total` (None: not known), and show how far one is."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        yield from track(items, description=doing, total=total, console=console, transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{doing}: {done:,}" + ("" if total is None else f" of {total:,}"), markup=False)
        yield item
