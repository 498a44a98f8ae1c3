"""Every recipe: its golden JSON, its round trip, its parameter count."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import transformer_jax
from transformer_jax.config import Experiment, differences
from transformer_jax.errors import UserError
from transformer_jax.recipes import find_recipe, recipes

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_equals_its_golden_json(name):
    """A changed default shows in review. Refresh with UPDATE_GOLDEN=1."""
    path, text = GOLDEN / f"{name}.json", recipes()[name]().to_json() + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_no_golden_json_without_a_recipe():
    assert {path.stem for path in GOLDEN.glob("*.json")} == recipes().keys()


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_checks_and_survives_json(name):
    experiment = find_recipe(name)
    assert experiment.name == name
    experiment.check()
    assert Experiment.from_json(experiment.to_json()) == experiment


@pytest.mark.parametrize(
    ("name", "total"),
    [("transformer_base_wmt14_en_de", 63_045_632), ("transformer_big_wmt14_en_de", 214_171_648)],
)
def test_parameter_counts_by_hand(name, total):
    model = find_recipe(name).model
    d, f = model.width, model.feedforward
    norm, attention, feedforward = 2 * d, 4 * d * d, 2 * d * f + f + d
    encoder, decoder = attention + feedforward + 2 * norm, 2 * attention + feedforward + 3 * norm
    by_hand = model.vocab_size * d + model.encoder_layers * encoder + model.decoder_layers * decoder
    shown = transformer_jax.show(find_recipe(name))
    assert shown["parameters"]["total"] == total == by_hand
    assert sum(shown["parameters"].values()) == 2 * total
    # Within 3.1 % of what the paper prints, and the note says why.
    assert abs(total / shown["published"]["parameters"] - 1) < 0.031
    assert "vocabulary" in shown["published"]["note"]


def test_json_errors_name_the_field():
    text = find_recipe("transformer_demo_en_ko").to_json()
    with pytest.raises(
        UserError, match=r"there is no ModelConfig 'TransformerConfg'\. Did you mean 'TransformerConfig'"
    ):
        Experiment.from_json(text.replace('"TransformerConfig"', '"TransformerConfg"'))
    with pytest.raises(UserError, match=r"widht.*experiment\.model"):
        Experiment.from_json(text.replace('"width"', '"widht"'))
    with pytest.raises(UserError, match="here: not JSON"):
        Experiment.from_json(text[:-5], where="here")


def test_differences_name_fields_and_values():
    one = find_recipe("transformer_demo_en_ko")
    other = replace(one, train=replace(one.train, steps=7))
    assert differences(one, other) == [f"train.steps: {one.train.steps} -> 7"]


def test_own_recipe_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "from experiments.transformer import transformer_demo_en_ko\n"
        "from transformer_jax.config import Experiment\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    size: int = 3\n"
        "def wide() -> Experiment:\n"
        "    return replace(transformer_demo_en_ko(), name='wide')\n"
    )
    assert find_recipe(f"{path}:wide").name == "wide"
    with pytest.raises(UserError, match="has no function 'wid"):
        find_recipe(f"{path}:wid")
    with pytest.raises(UserError, match="there is no recipe file"):
        find_recipe(f"{tmp_path}/absent.py:wide")
