"""Where a Flax module and its parameters part and meet: the only place of `nnx.split` and `nnx.merge`.

Outside a forward pass, parameters are a plain dict and the module is a `Skeleton` without arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig

Params = dict[Any, Any]


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays: what they look like, how they are laid out, how to make and to use them."""

    config: ModelConfig
    compute: ComputeConfig
    graph: nnx.GraphDef[Any]
    abstract: Params
    """Tree of `jax.ShapeDtypeStruct`."""
    letters: Params
    """The same tree of letters ("DNH")."""

    @staticmethod
    def of(config: ModelConfig, compute: ComputeConfig) -> Skeleton:
        """Trace the constructor; takes no memory, even for 175B parameters.

        Raises:
            TypeError: a parameter has no letters, or not as many as its rank.
        """
        return Skeleton.describing(config, compute, jax.eval_shape(lambda: config.build(jax.random.key(0), compute)))

    @staticmethod
    def describing(config: ModelConfig, compute: ComputeConfig, model: nnx.Module) -> Skeleton:
        """Take a traced module apart; raises as `of`."""
        graph, state = nnx.split(model, nnx.Param)
        letters = {}
        for path, variable in nnx.to_flat_state(state):
            names = variable.get_metadata().get("letters")
            if names is None or len(names) != len(variable.shape):
                where = ".".join(map(str, path))
                raise TypeError(f"parameter {where} of shape {variable.shape} declares the letters {names!r}")
            letters[path] = names
        abstract = nnx.to_pure_dict(state)
        paths = [tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
        named = jax.tree.unflatten(jax.tree.structure(abstract), [letters[path] for path in paths])
        return Skeleton(config, compute, graph, abstract, named)

    def init(self, key: jax.Array) -> Params:
        """Draw fresh parameters."""
        return nnx.to_pure_dict(nnx.split(self.config.build(key, self.compute), nnx.Param)[1])

    def bind(self, params: Params) -> Any:
        """Return the module with these parameters, ready to be called."""
        return nnx.merge(self.graph, params)


def parameter_count(tree: Params) -> int:
    """Count the elements of a tree of arrays, abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
