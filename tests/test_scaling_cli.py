"""`tjax fit` and `tjax next` as a newcomer meets them, and Kaplan's exponent from Chinchilla's law."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from experiments.kaplan_from_chinchilla import SIZES, best_of, results, total
from experiments.kaplan_from_chinchilla import SURFACES as PUBLISHED
from experiments.kaplan_from_chinchilla import main as kaplan
from tests.surface import SURFACES, iso_flops, noisy, write_csv
from transformer_jax.cli import main
from transformer_jax.scaling.laws import frontier

pytestmark = pytest.mark.optimised  # fits by the hundred

LAW, THETA = SURFACES["A3"]
FAST = ("--bootstraps", "60")


@pytest.fixture
def tjax(capsys, monkeypatch, tmp_path):
    """Run a command line in a folder of its own; returns exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def points(tmp_path):
    runs = noisy(iso_flops(LAW, THETA, first=1e11, budgets=5, sizes=7), 0.004, 0)
    path = tmp_path / "points.csv"
    write_csv(runs, path, "Model Size,Tokens,Training FLOP,loss")
    with path.open("a") as file:
        file.write("1e6,1e8,6e14,50\n2e6,1e8,1.2e15,nan\n")  # an outlier, and a run that diverged
    return path


COLUMNS = ("--n", "Model Size", "--c", "Training FLOP", "--loss", "loss", "--drop-highest-loss", "1")


@pytest.mark.slow
def test_fit_end_to_end(tjax, points, tmp_path):
    code, out, err = tjax("fit", points, *COLUMNS, *FAST, "--json", "--budgets", "1e15", "--scipy-starts", "3")
    assert code == 0, err
    figures = json.loads(out)
    a3, truth = figures["approaches"]["A3"], float(frontier(LAW, THETA).a)
    assert a3["a"] == pytest.approx(truth, abs=0.05)
    assert a3["intervals"]["run"]["a"][0] < truth < a3["intervals"]["run"]["a"][1]
    assert figures["approaches"].keys() == {"A2", "A3", "kaplan", "over-training"}
    assert "A1 needs training curves" in figures["missing"]["A1"]
    assert {e["reason"].split()[0]: e["rows"] for e in figures["table"]["excluded"]} == {"'loss'": 1, "among": 1}
    assert "left out 1 of 37 rows: 'loss' is no positive finite number (lines 38)" in err
    assert figures["decisions"][0]["A3"]["loss"]["new_run"]
    assert figures["diagnostics"]["leave_largest_out"].keys() == {"C", "N"}
    assert figures["scipy"]["extrapolated"]
    assert figures["provenance"]["command"]
    # The report holds what it says, in one file; the table of runs has a verdict for every row.
    folder = tmp_path / "runs" / "fit-points"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert 'src="http' not in page
    for words in ("## Exponents", "## Decisions", "## IsoFLOP", "## Diagnostics", "## Rows left out", "## Provenance"):
        assert words in (folder / "report.md").read_text()
    assert json.loads((folder / "fit.json").read_text())["approaches"]["A3"]["a"] == a3["a"]
    # Fitted again from its own table of runs, it says the same.
    code, out, _ = tjax("fit", folder / "runs.csv", *FAST, "--json", "--approaches", "A3", "--out", "again")
    assert json.loads(out)["approaches"]["A3"]["a"] == pytest.approx(a3["a"], rel=1e-9)


