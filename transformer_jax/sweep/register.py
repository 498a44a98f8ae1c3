"""A loss predicted on record before its run is trained, and compared afterwards.

The record is a file that is never written twice. It names the table it was made from and the experiment it is about by
their hashes, says when it was made, and carries a hash of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.checkpoint import steps_of
from transformer_jax.config import Experiment, differences, read_experiment
from transformer_jax.data.cache import fingerprint
from transformer_jax.errors import UserError
from transformer_jax.logs import read_metrics
from transformer_jax.provenance import provenance
from transformer_jax.scaling.approaches import Estimate, Settings, estimate
from transformer_jax.scaling.bootstrap import interval
from transformer_jax.scaling.decide import scatter
from transformer_jax.scaling.laws import predict
from transformer_jax.scaling.study import plain
from transformer_jax.scaling.table import TableOptions, read_table
from transformer_jax.sweep.counts import counts


def register(
    table: Path, options: TableOptions, settings: Settings, experiment: Experiment, runs: Sequence[Path], record: Path
) -> dict[str, Any]:
    """Predict the loss of an experiment by approach 3, and put it on record.

    Args:
        table: of the runs that are known.
        options: its columns.
        settings: of the fit.
        experiment: what will be trained.
        runs: folders that it will be trained in.
        record: file to write.

    Raises:
        UserError: there is a record already, one of `runs` has begun, or the table does not support approach 3.
    """
    if record.exists():
        raise UserError(f"{record} exists: a prediction is registered once. Name another --out for another.")
    for run in runs:
        if (run / "experiment.json").exists() or steps_of(run):
            saved = max(steps_of(run), default=0)
            raise UserError(
                f"{run} has begun (saved up to step {saved}): a prediction comes before its run (--trained names it)."
            )
    experiment.check()
    known = read_table(table, options)
    found, size = estimate("A3", known, settings), counts(experiment)
    largest = float(known.runs.C.max())
    content = plain(
        {
            "experiment": experiment.name,
            "config": fingerprint(experiment.to_json()),
            "N": size.N,
            "D": size.D,
            "C": size.six_nd,
            "C_exact": size.exact,
            "times_the_largest_run_known": size.six_nd / largest,
            "table": {"path": str(table), "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
            | {"rows": len(known.runs), "largest_C": largest},
            "law": found.values,
            "loss": _loss(found, size.N, size.D),
            "provenance": provenance(),
            "settings": json.loads(experiment.to_json()),
        }
    )
    content["sha256"] = _digest(content)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _loss(found: Estimate, N: int, D: int) -> dict[str, Any]:
    """Return the loss at (N, D), with the 95 % intervals of the law by run and size, and of one new run."""
    assert found.fit is not None
    law, at = found.fit.law, (np.array([float(N)]), np.array([float(D)]))
    samples = {kind: np.exp(predict(law, theta, *at))[:, 0] for kind, theta in found.thetas.items()}
    noise = np.exp(scatter(found.fit, len(samples["run"])))
    value = float(np.exp(predict(law, found.fit.theta[None], *at))[0, 0])
    return {
        "value": value,
        "run": interval(samples["run"]),
        "size": interval(samples["size"]),
        "new_run": interval(samples["run"] * noise),
    }


def _digest(content: dict[str, Any]) -> str:
    body = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def compare(record: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """Compare what was registered with the runs that it was about; they may differ in their seed.

    Returns:
        The prediction, and for each run its "loss", "error" (relative) and whether it lies "inside" the interval of one
        new run. Runs that have not ended are left out.

    Raises:
        UserError: the record was changed, or a folder holds another experiment.
    """
    content = json.loads(record.read_text(encoding="utf-8"))
    if content.get("sha256") != _digest(content):
        raise UserError(f"{record} was changed after it was written: its hash is another.")
    registered = Experiment.from_json(json.dumps(content["settings"]), where=str(record))
    outcomes = [outcome for run in runs if (outcome := _outcome(content, registered, run))]
    return content | {"outcomes": outcomes}


def _outcome(content: dict[str, Any], registered: Experiment, run: Path) -> dict[str, Any] | None:
    if not (run / "experiment.json").is_file():
        return None
    trained = read_experiment(run / "experiment.json")
    same_seed = replace(trained, train=replace(trained.train, seed=registered.train.seed), name=registered.name)
    if changed := differences(registered, same_seed):
        raise UserError(f"{run} is not what {content['experiment']} was registered as: {'; '.join(changed)}.")
    done = [r for r in read_metrics(run) if r["split"] == "validation" and r["step"] == trained.train.steps]
    if not done:
        return None
    loss, predicted = done[-1]["nll"], content["loss"]
    inside = None if predicted["new_run"] is None else predicted["new_run"][0] <= loss <= predicted["new_run"][1]
    return {
        "run": str(run),
        "seed": trained.train.seed,
        "loss": loss,
        "error": loss / predicted["value"] - 1,
        "inside": inside,
    }
