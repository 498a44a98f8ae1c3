"""The accelerator's benchmark runs in miniature, every row of it, and writes one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import jax
import pytest

from experiments import bench_accelerator
from experiments.bench_accelerator import Options, main, rows
from tests.test_bench_peers import PYTHON
from transformer_jax.errors import UserError


def test_rows_are_the_published_sizes():
    for row in rows():
        row.experiment.check()
        assert row.experiment.compute.dtype == "bfloat16"
        assert len(row.bars) == len(row.aims) in (0, 1, len(row.request.batch))


def test_rows_of_the_table_are_all_there():
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) == len(rows(small=True))
    works = ["gpt2_124m", "gpt2_355m", "gpt2_1558m", "bert_large_128", "bert_large_512", "transformer_big"]
    assert {*works, *(f"peers_{work}" for work in works)} <= set(names)
    assert {"decode_gpt2_1558m", "peers_decode_gpt2_1558m", "compile_12_to_96", "context_to_128k"} <= set(names)


@pytest.mark.slow
def test_each_kind_of_row_in_miniature(tmp_path):
    kinds = ["gpt2_124m", "bert_large_128", "transformer_big", "decode_int8_gpt2_1558m", "compile_12_to_96"]
    kinds.append("context_to_128k")
    peers = ["peers_gpt2_124m", "peers_decode_gpt2_1558m"]
    command = [
        sys.executable,
        "-m",
        "experiments.bench_accelerator",
        "--small",
        "--minutes",
        "60",
        "--out",
        str(tmp_path),
        "--rows",
        *kinds,
        *peers,
        "--python",
        PYTHON,
    ]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    results = json.loads((tmp_path / "bench_cpu_small.json").read_text())
    assert sorted(results) == sorted(kinds + peers)
    failed = {name: result["points"][0]["failed"] for name, result in results.items() if "provenance" not in result}
    assert list(failed) in ([], peers)
    assert all("the peers need torch" in why for why in failed.values())
    done_rows = [result for result in results.values() if "provenance" in result]
    assert all({"command", "device", "versions"} <= result["provenance"].keys() for result in done_rows)
    assert not [point for result in done_rows for point in result["points"] if isinstance(point.get("failed"), str)]
    assert all(f"| {name} |" in done.stdout for name in results)


def test_what_there_is_no_time_for_is_said_and_what_was_measured_stays(tmp_path, capsys, monkeypatch):
    clock, kept = [0.0], {"gpt2_124m": {"points": [{"rows": 1, "length": 2, "tokens_per_second": 3}], "provenance": {}}}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    (tmp_path / "bench_cpu_small.json").write_text(json.dumps(kept))

    def run(row, piece, _):
        clock[0] += 100
        if row.name == "bert_large_128":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")
        return {"points": [{"rows": piece.batch[0], "length": 7} | dict.fromkeys(FIGURES, 0.5)], "provenance": {}}

    monkeypatch.setattr(bench_accelerator, "_run", run)
    chosen = ("gpt2_124m", "bert_large_128", "decode_gpt2_1558m", "transformer_big")
    results = json.loads(main(Options(minutes=6, out=tmp_path, small=True, rows=chosen)).read_text())
    said = {name: [point.get("failed", "") for point in result["points"]] for name, result in results.items()}
    over = "not begun: 6 minutes would be over"
    # Three points of 100 s fit into 6 minutes; of a row of several, each is a point.
    assert said == {
        "gpt2_124m": [""],
        "bert_large_128": ["INTERNAL: no such kernel"],
        "transformer_big": [""],
        "decode_gpt2_1558m": [over, over],
    }
    assert results["gpt2_124m"]["points"][0]["length"] == 7
    assert over in capsys.readouterr().out
    again = json.loads(main(Options(minutes=-1, out=tmp_path, small=True, rows=chosen)).read_text())
    assert all(again[name] == results[name] for name in ("gpt2_124m", "transformer_big"))
    with pytest.raises(UserError, match=r"--rows: choose among gpt2_124m"):
        main(Options(rows=("gpt3",), out=tmp_path))


FIGURES = ("tokens_per_second", "share_of_floor", "share_of_matmul_rate")
