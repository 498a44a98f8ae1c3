"""Pictures are written, show what they are given, and have a glyph for every token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from transformer_jax import plots
from transformer_jax.errors import UserError
from transformer_jax.plots import attention_grid, loss_curve

KOREAN = ["▁나는", "▁어제", "▁학교에서", "뷁", "</s>"]
ENGLISH = ["I", "was", "at", "Ġschool", "$x$", "\n", " "]


def weights(T: int, S: int) -> np.ndarray:
    x_TS = np.random.default_rng(0).random((T, S))
    return x_TS / x_TS.sum(axis=1, keepdims=True)


def size(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that would have been saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


RECORDS = [
    {"step": 1, "loss": 5.0, "tokens_per_second": 10.0},
    {"step": 2, "loss": float("nan")},
    {"step": 2, "validation_loss": 4.0},
    {"step": 3, "loss": 3.0},
    {"step": 4, "validation_loss": 3.5},
    {"step": 6, "validation_loss": 3.75},
]


def test_loss_curve_shows_both_losses_and_the_best(drawn: list[Figure], tmp_path: Path) -> None:
    loss_curve(RECORDS, tmp_path / "loss.png")
    training, validation, best = drawn[0].axes[0].get_lines()
    assert training.get_xydata().tolist() == [[1, 5], [3, 3]]
    assert validation.get_xydata().tolist() == [[2, 4], [4, 3.5], [6, 3.75]]
    assert best.get_xydata().tolist() == [[4, 3.5]]
    assert best.get_label() == "best: 3.5 at step 4"
    assert validation.get_linewidth() > training.get_linewidth()


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], RECORDS[2:3]])
def test_loss_curve_is_written(records: list[dict[str, Any]], tmp_path: Path) -> None:
    loss_curve(records, tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (7 * plots.DPI, 4 * plots.DPI)


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "loss": float("inf")}]])
def test_nothing_to_draw(records: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to draw"):
        loss_curve(records, tmp_path / "loss.png")


def test_attention_map_in_both_directions(tmp_path: Path) -> None:
    T, S = len(KOREAN), len(ENGLISH)
    attention_grid({"": weights(T, S)}, KOREAN, ENGLISH, tmp_path / "a.png", "영어 → 한국어")
    attention_grid({"": weights(S, T)}, ENGLISH, KOREAN, tmp_path / "b.png")
    (a_width, _), (_, b_height) = size(tmp_path / "a.png"), size(tmp_path / "b.png")
    assert a_width > S * 0.26 * plots.DPI
    assert b_height > S * 0.26 * plots.DPI


def test_attention_map_grows_with_the_sentence(tmp_path: Path) -> None:
    attention_grid({"": weights(2, 1)}, KOREAN[:2], ENGLISH[:1], tmp_path / "short.png")
    attention_grid({"": weights(60, 50)}, KOREAN * 12, ENGLISH[:5] * 10, tmp_path / "long.png")
    short, long = size(tmp_path / "short.png"), size(tmp_path / "long.png")
    assert long[0] > 50 * 0.25 * plots.DPI > short[0]
    assert long[1] > 60 * 0.25 * plots.DPI > short[1]


def test_attention_grid_labels_the_outer_panels(drawn: list[Figure], tmp_path: Path) -> None:
    T, S = len(KOREAN), len(ENGLISH)
    panels = {f"layer {layer}, head {head}": layer * head * weights(T, S) for layer in (1, 2) for head in (1, 2, 3)}
    attention_grid(panels, KOREAN, ENGLISH, tmp_path / "grid.png", across=4)
    shown = [axes for axes in drawn[0].axes if axes.images]
    assert [axes.get_title() for axes in shown] == list(panels)
    rows = [[label.get_text() for label in axes.get_yticklabels()] for axes in shown]
    columns = [[label.get_text() for label in axes.get_xticklabels()] for axes in shown]
    assert rows == [KOREAN, [], [], [], KOREAN, []]
    assert columns == [[*ENGLISH[:5], "\\n", "' '"]] * 4 + [[], []]
    assert len({axes.images[0].get_clim() for axes in shown}) == 1
    for axes, panel in zip(shown, panels.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), panel)


def test_attention_grid_is_written(tmp_path: Path) -> None:
    attention_grid({str(i): weights(5, 7) for i in range(6)}, KOREAN, ENGLISH, tmp_path / "grid.png", "교차 주의")
    assert size(tmp_path / "grid.png")[0] > 4 * 7 * 0.2 * plots.DPI


def test_default_font_where_it_suffices() -> None:
    assert plots._font("Ein Satz, ▁un été. Ġ").get_family() == FontProperties().get_family()


def test_font_covers_every_hangul_syllable_beside_latin() -> None:
    text = "Ġ▁é" + "".join(map(chr, range(0xAC00, 0xD7A4)))
    families = plots._font(text).get_family()
    assert families[0] == FontProperties().get_family()[0]
    assert set(text) <= set().union(*map(plots._glyphs, families))


@pytest.mark.parametrize("others", [[], ["DejaVu Serif"]])
def test_missing_font_is_named(others: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "_other_families", lambda: others)
    with pytest.raises(UserError, match=r"glyphs for 나 는: .* pip install koreanize-matplotlib"):
        attention_grid({"": weights(1, 1)}, ["나는"], ["I"], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_last_resort_boxes_are_no_font() -> None:
    assert any("Last Resort" in font.name for font in font_manager.fontManager.ttflist)
    assert not any("Last Resort" in family for family in plots._other_families())


def test_session_is_left_alone(tmp_path: Path) -> None:
    # Reading "backend" would choose one.
    before = {key: mpl.rcParams[key] for key in mpl.rcParams if key != "backend"}
    attention_grid({"": weights(1, 1)}, ["나는"], ["I"], tmp_path / "a.png")
    assert {key: mpl.rcParams[key] for key in before} == before
    code = (
        "import sys, pathlib; from transformer_jax.plots import attention_grid;"
        f"attention_grid({{'': [[1.0]]}}, ['나는'], ['I'], pathlib.Path({str(tmp_path / 'b.png')!r}));"
        "assert not {'matplotlib.pyplot', 'koreanize_matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("panels", "across", "message"),
    [
        ({}, 4, "at least one panel"),
        ({"h": np.ones((2, 3))}, 0, "one panel across"),
        ({"h": np.ones((3, 2))}, 4, r"'h' has shape \(3, 2\), the labels want \(2, 3\)"),
        ({"h": np.full((2, 3), np.nan)}, 4, "not finite"),
    ],
)
def test_bad_arguments_are_named(panels: dict[str, np.ndarray], across: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        attention_grid(panels, ["a", "b"], ["c", "d", "e"], tmp_path / "a.png", across=across)
