"""Reports: written once as Markdown, read as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .8em; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; }} code, pre {{ font-size: .88em; background: #f5f5f5; }}
pre {{ padding: .8em; overflow-x: auto; }}
</style>
{body}
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; bars and line breaks in a cell are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def write_report(title: str, sections: Sequence[str], folder: Path) -> list[Path]:
    """Write `report.md` and `report.html` into `folder`; pictures in it (`![...](file.png)`) go into the page.

    Returns:
        The two files.
    """
    text = "\n\n".join([f"# {title}", *sections]) + "\n"
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(text, encoding="utf-8")
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or []:
            _inline_picture(child, folder)
    body = parser.renderer.render(tokens, parser.options, {})
    page.write_text(_PAGE.format(title=title, body=body), encoding="utf-8")
    return [markdown, page]


def _inline_picture(token: Token, folder: Path) -> None:
    source = token.attrGet("src")
    if token.type == "image" and isinstance(source, str):
        data = base64.b64encode((folder / source).read_bytes()).decode("ascii")
        token.attrSet("src", f"data:image/png;base64,{data}")
