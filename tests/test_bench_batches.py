"""Batches to measure with are those that training sees: the same arrays, at any size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.tiny import tiny
from transformer_jax.bench.batches import length_of, random_batch, rows_of, shapes_of, sized
from transformer_jax.cli.benchmarks import variants
from transformer_jax.errors import UserError
from transformer_jax.flops import tokens_of
from transformer_jax.recipes import find_recipe

KINDS = (
    "transformer_demo_en_ko",
    "gpt2_demo",
    "bert_small_demo",
    "bert_sentiment_demo",
    "bert_qa_demo",
    "bert_titles_demo",
    "bert_glue_stsb",
    "in_context_linear_5d",
)


def with_room(name):
    recipe = find_recipe(name)
    room = {"context": 160} if hasattr(recipe.model, "context") else {}
    return replace(recipe, model=replace(recipe.model, **room))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "length"), [(0, 0), (6, 0), (0, 72), (10, 72)])
def test_any_size_of_every_kind(name, rows, length):
    own = shapes_of(find_recipe(name))
    experiment = sized(with_room(name), rows, length)
    experiment.check()
    shapes = shapes_of(experiment)
    assert length_of(shapes) == (length or length_of(own))
    if rows or not length:  # parallel text has more rows where they are shorter
        assert rows_of(shapes) == (rows or rows_of(own))
    batch = random_batch(experiment)
    described = experiment.data.batch_shapes()
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        name: it for name, it in described.items() if name != "example"
    }


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_padding_and_all_is_in_range(name):
    experiment = sized(with_room(name), 5, 80)
    batch = random_batch(experiment)
    assert float(experiment.objective.weights(batch)["tokens"]) == tokens_of(shapes_of(experiment))
    for array in batch.values():
        assert np.isfinite(array).all()
        assert array.min() >= 0 or array.dtype == np.float32
    for key in ("tokens", "source", "target", "targets"):
        if key in batch:
            assert 4 <= batch[key].min() <= batch[key].max() < experiment.model.vocab_size
    for key in ("positions_masked", "start", "end"):
        if key in batch:
            assert batch[key].max() < 80
    if "positions_masked" in batch:
        assert (np.diff(batch["positions_masked"]) > 0).all()
    if batch.get("label") is not None and batch["label"].dtype == np.int32:
        assert batch["label"].max() < experiment.model.labels


def test_masked_text_keeps_its_share_of_gaps():
    recipe = find_recipe("bert_base")
    assert shapes_of(sized(recipe, 3, 512))["targets"] == (3, 4 * recipe.data.max_predictions)


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match=r"--length 2048 is more than model\.context=1024"):
        sized(find_recipe("gpt2_124m"), 1, 2048)
    with pytest.raises(UserError, match=r"--batch and --length must be at least 1"):
        sized(tiny(), -1)


def test_an_array_that_is_not_known(monkeypatch):
    data = tiny().data
    monkeypatch.setattr(type(data), "batch_shapes", lambda _: {"pixels": ((2, 3), "float32")})
    with pytest.raises(UserError, match=r"cannot make up the array 'pixels'.*--real-data"):
        random_batch(replace(tiny(), data=data))


def test_settings_are_swept_in_all_combinations():
    found = dict(variants(tiny(), ("compute.remat=none,full", "model.dropout=0.1,0.3,0.5")))
    assert len(found) == 6
    one = found["compute.remat=full model.dropout=0.3"]
    assert (one.compute.remat, one.model.dropout) == ("full", 0.3)
    assert list(variants(tiny(), ())) == [("", tiny())]
    with pytest.raises(UserError, match=r"--vary takes FIELD=VALUE,VALUE"):
        list(variants(tiny(), ("compute.remat",)))
    with pytest.raises(UserError, match=r"unknown option --compute\.remit.*remat"):
        list(variants(tiny(), ("compute.remit=full",)))
