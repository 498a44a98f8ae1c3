"""A translation experiment small enough to train in a test."""

from __future__ import annotations

from dataclasses import replace

from transformer_jax.config import ComputeConfig, DecodeConfig, Experiment, OptimConfig, ScheduleConfig, TrainConfig
from transformer_jax.data.translation import ParallelText
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.objectives import Seq2Seq

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ZAHLEN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]


def write_pairs(path, rows=160):
    """Write a TSV of numbers spelled out digit by digit in English and German."""
    lines = []
    for i in range(rows):
        digits = [int(d) for d in str(i * 7919 % 100_000)]
        lines.append(f"{' '.join(NUMBERS[d] for d in digits)}\t{' '.join(ZAHLEN[d] for d in digits)}\tpage {i // 4}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny(dataset="pairs.tsv", **train) -> Experiment:
    """Pairwise different sizes that 2 divides, for the mesh."""
    return Experiment(
        name="tiny",
        model=TransformerConfig(
            vocab_size=306, width=24, heads=6, feedforward=40, encoder_layers=2, decoder_layers=3, dropout=0.1
        ),
        objective=Seq2Seq(smoothing=0.1),
        data=ParallelText(
            dataset=str(dataset), source="en", target="de", max_length=32, batch_tokens=512, bucket_lengths=(16, 32)
        ),
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-3, warmup=4), clip_norm=1.0, weight_decay=0.01),
        train=TrainConfig(**{"steps": 12, "log_every": 1, "eval_every": 4, "save_every": 4} | train),
        decode=DecodeConfig(beam=2, extra_length=5),
        compute=ComputeConfig(layers="unrolled"),
    )


def small(dataset="pairs.tsv", **train) -> Experiment:
    """The same with fewer layers and one length of rows: a third to compile, for tests that start many processes."""
    experiment = tiny(dataset, **train)
    return replace(
        experiment,
        model=replace(experiment.model, encoder_layers=1, decoder_layers=2),
        data=replace(experiment.data, bucket_lengths=(32,)),
    )


def deterministic(experiment: Experiment) -> Experiment:
    """The same without dropout, for laws that compare different ways to the same numbers."""
    return replace(experiment, model=replace(experiment.model, dropout=0.0))
