"""What a model looks at reaches the pictures and the page as it is, and no text breaks out of the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.tiny import NUMBERS, ZAHLEN, tiny
from transformer_jax import attention_page as module
from transformer_jax import verbs
from transformer_jax.attention_page import AttentionMap, Choice, attention_page
from transformer_jax.cli import main
from transformer_jax.config import MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.models.rnn_seq2seq import RNNSeq2SeqConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.sharding import make_mesh
from transformer_jax.translate import Translator

SOURCE, TARGET = "one two 나는", "eins zwei drei </script>"
HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "{{DATA}}", '"', "&lt;", "\\u003c", "\u2028", "뷁"]
SIZES = {"cross": (3, 6), "encoder": (2, 6)}


@pytest.fixture(scope="module", autouse=True)
def translator():
    """Let every folder be the run of one untrained model."""
    experiment = tiny()
    skeleton = Skeleton.of(experiment.model, experiment.compute)
    tokenizer = Tokenizer.train(NUMBERS + ZAHLEN, experiment.model.vocab_size)
    params = skeleton.init(jax.random.key(0))
    translator = Translator(experiment, tokenizer, skeleton, params, make_mesh(MeshConfig()), [0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs, "load_meta", lambda _: (experiment, tokenizer.to_json()))
        patch.setattr(Translator, "open", lambda *_: translator)
        yield translator


@pytest.fixture(scope="module")
def drawn(translator, tmp_path_factory):
    return verbs.attention("run", SOURCE, TARGET, tmp_path_factory.mktemp("out") / "new" / "folder")


def embedded(page):
    """Read the data as a browser would: up to the first end tag."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def random_map(kind="cross", L=2, N=3, rows=("a", "b"), columns=("c", "d", "e")):
    weights = np.random.default_rng(0).dirichlet(np.ones(len(columns)), (L, N, len(rows)))
    return AttentionMap(kind, weights, list(rows), list(columns))


def test_page_and_one_picture_per_kind(drawn):
    names = [file.name for file in drawn.files]
    assert names == ["attention.html", "cross.png", "decoder.png", "encoder.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn.files[1:])
    page = drawn.files[0].read_text(encoding="utf-8")
    assert not re.search(r"(src|href|url|import)\s*[=(]", page)


def test_page_holds_every_weight(drawn):
    data = embedded(drawn.files[0].read_text(encoding="utf-8"))
    assert (data["source"], data["target"]) == (SOURCE, TARGET)
    assert data["start"] == {"kind": 0, "layer": 2, "head": -1}
    for kind, attention in zip(data["kinds"], drawn.maps, strict=True):
        weights = np.array(kind["weights"])
        layers = 2 if kind["kind"] == "encoder" else 3
        assert weights.shape == (layers, 6, len(kind["rows"]), len(kind["columns"]))
        np.testing.assert_allclose(weights, attention.weights_LNTS, rtol=0, atol=0.5 * 10**-module.DIGITS + 1e-9)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=weights.shape[-1] * 10**-module.DIGITS)


def test_labels_are_the_tokens_of_each_side(translator, drawn):
    tokenizer = translator.tokenizer
    read, written = ([*tokenizer.tokens(tokenizer.encode_batch([text])[0]), "<eos>"] for text in (SOURCE, TARGET))
    sides = {m.kind: (m.rows, m.columns) for m in drawn.maps}
    assert sides == {
        "cross": (written, read),
        "encoder": (read, read),
        "decoder": (written, ["<bos>", *written[:-1]]),
    }
    decoder = next(m for m in drawn.maps if m.kind == "decoder")
    assert not np.triu(decoder.weights_LNTS, 1).any()


def test_own_translation_is_the_default(translator, tmp_path):
    own = next(translator.translate([SOURCE])).text
    drawn = verbs.attention("run", SOURCE, out=tmp_path, kinds=["cross"])
    assert drawn.target == own
    assert [file.name for file in drawn.files] == ["attention.html", "cross.png"]


