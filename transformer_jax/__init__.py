"""transformer_jax: every Transformer from sequence-to-sequence models onwards, in JAX.

Everything is a verb on an experiment: `train(experiment)`, `evaluate(run)`, `translate(run, sentences)`, as
functions here and as `tjax train ...` on the command line.
"""

from __future__ import annotations

from transformer_jax import data, models, objectives
from transformer_jax.compare import compare
from transformer_jax.completion import Completer
from transformer_jax.config import Experiment
from transformer_jax.curves import against
from transformer_jax.errors import UserError
from transformer_jax.generation import Generation
from transformer_jax.interop import convert
from transformer_jax.reading import Reader
from transformer_jax.translate import Translator
from transformer_jax.trials import trials
from transformer_jax.verbs import attention, evaluate, list_recipes, show, train, translate

__all__ = [
    "Completer",
    "Experiment",
    "Generation",
    "Reader",
    "Translator",
    "UserError",
    "against",
    "attention",
    "compare",
    "convert",
    "data",
    "evaluate",
    "list_recipes",
    "models",
    "objectives",
    "show",
    "train",
    "translate",
    "trials",
]
