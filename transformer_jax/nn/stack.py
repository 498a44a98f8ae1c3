"""The one place where layers are repeated.

Two ways to run the same layers. Scanned: one stacked tree of parameters [L, ...] and `jax.lax.scan`, so that compile
time does not grow with depth. Unrolled: one tree per layer, which is faster on CPU and GPU (what a loop keeps for the
gradient is copied into stacks, written twice and read twice), and which decoding needs (one cache per layer).
Checkpoints always hold the stacked form; `stack_layers` and `unstack_layers` convert at that boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig
from transformer_jax.nn.layers import looped

MAX_UNROLLED = 24
"""Depth up to which compute.layers=auto unrolls, but on TPU."""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
    """`depth` equal blocks, each from `block(key)` and called as `block(x, *inputs, key=key) -> (x, extras)`.

    Layers may differ in `static`: keyword arguments known before tracing (the window of GPT-3's banded layers), one
    dictionary a layer, repeated in order until all have one. A scan then takes one repetition a turn.
    """

    def __init__(
        self,
        key: jax.Array,
        block: Callable[[jax.Array], nnx.Module],
        depth: int,
        compute: ComputeConfig,
        static: Sequence[dict[str, Any]] = ({},),
    ) -> None:
        keys = jax.random.split(key, depth)
        self.depth = depth
        self.static = (
            tuple(static) if depth % len(static) == 0 else tuple(static[i % len(static)] for i in range(depth))
        )
        self.remat = compute.remat
        self.scanned = compute.layers == "scan" or (
            compute.layers == "auto" and (jax.default_backend() == "tpu" or depth > MAX_UNROLLED)
        )
        self.layers: Any
        if self.scanned:
            self.layers = jax.vmap(block)(keys)
            for _, node in nnx.iter_graph(self.layers):
                if isinstance(node, nnx.Param):
                    node.set_metadata(letters="L" + node.get_metadata("letters"))
        else:
            self.layers = nnx.List([block(k) for k in keys])

    def __call__(self, x: jax.Array, *inputs: Any, key: jax.Array | None = None) -> jax.Array:
        """Run x through all blocks; the same `inputs` go to each, and a key of its own."""
        return self.routed(x, *inputs, key=key)[0]

    def routed(self, x: jax.Array, *inputs: Any, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Do the same, and return what each layer sums of its routing, [L, ...]; None of layers without experts."""

        def runs(static: dict[str, Any]) -> Any:
            def run(block: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
                x, extras = block(x, *inputs, key=key, **static)
                return x, extras.get("routing")

            if self.remat == "none":
                return run
            return jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scanned)

        kinds = [runs(static) for static in self.static]
        turn = len(kinds)
        keys = None if key is None else jax.random.split(key, self.depth)
        if not self.scanned:
            told = []
            for i, block in enumerate(self.layers):
                x, routing = kinds[i % turn](block, x, None if keys is None else keys[i])
                told.append(routing)
            return x, _joined(told)
        layers = (self.layers, keys)
        if turn == 1:
            with looped():
                return jax.lax.scan(lambda x, layer: kinds[0](layer[0], x, layer[1]), x, layers)

        def advance(x: jax.Array, group: Any) -> tuple[jax.Array, jax.Array | None]:
            told = []
            for i, run in enumerate(kinds):
                block, layer_key = jax.tree.map(lambda leaf, i=i: leaf[i], group)
                x, routing = run(block, x, layer_key)
                told.append(routing)
            return x, _joined(told)

        grouped = jax.tree.map(lambda leaf: leaf.reshape(self.depth // turn, turn, *leaf.shape[1:]), layers)
        with looped():
            x, routing = jax.lax.scan(advance, x, grouped)
        return x, None if routing is None else routing.reshape(self.depth, *routing.shape[2:])


def _joined(told: Sequence[jax.Array | None]) -> jax.Array | None:
    """Join what layers tell; None where they tell nothing."""
    return jnp.stack([routing for routing in told if routing is not None]) if told[0] is not None else None


def _is_unrolled(node: Any) -> bool:
    """Recognise the parameters (or moments) of an unrolled `Stack`: {"layers": {0: layer, 1: layer, ...}}."""
    if not isinstance(node, dict) or node.keys() != {"layers"}:
        return False
    return node["layers"].keys() == set(range(len(node["layers"])))


def stack_layers(tree: Any, combine: Callable[[list[Any]], Any] = jnp.stack) -> Any:
    """Turn the separate layers of every unrolled `Stack` in a tree into one layer of leaves combined over L."""

    def convert(node: Any) -> Any:
        if not _is_unrolled(node):
            return node
        layers = node["layers"]
        stacked = jax.tree.map(lambda *leaves: combine(list(leaves)), *(layers[i] for i in range(len(layers))))
        return {"layers": stacked}

    return jax.tree.map(convert, tree, is_leaf=_is_unrolled)


def unstack_layers(tree: Any, like: Any) -> Any:
    """Undo `stack_layers` wherever `like` holds one tree per layer."""

    def convert(target: Any, node: Any) -> Any:
        if not _is_unrolled(target):
            return node
        return {"layers": {i: jax.tree.map(lambda leaf, i=i: leaf[i], node["layers"]) for i in target["layers"]}}

    return jax.tree.map(convert, like, tree, is_leaf=_is_unrolled)
