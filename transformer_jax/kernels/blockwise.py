"""Attention block by block, so that memory grows with T and not with T S, on one device or around a ring of them.

The softmax is taken on the way (Milakov 2018), weights are formed again for the gradient (Rabe 2021; Dao 2022), and
blocks in which nobody sees anybody are left out. With the positions of a row divided over devices, keys and values
travel around while queries stay (ring attention, Liu 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.kernels.mask import Mask

BLOCK = 512
"""Queries, and keys, of a block at most."""

UNSEEN = -1e30


@dataclass(frozen=True)
class Ring:
    """The mesh axis over which positions are divided."""

    axis: str
    size: int

    def pass_on(self, tree: Any) -> Any:
        """Give what is at hand to the next device, and take that of the one before."""
        steps = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, steps), tree)


class Queries(NamedTuple):
    """Blocks of queries, scaled: [I, B, T, K, G, H], and what the mask says of them [I, B, T]."""

    q: jax.Array
    segments: jax.Array | None
    positions: jax.Array


class Keys(NamedTuple):
    """Blocks of keys and values [J, B, S, K, H], and what the mask says of them [J, B, S]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    positions: jax.Array


@dataclass(frozen=True)
class Rules:
    """What is known before tracing."""

    causal: bool
    window: int
    dropout: float
    ring: Ring | None

    def visible(self, queries: Queries, keys: Keys) -> jax.Array:
        """Return who sees whom in one block of each: booleans that broadcast to [B, T, S]."""
        mask = Mask(keys.segments, queries.segments, queries.positions, keys.positions, self.causal, self.window)
        visible = mask.visible(queries.q.shape[1], keys.k.shape[1])
        assert visible is not None  # positions are given
        return visible

    def kept(self, queries: Queries, keys: Keys, bits: jax.Array | None, like: jax.Array) -> jax.Array | None:
        """Return by what dropout multiplies the weights of one block, from the places of its first query and key."""
        if bits is None or not self.dropout:
            return None
        key = jax.random.wrap_key_data(bits)
        for positions in (queries.positions, keys.positions):
            key = jax.random.fold_in(key, positions[0, 0])
        return jax.random.bernoulli(key, 1.0 - self.dropout, like.shape) / (1.0 - self.dropout)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    dropout: float,
    key: jax.Array | None,
    ring: Ring | None = None,
) -> jax.Array:
    """Attend with memory in T + S: the output [B, T, N, H]; what sees nothing gets zeros.

    With a ring, this runs on each of its devices (`jax.shard_map`) with its share of T and of S; the positions of the
    mask are then those in the whole row.
    """
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    mask = mask.placed(t, s)
    assert mask.q_positions_BT is not None
    assert mask.kv_positions_BS is not None
    rules = Rules(mask.causal, mask.window, dropout, ring)
    queries = Queries((q_BTNH * h**-0.5).reshape(b, t, k, n // k, h), mask.q_segments_BT, mask.q_positions_BT)
    keys = Keys(k_BSKH, v_BSKH, mask.kv_segments_BS, mask.kv_positions_BS)
    bits = None if key is None else jax.random.key_data(key)
    out_IBTKGH = _attend(rules, _cut(queries, ring), _cut(keys, ring), bits)
    return out_IBTKGH.swapaxes(0, 1).reshape(b, -1, n, v_BSKH.shape[-1])[:, :t]


def _cut(tree: Any, ring: Ring | None) -> Any:
    """Cut [B, T, ...] into equal blocks [I, B, T, ...], padded; places that are added are empty."""
    length = tree[0].shape[1]
    # The two parts of a row that lie on one device of a ring share no block.
    blocks = 2 * -(-length // (2 * BLOCK)) if ring else -(-length // BLOCK)
    size = -(-length // blocks)
    spare = blocks * size - length

    def cut(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:]).swapaxes(0, 1)

    return type(tree)(*(None if x is None else cut(x, -1 if x is tree.positions else 0) for x in tree))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: Rules, queries: Queries, keys: Keys, bits: jax.Array | None) -> jax.Array:
    """Return blocks of the output: [I, B, T, K, G, H]."""
    return _forward(rules, queries, keys, bits)[0]


class Partial(NamedTuple):
    """A softmax under way: its maximum and sum [..., B, K, G, T], and the output before the division [..., H]."""

    max: jax.Array
    sum: jax.Array
    out: jax.Array


def _forward(rules: Rules, queries: Queries, keys: Keys, bits: jax.Array | None) -> tuple[jax.Array, Any]:
    # Known with the queries only: what hangs on the mask alone would be computed before a scan over layers, and kept
    # for all pairs of blocks, which is T S again.
    queries, keys = jax.lax.optimization_barrier((queries, keys))
    i, b, t, k, g, _ = queries.q.shape
    rows = (i, b, k, g, t)
    start = Partial(
        jnp.full(rows, UNSEEN, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, keys.v.shape[-1]), jnp.float32),
    )

    def look(state: Partial, held: Keys) -> Partial:
        def pair(state: Partial, ij: jax.Array) -> tuple[Partial, None]:
            query, key, now = _at(queries, ij[0]), _at(held, ij[1]), _at(state, ij[0])
            visible = rules.visible(query, key)
            after = jax.lax.cond(visible.any(), lambda: _seen(rules, query, key, bits, visible, now), lambda: now)
            return _put(state, after, ij[0]), None

        return jax.lax.scan(pair, state, _pairs(queries, held))[0]

    def turn(carry: tuple[Partial, Keys], _: None) -> tuple[tuple[Partial, Keys], None]:
        state, held = carry
        return (look(state, held), rules.ring.pass_on(held) if rules.ring else held), None

    held = keys
    if rules.ring:
        (start, held), _ = jax.lax.scan(turn, (start, keys), None, length=rules.ring.size - 1)
    state = look(start, held)
    blind = state.sum == 0
    total = jnp.where(blind, 1.0, state.sum)
    out = jnp.einsum("IBKGTH->IBTKGH", state.out / total[..., None]).astype(queries.q.dtype)
    log_sum = jnp.where(blind, 0.0, state.max + jnp.log(total))
    return out, (queries, keys, bits, out, log_sum)


def _seen(rules: Rules, query: Queries, key: Keys, bits: jax.Array | None, visible: jax.Array, now: Partial) -> Partial:
    """Add one block of keys to the softmax of one block of queries."""
    scores = _scores(query, key, visible)
    maximum = jnp.maximum(now.max, scores.max(-1))
    weights = jnp.where(visible[:, None, None], jnp.exp(scores - maximum[..., None]), 0.0)
    before = jnp.exp(now.max - maximum)
    kept = rules.kept(query, key, bits, weights)
    shown = (weights if kept is None else weights * kept).astype(key.v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BKGTH", shown, key.v, preferred_element_type=jnp.float32)
    return Partial(maximum, now.sum * before + weights.sum(-1), now.out * before[..., None] + out)


def _backward(rules: Rules, residuals: Any, d_out: jax.Array) -> tuple[Queries, Keys, None]:
    queries, keys, bits, out, log_sum = residuals
    # The gradient of the softmax needs the sum of the weights times their gradients (Dao 2022, B.4).
    delta = jnp.einsum("IBTKGH,IBTKGH->IBKGT", d_out, out, preferred_element_type=jnp.float32)
    here = (queries, d_out, log_sum, delta)

    def look(dq: jax.Array, held: Keys) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def pair(grads: Any, ij: jax.Array) -> tuple[Any, None]:
            i, j = ij
            (query, *rest), key = _at(here, i), _at(held, j)
            visible = rules.visible(query, key)
            now = (_at(grads[0], i), *_at(grads[1:], j))

            def add() -> Any:
                return jax.tree.map(jnp.add, now, _gradients(rules, query, key, bits, visible, *rest))

            dq, dk, dv = jax.lax.cond(visible.any(), add, lambda: now)
            return (_put(grads[0], dq, i), *_put(grads[1:], (dk, dv), j)), None

        zeros = jnp.zeros(held.k.shape, jnp.float32), jnp.zeros(held.v.shape, jnp.float32)
        dq, dk, dv = jax.lax.scan(pair, (dq, *zeros), _pairs(queries, held))[0]
        return dq, (dk, dv)

    dq = jnp.zeros(queries.q.shape, jnp.float32)
    if rules.ring is None:
        dq, (dk, dv) = look(dq, keys)
    else:
        ring = rules.ring

        def turn(carry: Any, _: None) -> tuple[Any, None]:
            dq, held, sums = carry
            # Sums follow their keys one step behind, so that they travel while the next block is computed.
            arriving = ring.pass_on(sums)
            dq, found = look(dq, held)
            return (dq, ring.pass_on(held), jax.tree.map(jnp.add, arriving, found)), None

        nothing = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
        (dq, _, sums), _ = jax.lax.scan(turn, (dq, keys, nothing), None, length=ring.size)
        dk, dv = ring.pass_on(sums)  # home
    d_queries = Queries(dq.astype(queries.q.dtype), None, None)  # type: ignore[arg-type]
    return d_queries, Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None), None  # type: ignore[arg-type]


def _gradients(
    rules: Rules,
    query: Queries,
    key: Keys,
    bits: jax.Array | None,
    visible: jax.Array,
    d_out: jax.Array,
    log_sum: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values from one block of each."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.where(visible[:, None, None], jnp.exp(_scores(query, key, visible) - log_sum[..., None]), 0.0)
    d_weights = product("BTKGH,BSKH->BKGTS", d_out, key.v)
    kept = rules.kept(query, key, bits, weights)
    shown = weights
    if kept is not None:
        shown, d_weights = weights * kept, d_weights * kept
    d_scores = (weights * (d_weights - delta[..., None])).astype(query.q.dtype)
    return (
        product("BKGTS,BSKH->BTKGH", d_scores, key.k),
        product("BKGTS,BTKGH->BSKH", d_scores, query.q),
        product("BKGTS,BTKGH->BSKH", shown.astype(d_out.dtype), d_out),
    )


_attend.defvjp(_forward, _backward)


def _scores(query: Queries, key: Keys, visible: jax.Array) -> jax.Array:
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query.q, key.k, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], scores, UNSEEN)


def _pairs(queries: Queries, keys: Keys) -> jax.Array:
    """List all pairs of a block of queries and one of keys."""
    return jnp.asarray(np.indices((len(queries.q), len(keys.k)), np.int32).reshape(2, -1).T)


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, block: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, block)
