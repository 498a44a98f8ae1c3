"""The command line as a newcomer meets it: help, JSON, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from tests.tiny import write_pairs
from transformer_jax.cli import main
from transformer_jax.cli.translation import _means
from transformer_jax.cli.verb import out

TINY = """\
from tests.tiny import small
from transformer_jax.config import Experiment

def tiny() -> Experiment:
    return small({path!r})
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    pairs = write_pairs(folder / "pairs.tsv")
    (folder / "recipes.py").write_text(TINY.format(path=str(pairs)))
    return f"{folder / 'recipes.py'}:tiny"


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "--out", str(folder)])
    assert stop.value.code == 0
    return folder


@pytest.fixture
def tjax(capsys):
    """Run a command line; returns exit code, standard output, standard error."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def assert_one_line(result, *parts):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("tjax: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


def test_help_needs_nothing(tjax):
    for argv in ([], ["--help"], ["train", "--help"], ["show", "--help"], ["evaluate", "--help"]):
        code, out, _ = tjax(*argv)
        assert code == 0
        assert "usage: tjax" in out
    code, out, _ = tjax("train", "transformer_demo_en_ko", "--help")
    assert code == 0
    assert "--optim.schedule.peak" in out
    assert "Learning rate at the end of the warm-up" in out


def test_a_verb_that_draws_nothing_loads_no_drawing():
    """What takes long to import is imported by who needs it: a command line that starts slowly is used less."""
    slow = ("matplotlib", "scipy", "sklearn", "tensorflow_datasets", "pyarrow", "huggingface_hub", "torch")
    program = (
        "import sys; from transformer_jax.cli import main\ntry: main(['list'])\n"
        f"finally: sys.stderr.write(' '.join(name for name in {slow} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "gpt2_demo" in done.stdout
    assert done.stderr == ""


def test_list_and_show_as_json(tjax):
    code, out, _ = tjax("list", "--json")
    assert code == 0
    assert "transformer_base_wmt14_en_de" in json.loads(out)["recipes"]
    code, out, _ = tjax("show", "transformer_base_wmt14_en_de", "--json")
    assert json.loads(out)["parameters"]["total"] == 63_045_632
    code, out, _ = tjax("show", "transformer_big_wmt14_en_de")
    assert "214,171,648" in out
    assert "213,000,000" in out


def test_evaluate_as_json_is_one_object(tjax, run):
    code, out, _ = tjax("evaluate", run, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["scores"].keys() == {"model", "copy_source", "nearest_neighbour"}
    assert "tok:13a" in report["scores"]["model"]["bleu_signature"]
    assert json.loads((run / "evaluation.json").read_text())["scores"] == report["scores"]
    lines = (run / "translations.tsv").read_text().splitlines()
    assert len(lines) == report["scores"]["model"]["sentences"]
    assert (run / "attention.png").stat().st_size > 1000


def test_evaluate_on_another_test_set(tjax, run, tmp_path):
    other = write_pairs(tmp_path / "other.tsv", rows=7)
    code, out, _ = tjax("evaluate", run, "--test", other, "--beam", "1", "--json")
    assert code == 0
    assert json.loads(out)["scores"]["model"]["sentences"] == 7
    assert (run / "evaluation-other.tsv.json").exists()


def test_translate_argument_file_and_standard_input(tjax, run, tmp_path, monkeypatch):
    text = tmp_path / "in.txt"
    text.write_text("one two\n\nthree\n")
    code, out, _ = tjax("translate", run, "--file", text, "--json")
    assert code == 0
    outputs = json.loads(out)["translations"]
    assert [o["source"] for o in outputs] == ["one two", "", "three"]
    assert outputs[1]["text"] == ""
    stdin = io.TextIOWrapper(io.BytesIO(text.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, _ = tjax("translate", run)
    assert out.splitlines() == [o["text"] for o in outputs]
    code, out, _ = tjax("translate", run, "one two", "--attention-map", tmp_path / "map.png", "--beam", "2")
    assert out == outputs[0]["text"] + "\n"
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_training_a_finished_run_says_so(tjax, run, recipe):
    for target in ([recipe, "--out", run], [run]):
        code, _, err = tjax("train", *target)
        assert code == 0
        assert "restored step 12 of 12" in err
        assert "nothing to train" in err


def test_mistakes_on_the_command_line(tjax, recipe, run, tmp_path):
    assert_one_line(tjax("trian"), "there is no verb 'trian'. Did you mean 'train'?")
    assert_one_line(tjax("train"), "needs a RECIPE first")
    assert_one_line(tjax("train", "transformer_demo_en_kr"), "Did you mean 'transformer_demo_en_ko'?")
    assert_one_line(tjax("train", recipe, "--model.widht", "3"), "unknown option --model.widht", "'--model.width'")
    assert_one_line(tjax("train", recipe, "--mesh=fsdp=2"), "It has parts: --mesh.data, --mesh.fsdp, --mesh.tensor")
    assert_one_line(tjax("train", recipe, "--model.width", "wide"), "--model.width", "'wide'")
    assert_one_line(tjax("train", recipe, "--optim.schedule.kind", "cosin"), "invalid choice 'cosin'", "'cosine'")
    assert_one_line(tjax("train", recipe, "--model.heads", "5"), "model.heads=5 does not divide model.width=24")
    assert_one_line(tjax("train", recipe, "--mesh.data", "3"), "mesh data=3", "8 device")
    assert_one_line(tjax("train", recipe, "--train.steps", "0"), "train.steps must be at least 1")
    assert_one_line(tjax("show", recipe, "--model.dropout", "1.5"), "model.dropout must lie in [0, 1)")
    assert_one_line(tjax("evaluate", tmp_path), "is not a run folder")
    assert_one_line(tjax("evaluate", run, "--test", tmp_path / "no.tsv"), "no.tsv")
    assert_one_line(tjax("translate", run, "--file", tmp_path / "absent.txt"), "absent.txt", "no such file")
    assert_one_line(tjax("translate", run, "one", "two"), "unexpected argument 'two'")
    assert_one_line(tjax("translate", run, "one", "--beam", "0"), "decode.beam")
    assert_one_line(tjax("translate", run, "one", "--attention-map", tmp_path / "no" / "a.png"), "no such folder")
    assert_one_line(tjax("translate", run, "one", "--average", "9"), "decode.average=9")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["pairs.tsv", "empty"]),
        (b"one\teins\ntwo\n", ["pairs.tsv:2"]),
        (b"one\teins\nt\xffo\tzwei\n", ["pairs.tsv:2", "UTF-8"]),
        (None, ["pairs.tsv"]),
    ],
    ids=["empty", "ragged", "not-utf-8", "missing"],
)
def test_bad_data_files(tjax, recipe, tmp_path, content, parts):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "run"
    assert_one_line(tjax("train", recipe, "--data.dataset", path, "--out", out), *parts)
    assert not out.exists()


def test_no_usable_pairs(tjax, recipe, tmp_path):
    result = tjax("train", recipe, "--data.min-words", "90", "--out", tmp_path / "run")
    assert_one_line(result, "no usable train pairs out of 144")


def test_run_of_another_shape_or_vocabulary(tjax, recipe, run, tmp_path):
    before = (run / "experiment.json").read_bytes()
    assert_one_line(tjax("train", recipe, "--out", run, "--model.width", "36"), "model.width: 24 -> 36")
    assert_one_line(tjax("train", recipe, "--out", run, "--model.vocab-size", "300"), "model.vocab_size: 306 -> 300")
    assert (run / "experiment.json").read_bytes() == before
    tokenizer = run / "tokenizer.json"
    small = ["--data.tokenizer", tokenizer, "--model.vocab-size", "280", "--out", tmp_path / "x"]
    assert_one_line(tjax("train", recipe, *small), "306", "280")


def test_file_that_is_not_utf8_names_its_line(tjax, run, tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\ntw\xffo\n")
    code, _, err = tjax("translate", run, "--file", path)
    assert code == 2
    assert f"{path}:2: not UTF-8" in err


def test_every_score_is_printed_above_its_floors(capsys):
    entry = {"value": 0.5, "interval": [0.25, 0.75]}
    floors = {f"a floor with a long name {i}": {"accuracy": entry} for i in range(9)}
    out().print(
        _means({"scores": {"accuracy": entry, "nll": {"value": 1.0, "interval": None}}, "floors": floors}, "run")
    )
    title, _, first, *rest, last = capsys.readouterr().out.splitlines()
    assert (title.split(), first.split()) == (["run"], ["accuracy", "model", "0.5000", "0.2500", "to", "0.7500"])
    assert [line.strip().partition("  ")[0] for line in rest] == list(floors)
    assert last.split() == ["nll", "model", "1.0000"]