@pytest.mark.slow
def test_fit_prints_a_table_and_next_a_ranking(tjax, points):
    code, out, err = tjax("fit", points, *COLUMNS, *FAST, "--approaches", "A2", "over-training")
    assert code == 0, err
    assert re.search(r"^A2 +0\.\d{3} ", out, re.M)
    assert "lambda_a" in out
    assert "report: runs/fit-points/report.html" in err
    code, out, err = tjax("next", points, *COLUMNS, *FAST, "--budget", "1e14", "--width", "0.02", "--show", "3")
    assert code == 0, err
    assert out.count("%") >= 3
    assert "cheapest grid" in out
    code, out, _ = tjax("next", points, *COLUMNS, *FAST, "--budget", "1e14", "--json", "--target", "loss")
    ranking = json.loads(out)["ranking"]
    assert ranking[0]["width"] == min(run["width"] for run in ranking)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("fit", "none.csv"), ["none.csv: there is no such file"]),
        (("fit", "points.csv"), ["no column 'n'", "Model Size"]),
        (("fit", "points.csv", "--n", "Model Sise"), ["no column 'Model Sise' (--n)", "Did you mean 'Model Size'?"]),
        (("fit", "points.csv", *COLUMNS, "--approaches", "A1"), ["A1 needs training curves", "--run"]),
        (("fit", "points.csv", *COLUMNS, "--where", "loss=50"), ["no row is left"]),
        (("fit", "points.csv", *COLUMNS, "--detla", "1"), ["--detla", "Did you mean '--delta'?"]),
        (("fit", "points.csv", *COLUMNS, "--bootstraps", "2"), ["--bootstraps must be at least 20"]),
        (("fit", "points.csv", *COLUMNS, "--budgets", "-1"), ["--budgets must be positive"]),
        (("fit", "few.csv", "--approaches", "A3"), ["A3 has 5 parameters and needs 6 runs: there are 3, so 3 more"]),
        (("fit", "few.csv"), ["A3 has 5 parameters and needs 6 runs: there are 3, so 3 more"]),
        (("fit", "one.csv", "--approaches", "A3"), ["A3 needs 3 different model sizes N: there is 1 only"]),
        (("next", "points.csv", *COLUMNS), ["--budget must be positive"]),
        (("next", "points.csv", *COLUMNS, "--budget", "1"), ["buys no run near the table"]),
        (("next", "few.csv", "--budget", "1e12"), ["so 3 more"]),
    ],
)
def test_bad_input_ends_with_one_line(tjax, points, argv, parts):
    runs = iso_flops(LAW, THETA, first=1e11)
    write_csv(runs.take(np.arange(3)), points.with_name("few.csv"))
    D = np.geomspace(1e6, 1e8, 9)
    one = ["n,d,loss", *(f"1e6,{d},{2 + 1e3 / d**0.5}" for d in D)]
    points.with_name("one.csv").write_text("\n".join(one))
    code, out, err = tjax(*argv, *(() if "--bootstraps" in argv else FAST))
    assert code == 2, err
    assert out == ""
    assert err.splitlines()[-1].startswith("tjax: ")
    for part in parts:
        assert part in err.splitlines()[-1], err
    assert not points.with_name("runs").exists()


def test_kaplans_exponent_comes_out_of_chinchillas_law(tmp_path):
    """Pearce and Song 2024: 0.78 with Besiroglu's law, 0.74 with Hoffmann's; Kaplan 2020: 0.73."""
    for name, published in (("Besiroglu 2024", 0.78), ("Hoffmann 2022", 0.74)):
        surface = PUBLISHED[name]
        found = results(surface)
        assert round(found["non-embedding, line over Kaplan's range"], 2) == published
        assert round(found["non-embedding, best of 20 models"], 2) == published
        true = surface.beta / (surface.alpha + surface.beta)
        assert found["all parameters, best of the same 20 models"] == pytest.approx(true, abs=0.005)
        # The closed form is where the loss is least, and far up the two counts agree.
        N = np.array([3e4, 3e7])
        C = surface.flops_at_best(N)
        fine = np.geomspace(1e4, 1e8, 40_001)
        np.testing.assert_allclose(best_of(surface, C, fine, fine), N, rtol=1e-3)
        assert surface.exponent(np.array([1e15]))[0] == pytest.approx(true, abs=1e-3)
    assert total(SIZES[:1])[0] > 100 * SIZES[0]  # nearly all embeddings
    kaplan(tmp_path)
    assert json.loads((tmp_path / "kaplan_from_chinchilla.json").read_text())["exponents"].keys() == PUBLISHED.keys()
    assert (tmp_path / "kaplan_from_chinchilla.png").stat().st_size > 10_000
