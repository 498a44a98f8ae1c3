"""FLOPs of a training step by the conventions in use, side by side, from configurations alone.

They differ by up to a factor of five at long contexts, so a figure always names its convention. `matmuls` is the one
that this library ranks by: it counts what has to be computed, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from transformer_jax.config import ComputeConfig, Experiment, ModelConfig
from transformer_jax.models import BertConfig, BertSeq2SeqConfig, GPTConfig, TransformerConfig
from transformer_jax.nn.module import Params, Skeleton, parameter_count

Shapes = Mapping[str, tuple[int, ...]]
"""Arrays of a batch by name."""

TABLES = ("VD", "TD", "ZD")
"""Letters of the tables that are looked up: tokens, positions, few kinds. A tied output matrix is one of them."""


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of one step: forward and backward, no recomputation."""

    matmuls: int
    """Three times the matrix products of the forward pass; attention halved where causal, the output layer counted."""
    six_n: int
    """6 x all parameters x tokens (Kaplan 2020, with the embeddings); of experts, those that a token takes."""
    six_n_non_embedding: int
    """6 x parameters outside the tables x tokens (Kaplan 2020, section 2.1)."""
    palm: int | None
    """(6N + 12 L N H T) x tokens, attention in full, N without positions (Chowdhery 2022, appendix B; nanoGPT).

    None for a family without one stack of attention layers, to which the formula does not apply.
    """
    tokens: int
    """Positions of the batch, padding included: of the target where there are two sides."""
    active: int
    """Parameters that a token meets: all, but of experts only those that it takes."""

    def named(self) -> dict[str, int | None]:
        """Return FLOPs by the name of the convention that people know."""
        return {
            "matmuls, causal attention halved": self.matmuls,
            "6N total": self.six_n,
            "6N non-embedding": self.six_n_non_embedding,
            "PaLM 6N + 12LNHT": self.palm,
        }


def flops(experiment: Experiment) -> Flops:
    """Count the FLOPs of one step of the experiment's largest batch."""
    shapes = {name: shape for name, (shape, _) in experiment.data.batch_shapes().items()}
    return count(experiment.model, shapes)


def count(model: ModelConfig, shapes: Shapes) -> Flops:
    """Count the FLOPs of one training step of a model on a batch of these shapes."""
    skeleton = Skeleton.of(model, replace(ComputeConfig(), layers="scan"))
    active = active_parameters(skeleton)
    tokens = tokens_of(shapes)
    return Flops(
        matmuls=3 * model.forward_flops(shapes),
        six_n=6 * active * tokens,
        six_n_non_embedding=6 * (active - _in_tables(skeleton.abstract, skeleton.letters, TABLES)) * tokens,
        palm=_palm(model, skeleton, tokens, shapes),
        tokens=tokens,
        active=active,
    )


def active_parameters(skeleton: Skeleton) -> int:
    """Count the parameters that a token meets: all, but of the experts only those that it takes."""
    total = parameter_count(skeleton.abstract)
    if isinstance(skeleton.config, GPTConfig) and (experts := skeleton.config.experts).count:
        leaves = zip(jax.tree.leaves(skeleton.abstract), jax.tree.leaves(skeleton.letters), strict=True)
        every = sum(leaf.size for leaf, names in leaves if names.removeprefix("L").startswith("E"))
        total -= every // experts.count * (experts.count - experts.chosen)
    return total


def tokens_of(shapes: Shapes) -> int:
    """Count the positions that a batch trains on: of "tokens" [B, T], or those that "target" [B, T + 1] predicts.

    Of P points, each an input and a value, "segments" [B, P].
    """
    if "target" in shapes:
        rows, length = shapes["target"]
        return rows * (length - 1)
    return math.prod(shapes["tokens"]) if "tokens" in shapes else 2 * math.prod(shapes["segments"])


def _palm(model: ModelConfig, skeleton: Skeleton, tokens: int, shapes: Shapes) -> int | None:
    match model:
        case BertSeq2SeqConfig():
            pairs = _pairs(model.layers, model.layers, shapes)
        case TransformerConfig():
            pairs = _pairs(model.encoder_layers, model.decoder_layers, shapes)
        case GPTConfig() | BertConfig():
            pairs = model.layers * shapes["tokens"][0] * shapes["tokens"][1] ** 2
        case _:
            return None
    parameters = active_parameters(skeleton) - _in_tables(skeleton.abstract, skeleton.letters, ("TD",))
    return 6 * parameters * tokens + 12 * model.block.heads * model.block.size * pairs


def _pairs(encoder_layers: int, decoder_layers: int, shapes: Shapes) -> int:
    """Count (query, key) in all layers: source with source, target with target and with source."""
    (rows, source), target = shapes["source"], shapes["target"][1] - 1
    return rows * (encoder_layers * source**2 + decoder_layers * target * (target + source))


def _in_tables(abstract: Params, letters: Params, tables: tuple[str, ...]) -> int:
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(letters), strict=True)
    return sum(leaf.size for leaf, names in leaves if names in tables)
