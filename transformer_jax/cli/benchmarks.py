"""bench: how fast a training step is."""

from __future__ import annotations

from dataclasses import dataclass

from transformer_jax.bench import bench_train
from transformer_jax.cli.verb import Tree, Verb, experiment_of, out
from transformer_jax.logs import print_json


@dataclass(frozen=True)
class BenchOptions:
    """Time the training step of an experiment on random tokens, beside the rate of a matrix product."""

    experiment: Tree
    rows: int = 32
    """Pairs of a batch."""
    length: int = 64
    """Tokens on each side of a pair."""
    steps: int = 20
    """Steps timed, after three that are not."""
    json: bool = False
    """Print one JSON object."""


def _bench(_: str, options: BenchOptions) -> int:
    result = bench_train(options.experiment, options.rows, options.length, options.steps)
    if options.json:
        print_json(result)
        return 0
    step, console = result["step_seconds"], out()
    console.print(f"{result['experiment']}, {options.rows} pairs of {options.length} tokens a side")
    console.print(f"first step   {result['first_step_seconds']:.1f} s, compiling included")
    bounds = f"{step['low'] * 1e3:.1f} to {step['high'] * 1e3:.1f}"
    console.print(f"step         {step['median'] * 1e3:.1f} ms (median of {step['samples']}; 95 % {bounds})")
    console.print(f"speed        {result['tokens_per_second']:,.0f} target tokens/s")
    console.print(
        f"work         {result['model_flops_per_second'] / 1e9:,.1f} GFLOP/s of the model, "
        f"{result['share_of_matmul_rate']:.0%} of the {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s that a "
        "matrix product reached in this run"
    )
    return 0


VERBS = {
    "bench": Verb(
        "RECIPE",
        "time the training step, beside the rate of a matrix product",
        BenchOptions,
        lambda target: BenchOptions(experiment_of(target)),
        _bench,
    ),
}
