"""The accelerator's benchmark runs in miniature, every row of it, and writes one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from experiments.bench_accelerator import Options, main, rows
from transformer_jax.errors import UserError


def test_rows_are_the_published_sizes():
    for row in rows():
        row.experiment.check()
        assert row.experiment.compute.dtype == "bfloat16"
        assert len(row.bars) == len(row.aims) in (1, len(row.request.batch))


@pytest.mark.slow
def test_each_kind_of_row_in_miniature(tmp_path):
    kinds = ["gpt2_124m", "bert_large_128", "transformer_big", "decode_gpt2_1558m", "compile_12_to_96"]
    command = [
        sys.executable,
        "-m",
        "experiments.bench_accelerator",
        "--small",
        "--out",
        str(tmp_path),
        "--rows",
        *kinds,
    ]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    results = json.loads((tmp_path / "bench_cpu_small.json").read_text())
    assert sorted(results) == sorted(kinds)
    assert not [result for result in results.values() if "failed" in result]
    assert all({"command", "device", "versions"} <= result["provenance"].keys() for result in results.values())
    assert all(f"| {kind} |" in done.stdout for kind in kinds)


def test_what_there_is_no_time_for_is_said(tmp_path, capsys):
    results = json.loads(main(Options(minutes=-1, out=tmp_path, small=True)).read_text())
    assert all("not begun" in result["failed"] for result in results.values())
    assert "not begun" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--rows: choose among gpt2_124m"):
        main(Options(rows=("gpt3",), out=tmp_path))
