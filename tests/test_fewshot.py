"""Laws of prompting: which examples are shown, what is compared, and how sure the result is."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tiny_gpt import BYTES, MODERN, completer, run_folder
from transformer_jax.cli import main
from transformer_jax.completion import Completer
from transformer_jax.errors import UserError
from transformer_jax.fewshot import bootstrap, chance, evaluate, wilson
from transformer_jax.generation import Generation
from transformer_jax.recipes import find_recipe
from transformer_jax.task_file import Item, Task, bundled_tasks, read_task

MODEL = replace(MODERN, context=128, layers=1, windows=(9,))
COLOURS = Task(
    "colours",
    "choice",
    train=tuple(Item(f"Colour of {x}:", (" red", " blue", " very dark green"), i) for i, x in enumerate("abc")),
    test=tuple(Item(f"Colour of {x}:", (" red", " blue", " very dark green"), i % 3) for i, x in enumerate("vwxyz")),
    answer_context="Colour:",
    separator="\n",
    normalisation="unconditional",
)
CAPITALS = Task(
    "capitals",
    "completion",
    train=(Item("France:", answers=("Paris",)), Item("Korea:", answers=("Seoul",))),
    test=(
        Item("Spain:", answers=("Madrid",)),
        Item("Italy:", answers=("Rome", "Roma")),
        Item("Korea:", answers=("Seoul",)),
    ),
    max_tokens=6,
)
WORDS = Task(
    "words",
    "last_word",
    instruction="Fill in.",
    blank=" ____. ->",
    test=(Item(text="He rode his horse"), Item(text="she bound up\nhis wounds"), Item(text="but a dream")),
    max_tokens=6,
)


@cache
def opened() -> Completer:
    return completer(MODEL, BYTES)


def test_a_prompt_is_instruction_examples_and_question() -> None:
    assert COLOURS.prompt(0, 0, seed=0) == "Colour of v:"
    one, two = COLOURS.examples(2, 2, seed=0)
    shown = [f"{item.context}{item.choices[item.answer]}" for item in (one, two)]
    assert COLOURS.prompt(2, 2, seed=0) == "\n".join([*shown, "Colour of x:"])
    (example,) = WORDS.examples(0, 1, seed=0)
    head, word = example.text.rsplit(" ", 1)
    assert WORDS.prompt(0, 1, seed=0) == f"Fill in.\n\n{head} ____. -> {word}\n\nHe rode his ____. ->"


def test_examples_depend_on_seed_and_question_and_grow() -> None:
    draws = {(question, seed): COLOURS.examples(question, 3, seed) for question in range(5) for seed in range(4)}
    assert len({tuple(item.context for item in items) for items in draws.values()}) > 3
    for (question, seed), items in draws.items():
        assert COLOURS.examples(question, 3, seed) == items
        assert COLOURS.examples(question, 1, seed) == items[:1], "one shot is the first of three"
        assert set(items) == set(COLOURS.train)


@pytest.mark.parametrize("task", [CAPITALS, WORDS])
def test_the_question_itself_is_never_an_example(task: Task) -> None:
    for question in range(3):
        for seed in range(5):
            shown = task.examples(question, 9, seed)
            assert task.test[question].parts("") not in [item.parts("") for item in shown]
            assert shown


def test_choices_are_compared_by_three_normalisations() -> None:
    (outcome,) = evaluate(opened(), COLOURS, shots=[2], seed=3)
    assert next(iter(outcome.scores)) == "accuracy_unconditional"
    alone = np.asarray([s.log_prob for s in opened().score([("Colour:", c) for c in COLOURS.test[0].choices])])
    for question, item in enumerate(outcome.items):
        prompt = COLOURS.prompt(question, 2, seed=3)
        scores = opened().score([(prompt, choice) for choice in COLOURS.test[question].choices])
        total = np.asarray([score.log_prob for score in scores])
        tokens = np.asarray([len(score.log_probs) for score in scores])
        assert len(set(tokens.tolist())) > 1
        expected = {
            "sum": total.argmax(),
            "token": (total / tokens).argmax(),
            "unconditional": (total - alone).argmax(),
        }
        assert item["chosen"] == expected
        np.testing.assert_allclose(item["log_probs"], total, rtol=1e-5)
    for name in ("sum", "token", "unconditional"):
        right = np.mean([item["chosen"][name] == item["answer"] for item in outcome.items])
        assert outcome.scores[f"accuracy_{name}"].value == pytest.approx(right)
    assert len({tuple(item["chosen"].values()) for item in outcome.items}) > 1
    assert chance(COLOURS) == pytest.approx(1 / 3)


def told(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> Completer:
    """A model that writes what it is told to."""

    def complete_all(self: Completer, prompts: list[str], generation: Generation) -> list[Any]:
        assert generation.temperature == 0
        return [SimpleNamespace(text=texts[prompt]) for prompt in prompts]

    monkeypatch.setattr(Completer, "complete_all", complete_all)
    return opened()


def test_completions_are_scored_by_exact_match_and_f1(monkeypatch: pytest.MonkeyPatch) -> None:
    one = told(monkeypatch, {"Spain:": " the Madrid!", "Italy:": " Roma Milano", "Korea:": " Busan"})
    (outcome,) = evaluate(one, CAPITALS, shots=[0])
    assert [item["exact"] for item in outcome.items] == [1, 0, 0]
    assert [item["f1"] for item in outcome.items] == pytest.approx([1, 2 / 3, 0])
    assert outcome.scores["exact"].value == pytest.approx(1 / 3)
    assert outcome.scores["f1"].value == pytest.approx(5 / 9)
    assert outcome.scores["f1"].low < 5 / 9 < outcome.scores["f1"].high


def test_the_last_word_is_the_first_one_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(WORDS, blank="", instruction="", separator=" ")
    texts = {"He rode his": " horse, and", "she bound up\nhis": " wound", "but a": " day-dream's end"}
    (outcome,) = evaluate(told(monkeypatch, texts), plain, shots=[0])
    assert [item["guess"] for item in outcome.items] == ["horse", "wound", "day-dream's"]
    assert outcome.scores["accuracy"].value == pytest.approx(1 / 3)
    pairs = [("He rode his", " horse"), ("she bound up\nhis", " wounds"), ("but a", " dream")]
    perplexity = np.exp(-np.mean([score.log_prob for score in opened().score(pairs)]))
    assert outcome.scores["perplexity"].value == pytest.approx(perplexity, rel=1e-4)


def test_intervals() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20.
    found = wilson(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    found = wilson(0, 20)
    assert (found.low, found.high) == pytest.approx((0.0, 0.1611), abs=1e-4)
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(values, np.mean)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": [4]}, r"--shots must lie between 0 and the 3 examples of colours, got \[4\]"),
        ({"shots": [-1]}, "--shots"),
        ({"shots": []}, "--shots"),
        ({"limit": -1}, "--limit"),
    ],
)
def test_bad_requests_are_named_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(replace(opened(), load=lambda: pytest.fail("loaded")), COLOURS, **options)


def test_prompts_that_do_not_fit_are_refused_before_anything_is_loaded() -> None:
    small = replace(completer(replace(MODEL, context=32), BYTES), load=lambda: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"colours with 2 shots makes texts of up to \d+ tokens, .* at most 32"):
        evaluate(small, COLOURS, shots=[0, 2])


@pytest.mark.parametrize("name", bundled_tasks())
def test_tasks_that_ship_say_where_they_come_from(name: str) -> None:
    task = read_task(name)
    assert task.name == name
    assert task.licence == "public domain"
    assert task.source
    assert len(task.test) >= 40
    assert len(task.train) >= 30
    assert not {item.parts("") for item in task.test} & {item.parts("") for item in task.train}


@pytest.mark.parametrize("name", bundled_tasks())
def test_the_demo_can_read_the_tasks_that_ship_with_the_default_examples(name: str) -> None:
    recipe = find_recipe("gpt2_demo")
    model = replace(MODEL, context=recipe.model.context)
    demo = replace(
        completer(model, recipe.data.open(recipe.model.vocab_size).tokenizer), load=lambda: pytest.fail("loaded")
    )
    for seed in range(3):
        evaluate(demo, read_task(name), seed=seed)


def test_a_task_is_a_json_object_or_json_lines(tmp_path: Path) -> None:
    head = {"name": "capitals", "kind": "completion", "max_tokens": 6}
    items = {
        part: [{"context": item.context, "answers": item.answers} for item in getattr(CAPITALS, part)]
        for part in ("train", "test")
    }
    (tmp_path / "a.json").write_text(json.dumps(head | items))
    lines = [head, *({"split": part, **item} for part, listed in items.items() for item in listed)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_task(tmp_path / "a.json") == read_task(tmp_path / "a.jsonl") == CAPITALS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json: not JSON"),
        ("[1]", "a.json: expected an object"),
        ('{"name": "x", "kind": "choise"}', "a.json: .*kind"),
        ('{"name": "x", "kind": "choice", "tests": []}', "a.json: .*tests"),
        ('{"name": "x", "kind": "choice"}', "there is no test item"),
        (
            '{"name": "x", "kind": "choice", "test": [{"context": "a", "choices": ["b"]}]}',
            "test item 1 of a choice task",
        ),
        ('{"name": "x", "kind": "completion", "test": [{"context": "a"}]}', "needs a context and answers"),
        ('{"name": "x", "kind": "last_word", "test": [{"text": "a b."}]}', "ends in a word"),
    ],
)
def test_malformed_tasks_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_task(tmp_path / "a.json")
    with pytest.raises(UserError, match="Did you mean 'shakespeare_last_word'"):
        read_task("shakespear_last_word")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "run", MODEL, BYTES)


def call(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_generate_on_the_command_line(run: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    greedy = ("--temperature", 0, "--max-tokens", 12)
    code, text, said = call(capsys, "generate", run, "Der Rabe", *greedy)
    assert code == 0
    assert "12 tokens in " in said
    _, plain, _ = call(capsys, "generate", run, "Der Rabe", *greedy, "--json", "--logprobs", 2)
    (shown,) = json.loads(plain)["completions"]
    assert shown["text"] + "\n" == text
    assert shown["finish"] == "length"
    assert len(shown["logprobs"]) == 12
    assert all(place["top"][0]["token"] == place["token"] for place in shown["logprobs"]), "greedy takes the best"
    assert shown["logprobs"][0]["top"][0]["logprob"] > shown["logprobs"][0]["top"][1]["logprob"]

    (tmp_path / "prompts.txt").write_text("Give me\nDer Rabe\n")
    _, both, _ = call(capsys, "generate", run, "--file", tmp_path / "prompts.txt", *greedy, "--json")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Give me\nDer Rabe\n")))
    _, piped, _ = call(capsys, "generate", run, "--file", "-", *greedy, "--json", "--draft", run, "--draft-tokens", 3)
    texts = [[row["text"] for row in json.loads(printed)["completions"]] for printed in (both, piped)]
    assert texts[0] == texts[1]
    assert texts[0][1] == shown["text"]
    assert json.loads(piped)["speed"]["acceptance"] == 1.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x", "--file", "y"), "not both"),
        (("x", "--logprobs", 2), "--logprobs needs --json"),
        (("x", "--temperature", -1), "--temperature must be at least 0"),
        (("x", "--temprature", 1), "Did you mean '--temperature'"),
        (("x", "--top-k", 301), "vocabulary of 300, got 301"),
        (("x" * 999,), "but the model reads at most 128"),
        (("--file", "none.txt"), "there is no such file"),
        (("x", "--draft", "none"), "none holds no checkpoint"),
        (("x", "--mesh.data", 3), "mesh data=3"),
    ],
)
def test_bad_input_is_one_line(run: Path, capsys, argv: tuple[Any, ...], message: str) -> None:
    code, printed, said = call(capsys, "generate", run, *argv)
    assert code == 2
    assert not printed
    assert message in said
    assert said.count("\n") == 1


def test_prompt_on_the_command_line(run: Path, capsys, tmp_path: Path) -> None:
    task = {"name": "colours", "kind": "choice", "separator": "\n", "answer_context": "Colour:"}
    for part in ("train", "test"):
        task[part] = [{"context": i.context, "choices": i.choices, "answer": i.answer} for i in getattr(COLOURS, part)]
    (tmp_path / "colours.json").write_text(json.dumps(task))
    code, table, said = call(capsys, "prompt", run, tmp_path / "colours.json", "--shots", 0, 2, "--seed", 3)
    assert code == 0
    assert "accuracy_token" in table
    assert "chance" in table
    report = json.loads((run / "prompt" / "colours.json").read_text())
    assert [outcome["shots"] for outcome in report["outcomes"]] == [0, 2]
    assert "commit" in report["provenance"]
    assert f"written: {run / 'prompt' / 'colours.json'}" in said
    (direct,) = evaluate(opened(), COLOURS, shots=[2], seed=3)
    assert [item["chosen"] for item in report["outcomes"][1]["items"]] == [item["chosen"] for item in direct.items]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install lm-eval")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_gives_the_same_numbers() -> None:
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    from transformer_jax.lm_eval_adapter import TjaxLM

    model = TjaxLM(opened())
    for shots in (0, 2):
        (ours,) = evaluate(opened(), COLOURS, shots=[shots], seed=3)
        documents = [
            {"query": COLOURS.prompt(i, shots, 3), "choices": [c.strip() for c in item.choices], "gold": item.answer}
            for i, item in enumerate(COLOURS.test)
        ]
        task = ConfigurableTask(
            config={
                "task": "colours",
                "custom_dataset": lambda documents=documents, **_: {"test": Dataset.from_list(documents)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "query",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc"}],
            }
        )
        theirs = simple_evaluate(model, tasks=[task], bootstrap_iters=0)
        assert theirs["results"]["colours"]["acc,none"] == pytest.approx(ours.scores["accuracy_sum"].value)
        for sample, item in zip(theirs["samples"]["colours"], ours.items, strict=True):
            log_probs = [float(answer[0][0]) for answer in sample["resps"]]
            np.testing.assert_allclose(log_probs, item["log_probs"], rtol=1e-4)

    def ask(kind: str, *arguments: Any) -> list[Any]:
        return [Instance(kind, {}, argument, 0) for argument in arguments]

    text = "Was ever woman in this humour woo'd? Was ever woman in this humour won? " * 9
    (rolled,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    (ids,) = BYTES.encode_batch([text])
    assert 128 < len(ids) < 256
    first, rest = (
        ([BYTES.eos], ids[:128]),
        (ids[len(ids) - 129 : 128], ids[128:]),
    )  # each with all the context it can have
    assert rolled == pytest.approx(sum(score.log_prob for score in opened().score_tokens([first, rest])), rel=1e-5)
    greedy = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    written = model.generate_until(ask("generate_until", ("Der Rabe", greedy), (text, greedy)))
    assert written[0] == "".join(opened().complete("Der Rabe", Generation(max_tokens=6, temperature=0, stop=("\n",))))
    assert isinstance(written[1], str)
