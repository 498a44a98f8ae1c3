"""Laws of the runs table: every format reads the same, and every row that does not count is named with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from transformer_jax.errors import UserError
from transformer_jax.scaling.files import number
from transformer_jax.scaling.groups import within
from transformer_jax.scaling.runs import Run, write_runs
from transformer_jax.scaling.table import TableOptions, read_table

RUNS = [
    Run(run=f"r{i}", n=1e6 * 2**i, d=2e7 * (5 + i), c=6e6 * 2**i * 2e7 * (5 + i), loss=3.5 - 0.1 * i) for i in range(7)
]


@pytest.fixture
def table(tmp_path):
    """Write rows of text as CSV and read them."""

    def call(text: str, **options):
        path = tmp_path / "runs.csv"
        path.write_text(text)
        return read_table(path, TableOptions(**options))

    return call


def reasons(table):
    return {exclusion.reason: exclusion.lines for exclusion in table.excluded}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_reads_back_what_was_written(tmp_path, suffix):
    path = tmp_path / f"runs.{suffix}"
    rows = [
        *RUNS,
        replace(RUNS[0], run="x", seed=3, status="failed"),
        replace(RUNS[1], run="y", excluded="warm-up only"),
    ]
    write_runs(rows, path)
    table = read_table(path, TableOptions())
    for key in ("N", "D", "C", "loss"):
        written = [getattr(run, key if key == "loss" else key.lower()) for run in RUNS]
        np.testing.assert_array_equal(getattr(table.runs, key), written)
    assert [len(e.lines) for e in table.excluded] == [1, 1]
    assert reasons(table).keys() == {"status: failed", "excluded: warm-up only"}
    assert [row.run for row in table.rows] == [run.run for run in rows]
    # What was excluded stays so when the verdicts are read again.
    write_runs(table.rows, path)
    assert len(read_table(path, TableOptions()).runs) == len(RUNS)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1.3B", 1.3e9),
        ("70M", 7e7),
        ("1e9", 1e9),
        ("2_048", 2048),
        ("1,024", 1024),
        ("1,234,567.5", 1234567.5),
        (" 5.5 k", 5500),
        (7, 7),
        (".5", 0.5),
    ],
)
def test_numbers_as_people_write_them(cell, value):
    assert number(cell) == value


# "3,21" is a loss with a decimal comma, not 321.
@pytest.mark.parametrize("cell", ["", "nan", "OOM", None, "1.2.3", "B", "3,21", "1,23,456", "12%"])
def test_what_is_no_number(cell):
    assert np.isnan(number(cell))


def test_columns_are_mapped_and_the_missing_quantity_derived(table):
    found = table("Model Size,FLOP,L\n1e6,6e14,3\n2e6,6e14,2.9\n", n="Model Size", c="FLOP", loss="L")
    np.testing.assert_allclose(found.runs.D, [1e8, 5e7])
    assert any("D = C / (6N)" in note for note in found.notes)
    found = table("D,C,loss\n1e8,6e14,3\n5e7,6e14,2.9\n")
    np.testing.assert_allclose(found.runs.N, [1e6, 2e6])
    found = table("N,D,loss\n1e6,1e8,3\n2e6,5e7,2.9\n")  # the default names, in any case
    np.testing.assert_allclose(found.runs.C, 6e14)
    found = table("size,tokens (B),loss\n1M,0.1,3\n2M,.05,2.9\n", n="size", d="tokens (B)*1e9")
    np.testing.assert_allclose(found.runs.C, 6e14)


def test_rows_that_do_not_count_are_named_with_their_lines(table):
    rows = ["n,d,c,loss,set"]
    rows += [f"{n},{d},{6 * n * d},{3 + d / 1e9},C4" for n in (10**6, 10**7) for d in (10**8, 2 * 10**8)]
    rows += ["1e6,3e8,1.8e15,nan,C4", "1e6,4e8,2.4e15,inf,C4", "1e6,-1,1e15,3,C4"]  # lines 6 to 8
    rows += [rows[1], "1e6,5e8,3e16,3,C4", "1e6,5e8,3e15,9,C4", "1e6,6e8,3.6e15,3,Pile"]  # 9 to 12
    found = table("\n".join(rows), drop_highest_loss=1, where=("set=C4",))
    assert reasons(found) == {
        "not set=C4 (--where)": [12],
        "'loss' is no positive finite number": [6, 7],
        "'d' is no positive finite number": [8],
        "C differs from 6ND by more than a factor of 2 (--flops-factor)": [10],
        "duplicate of an earlier row": [9],
        "among the 1 highest losses (--drop-highest-loss)": [11],
    }
    assert len(found.runs) == 4
    assert sum(len(lines) for lines in reasons(found).values()) + len(found.runs) == len(found.rows)
    assert [row.excluded is None for row in found.rows].count(True) == 4


def test_a_run_is_its_last_row_and_one_that_diverges_is_none(table):
    rows = ["a,1e6,1e7,4", "a,1e6,3e7,3", "a,1e6,2e7,3.4", "b,2e6,1e7,3.9", "b,2e6,2e7,nan", "c,3e6,1e7,3.8"]
    text = "\n".join(["run,n,d,loss", *rows, "c,3e6,1e7,3.7"])
    found = table(text)
    assert found.runs.loss.tolist() == [3, 3.8]
    assert len(found.curves) == 4
    assert reasons(found) == {
        "'loss' is no positive finite number": [6],
        "same run and D but another loss than an earlier row": [8],
        "its run ends without a finite loss": [5],
    }
    assert table(text, every_row=True).runs.loss.tolist() == [4, 3, 3.4, 3.8]


def test_a_mixture_of_losses_is_noticed(table):
    text = "n,d,loss,of\n1e6,1e8,3,c4\n1e6,1e8,4,pile\n2e6,1e8,2.90,c4\n2e6,1e8,2.91,c4\n"
    assert any("1 rows have the N and D of an earlier one" in note for note in table(text).notes)
    assert not any("earlier one" in note for note in table(text, where=("of=c4",)).notes)


def test_other_counts_of_the_parameters_follow_the_rows(table):
    found = table("n,body,d,loss\n3e6,1e6,1e8,3\n4e6,2e6,1e8,nan\n5e6,3e6,1e8,2.8\n", also_n=("body",))
    assert found.also_N["body"].tolist() == [1e6, 3e6]


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("n,d,loss\n1,2,3\n", {"loss": "los"}, ["no column 'los' (--loss)", "Did you mean 'loss'?"]),
        ("params,d,loss\n1,2,3\n", {}, ["no column 'n'", "(--n)", "params, d, loss"]),
        ("n,loss\n1,3\n", {}, ["--d", "--c"]),
        ("n,d,loss\n1,2,x\n", {}, ["'loss' holds no positive number (line 2: 'x')"]),
        ("n,d,loss\n1,2\n", {}, ["runs.csv:2: 2 cells, but the header has 3"]),
        ("n,d,d,loss\n1,2,2,3\n", {}, ["two columns are called 'd'"]),
        ("n,d,loss\n", {}, ["has no rows"]),
        ("n,d,c,loss\n1e6,1,6e15,3\n1e6,2,12e15,3\n", {}, ["1e+09 times 6ND", "--d 'COLUMN*1e9'"]),
        ("n,d,loss,set\n1,2,3,a_b\n", {"where": ("set=a-b",)}, ["keeps no row", "Did you mean 'a_b'?"]),
        ("n,d,loss,set\n1,2,3,a\n", {"where": ("set",)}, ["write COLUMN=VALUE"]),
        ("run,n,d,loss\na,1e6,2,3\na,2e6,3,3\n", {}, ["runs.csv:3: run 'a' has several sizes"]),
        ("n,d,loss\n1,2,3\n", {"drop_highest_loss": 1}, ["no row is left", "1, among the 1 highest"]),
        ("n,d,loss\n1,2,3\n", {"flops_factor": 1.0, "c": "n"}, ["--flops-factor must be above 1"]),
    ],
)
def test_bad_tables_get_one_clear_line(table, text, options, parts):
    with pytest.raises(UserError) as error:
        table(text, **options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("runs.xlsx", b"", "cannot tell the format"),
        ("runs.jsonl", b'{"n": 1}\n{"n": \n', "runs.jsonl:2: not JSON"),
        ("runs.jsonl", b"[1]\n", "runs.jsonl:1: expected one object a line"),
        ("runs.parquet", b"no parquet", "cannot be read as Parquet"),
        ("runs.csv", b"n,d\xff\n1,2\n", "not UTF-8"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=part):
        read_table(tmp_path / name, TableOptions())
    with pytest.raises(UserError, match="there is no such file"):
        read_table(tmp_path / "none.csv", TableOptions())


def test_jsonl_with_missing_keys_is_read(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"n": 1, "d": 2, "loss": 3}, {"n": 1, "d": 4})))
    assert reasons(read_table(path, TableOptions())) == {"'loss' is no positive finite number": [2]}


def test_windows_have_no_chain_and_no_rounding():
    x = np.log([1.0, 1.01, 1.02, 2.0, 1.4, 2.02, 1.99, 9.0])
    assert within(x, np.log(1.05)).tolist() == [0, 0, 0, 2, 1, 2, 2, 3]
    chain = np.linspace(0, 1, 101)  # neighbours a hundredth apart: one chain, but no window is wider than a tenth
    group = within(chain, 0.1)
    assert max(np.ptp(chain[group == g]) for g in range(group.max() + 1)) <= 0.1 + 1e-9
    assert (np.diff(group) >= 0).all()


def test_a_column_may_be_a_product_or_a_logarithm(table):
    text = "P (M),steps,batch,ppl,a*b\n1,100,2K,20.5,1e6\n2,300,2K,15.5,2e6\n4,300,2K,12.5,4e6\n"
    read = table(text, n="P (M)*1e6", d="steps * batch", loss="log(ppl)", also_n=("a*b",))
    np.testing.assert_array_equal(read.runs.N, [1e6, 2e6, 4e6])
    np.testing.assert_array_equal(read.runs.D, [2e5, 6e5, 6e5])
    np.testing.assert_allclose(read.runs.loss, np.log([20.5, 15.5, 12.5]))
    np.testing.assert_array_equal(read.also_N["a*b"], read.runs.N)
    assert "loss is 'log(ppl)'" in read.notes
    assert any("looks like a perplexity" in note for note in table(text, n="a*b", d="steps", loss="ppl").notes)
    assert not any("perplexity" in note for note in read.notes)
    with pytest.raises(UserError, match="no column 'step'"):
        table(text, n="P (M)*1e6", d="step*batch", loss="ppl")
    with pytest.raises(UserError, match="--n '1e6': name a column"):
        table(text, n="1e6", d="steps", loss="ppl")
    assert reasons(table(text.replace("15.5", "0.5"), n="a*b", d="steps", loss="log(ppl)")) == {
        "'log(ppl)' is no positive finite number": [3]
    }


def test_semicolons_and_decimal_commas(table):
    read = table("\ufeff N ;D; loss\n1,5e6;2e8;3,25\n3000000;4e8;3,125\n6000000;4e8;3\n")
    np.testing.assert_array_equal(read.runs.N, [1.5e6, 3e6, 6e6])
    np.testing.assert_array_equal(read.runs.loss, [3.25, 3.125, 3])
