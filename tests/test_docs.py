"""Laws of the documents: what they tell a reader to type or to open exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from transformer_jax.cli import VERBS, benchmarks, reading, training, translation
from transformer_jax.cli.verb import parse
from transformer_jax.config import ComputeConfig, Experiment
from transformer_jax.nn.module import Skeleton
from transformer_jax.recipes import find_recipe, recipes

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "docs" / "README.ko.md")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DEMO = "transformer_demo_en_ko"

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(path: Path) -> list[tuple[str, str]]:
    """List (language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of every command in a shell block, and of every `tjax ...` or `make ...` in the prose."""
    lines = [line for language, content in blocks(path) if language == "sh" for line in content.splitlines()]
    lines += re.findall(r"`((?:tjax|make) [a-z][^`]*)`", prose(path))
    for line in lines:
        for command in line.partition("#")[0].split("|"):
            if words := shlex.split(command):
                yield words


def parses(words: list[str]) -> bool:
    """Parse `tjax VERB ...` as the command line does; nothing is run."""
    name, rest = words[0], words[1:]
    assert name in VERBS
    verb = VERBS[name]
    if not rest or rest[0].isupper() or "mine.py:" in rest[0]:
        return True  # RECIPE, RUN, and the reader's own
    options = [word for word in rest if word not in ("--help", "...")]
    target = options.pop(0) if verb.target else ""
    default = verb.default(target)
    parsed = parse(verb.options, default, options, "tjax")
    if isinstance(getattr(parsed, "experiment", None), Experiment):
        parsed.experiment.check()
    return True


@pytest.fixture(autouse=True)
def _runs_of_the_reader(monkeypatch):
    """Take a run folder that a document names for one of the recipe of its name, or of the demo."""

    def experiment(target: str) -> Experiment:
        name = Path(target).name if target.startswith("runs/") else target
        return find_recipe(name if name in recipes() or not target.startswith("runs/") else DEMO)

    for module in (training, translation, reading, benchmarks):
        for reader in ("experiment_of", "experiment_of_run"):
            if hasattr(module, reader):
                monkeypatch.setattr(module, reader, experiment)


@document
def test_every_command_parses(path):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    variables = set(re.findall(r"^([A-Z]+) [?:]?=", MAKEFILE, re.M))
    for program, *words in commands(path):
        if Path(program).name == "tjax":
            assert parses(words), words
        elif program == "make":
            assert {word for word in words if "=" not in word} <= targets, words
            assert {word.partition("=")[0] for word in words if "=" in word} <= variables, words


def test_the_readme_shows_every_verb_of_translation_and_both_commands():
    shown = {(Path(program).name, *words[:1]) for program, *words in commands(READMES[0])}
    assert {("tjax", verb) for verb in ("list", "show", "train", "evaluate", "translate")} <= shown
    assert {("make", "demo"), ("make", "test"), ("make", "data")} <= shown


@document
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", prose(linked), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@document
def test_pictures_are_pictures(path):
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", prose(path)):
        assert (path.parent / target).read_bytes().startswith(b"\x89PNG"), target


@document
def test_no_path_of_one_machine(path):
    assert not re.search(r"(?<![\w.~/])/(?:home|root|tmp|mnt|usr)/", path.read_text(encoding="utf-8"))


def test_both_readmes_say_the_same():
    english, korean = READMES
    assert blocks(english) == blocks(korean)

    def count(mark: str) -> list[int]:
        return [len(re.findall(mark, prose(path), re.M)) for path in READMES]

    for mark in (r"^# ", r"^## ", r"^!\[", r"^\|"):
        here, there = count(mark)
        assert here == there, mark


def test_the_plans_of_the_readme_are_those_of_the_guide():
    """Its table holds figures of the outputs there, of the commands above it."""
    guide = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    text = READMES[0].read_text(encoding="utf-8")
    above, table = re.search(r"```sh\n((?:tjax plan .*\n)+)```\n\n\| recipe .*\n.*\n((?:\|.*\n)+)", text).groups()
    for command, row in zip(above.splitlines(), table.splitlines(), strict=True):
        shown = re.search(rf"^\$ {re.escape(command)}( --price [\d.]+)?\n(.*?)^```", guide, re.M | re.S)
        output = shown[2]
        assert shown[0] in text
        recipe, on, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
        assert output.startswith(f"{recipe} on {on}:")
        assert f"bound by {cells[2].split()[-1]} " in output
        for figure in re.findall(r"[\d.,]*\d", " ".join(cells)):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,]*\d)", output), figure


def test_the_file_tree_exists():
    tree = next(content for _, content in blocks(READMES[0]) if content.startswith("pyproject.toml"))
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        assert ROOT.joinpath(*folders).exists(), "".join(folders)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load Python text as a module."""

    def call(content: str, name: str):
        path = tmp_path / f"{name}.py"
        path.write_text(content, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look annotations up
        spec.loader.exec_module(module)
        return module

    return call


@pytest.fixture
def examples(load):
    """What the Python examples of CONTRIBUTING define."""
    contents = [content for language, content in blocks(ROOT / "CONTRIBUTING.md") if language == "python"]
    modules = [load(content, f"contributing_example_{i}") for i, content in enumerate(contents)]
    return {name: value for module in modules for name, value in vars(module).items()}


def test_the_examples_of_contributing_work_together(examples):
    skeleton = Skeleton.of(examples["BagConfig"](vocab_size=11, width=7), ComputeConfig())
    bag = skeleton.bind(skeleton.init(jax.random.key(0)))
    batch = {"tokens": jnp.array([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])}
    objective = examples["NextToken"]()
    assert objective.weights(batch)["tokens"] == 5
    assert jnp.isfinite(objective(bag, batch, None)["tokens"]["loss"])
    experiment = examples["transformer_demo_en_de"]()
    assert isinstance(experiment, Experiment)
    experiment.check()
    assert examples["Documents"]("texts").rows_multiple == 8


def test_the_python_of_the_readme_imports(load):
    programs = [content for language, content in blocks(READMES[0]) if language == "python"]
    assert programs
    for content in programs:
        compile(content, "README.md", "exec")
        imports = [line for line in content.splitlines() if re.match(r"(import|from) ", line)]
        assert imports
        load("\n".join(imports), "readme_imports")