def test_chosen_heads_are_drawn_and_the_mean_is_theirs(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(module, "attention_grid", lambda panels, *_, across: calls.append((panels, across)))
    shown = random_map()
    for choice in (Choice(), Choice(heads="all"), Choice(layers=(2,), heads=(3, 1))):
        shown.draw(choice, tmp_path / "a.png", "")
    (mean, _), (every, across), (some, two) = calls
    assert list(mean) == ["layer 1", "layer 2"]
    assert (len(every), across) == (6, 3)
    for layer in (1, 2):
        heads = [every[f"layer {layer}, head {n}"] for n in (1, 2, 3)]
        np.testing.assert_allclose(mean[f"layer {layer}"], np.mean(heads, axis=0))
    assert (list(some), two) == (["layer 2, head 3", "layer 2, head 1"], 2)
    np.testing.assert_array_equal(some["layer 2, head 3"], shown.weights_LNTS[1, 2])


def test_page_opens_at_the_choice():
    maps = [random_map("cross"), random_map("encoder")]
    choice = Choice(("encoder",), (2, 1), (3,))
    assert embedded(attention_page("a", "b", "", maps, choice))["start"] == {"kind": 1, "layer": 1, "head": 2}
    assert embedded(attention_page("a", "b", "", maps, Choice(heads="all")))["start"]["head"] == 0


def test_hostile_text_stays_text():
    harmless = attention_page("", "", "", [random_map(columns="abcdefgh")], Choice())
    page = attention_page(HOSTILE[0], HOSTILE[1], "", [random_map(columns=HOSTILE)], Choice())
    data = embedded(page)
    assert (data["source"], data["target"]) == tuple(HOSTILE[:2])
    assert data["kinds"][0]["columns"] == [*HOSTILE[:6], r"\u2028", "뷁"]
    assert page.count("<") == harmless.count("<")


def test_weights_must_be_finite():
    broken = random_map()
    broken.weights_LNTS[1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="'cross' attention are not finite"):
        attention_page("a", "b", "", [broken], Choice())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(("crss",)), r"no attention 'crss' \(there is cross, encoder\). Did you mean 'cross'\?"),
        (Choice(layers=(3,)), "'encoder' attention has no layer 3; it has layers 1 to 2"),
        (Choice(("cross",), (0,)), "'cross' attention has no layer 0; it has layers 1 to 3"),
        (Choice(heads=(7,)), "'cross' attention has no head 7; it has heads 1 to 6"),
        (Choice(heads=()), "no head is chosen"),
    ],
)
def test_choice_names_what_exists(choice, message):
    with pytest.raises(UserError, match=message):
        choice.check(SIZES)
    Choice(("cross",), (3,), (6,)).check(SIZES)


def test_sizes_need_no_parameters():
    assert verbs._attention_sizes(tiny()) == {"cross": (3, 6), "decoder": (3, 6), "encoder": (2, 6)}
    recurrent = RNNSeq2SeqConfig(vocab_size=300, width=10, embedding=8, encoder_layers=1, decoder_layers=2)
    sizes = verbs._attention_sizes(replace(tiny(), model=replace(recurrent, attention="general")))
    assert sizes == {"cross": (1, 1)}
    with pytest.raises(UserError, match="has no head 2; it has head 1"):
        Choice(heads=(2,)).check(sizes)
    with pytest.raises(UserError, match="no attention, so there is nothing to draw"):
        Choice().check(verbs._attention_sizes(replace(tiny(), model=recurrent)))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" ", {}, "the sentence is empty"),
        ("one", {"out": "picture.png"}, "name a folder"),
        ("one", {"out": __file__}, "name a folder"),
        ("one", {"heads": (9,)}, "no head 9"),
    ],
)
def test_bad_input_is_named_before_parameters_are_read(monkeypatch, text, options, message):
    monkeypatch.setattr(Translator, "open", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=message):
        verbs.attention("run", text, **options)


def test_a_long_sentence_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\d{3} tokens are too many for a picture; at most 128"):
        verbs.attention("run", "one", "q" * 200, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["attention", "run", SOURCE, "--kind", "encoder", "--head", "1", "6", "--out", str(tmp_path), "--json"])
    assert stop.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [str(tmp_path / name) for name in ("attention.html", "encoder.png")]
    assert {m["kind"]: (m["layers"], m["heads"]) for m in said["maps"]} == verbs._attention_sizes(tiny())
    with pytest.raises(SystemExit) as stop:
        main(["attention", "run"])
    assert stop.value.code == 2
    assert "the sentence is empty" in capsys.readouterr().err
