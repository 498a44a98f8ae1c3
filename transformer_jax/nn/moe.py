"""Experts in place of one feed-forward layer: a router sends each token to a few of them (Shazeer 2017).

The dialects are settings: Switch takes one expert and the router's probability as its weight (Fedus 2021), GShard and
Mixtral take two and divide the weights by their sum (Lepikhin 2020, Jiang 2024), OLMoE takes eight of 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import Config
from transformer_jax.errors import UserError
from transformer_jax.kernels.experts import Matrices, Routed, apply_experts
from transformer_jax.nn.layers import ACTIVATIONS, FeedForward, Init, Linear
from transformer_jax.sharding import CONTEXT, constrain, mesh_at_hand


@dataclass(frozen=True)
class ExpertsConfig(Config):
    """How many experts there are, and how tokens come to them."""

    count: int = 0
    """Experts of every layer, each as large as model.feedforward; 0: one layer that all tokens take."""
    chosen: int = 2
    """Experts of a token (top-k)."""
    normalised: bool = True
    """Divide the weights of the chosen by their sum (GShard, Mixtral), or leave the probabilities as they are (Switch,
    OLMoE)."""
    capacity: float = 1.25
    """In training, places of an expert over its share of a group's choices; later tokens pass it by. 0: no limit."""
    group: int = 0
    """Positions of a row, one after the other, that share the places; 0: the whole row."""
    balance_loss: float = 0.01
    """Weight of what keeps the experts equally busy, in each layer (Fedus 2021, equation 4)."""
    z_loss: float = 0.001
    """Weight of the router's squared logarithmic normaliser, in each layer (Zoph 2022, equation 5)."""

    def check(self) -> None:
        """Raise `UserError` if the numbers do not fit together."""
        for name in ("count", "capacity", "group", "balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"model.experts.{name} must not be negative, got {getattr(self, name)}.")
        if self.count and not 1 <= self.chosen <= self.count:
            raise UserError(
                f"model.experts.chosen={self.chosen} must lie between 1 and the {self.count} of model.experts.count."
            )

    def places(self, group: int) -> int:
        """Return the places of an expert in a group of so many positions; 0: no limit."""
        return min(group, math.ceil(self.capacity * self.chosen * group / self.count))


DENSE = ExpertsConfig()
"""No experts."""

SUMS = ("balance", "z", "dropped", "fullest")
"""What a layer tells of its routing, in this order: each summed over the real positions."""


class Experts(nnx.Module):
    """Feed-forward layers of which every token takes the few that a router chooses."""

    def __init__(self, key: jax.Array, width: int, hidden: int, config: ExpertsConfig, **dialect: Any) -> None:
        """Draw the router and the experts; `dialect` goes to `FeedForward`."""
        router, experts = jax.random.split(key)
        self.config = config
        init: Init = dialect["init"]
        self.router = Linear(router, {"D": width}, {"E": config.count}, bias=False, init=init)
        keys = jax.random.split(experts, config.count)
        self.experts = jax.vmap(lambda key: FeedForward(key, width, hidden, **dialect))(keys)
        for _, node in nnx.iter_graph(self.experts):
            if isinstance(node, nnx.Param):
                node.set_metadata(letters="E" + node.get_metadata("letters"))

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array | None = None, *, limited: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Read the stream: [B, T, D] -> the same, and what is summed of the routing (`SUMS`).

        Args:
            x_BTD: what the experts read.
            real_BT: which positions are no padding, which takes no place and does not count; by default all.
            limited: whether experts take no more than their capacity.

        Raises:
            UserError: a device does not hold whole groups.
        """
        config, count = self.config, self.config.count
        logits_BTE = self._logits(x_BTD)
        share_BTE = jax.nn.softmax(logits_BTE)
        weight_BTZ, choice_BTZ = _best(share_BTE, config.chosen)
        if config.normalised:
            weight_BTZ /= weight_BTZ.sum(-1, keepdims=True)
        real_BT1 = jnp.ones((*x_BTD.shape[:2], 1), bool) if real_BT is None else real_BT[..., None]
        choice_BTZ = jnp.where(real_BT1, choice_BTZ, count)
        group = self._group(x_BTD.shape[1]) if limited else 0
        out_BTD, kept_BTZ = apply_experts(
            x_BTD,
            Routed(choice_BTZ, weight_BTZ),
            self._matrices(),
            ACTIVATIONS[self.experts.activation],
            group=group,
            places=config.places(group) if limited else 0,
        )
        dropped_BT = (~kept_BTZ & real_BT1).mean(-1)
        return constrain(out_BTD, "BTD"), self._sums(logits_BTE, share_BTE, choice_BTZ, real_BT1, dropped_BT)

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        """Score the experts, in float32 throughout (Fedus 2021, section 2.4)."""
        weight = _matrix(self.router).astype(jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        return constrain(logits_BTE, "BTE")

    def _matrices(self) -> Matrices:
        up, down, gate = self.experts.up, self.experts.down, self.experts.gate
        biases = (None if m is None or m.bias is None else m.bias[...] for m in (up, down, gate))
        return Matrices(_matrix(up), _matrix(down), None if gate is None else _matrix(gate), *biases)

    def _group(self, length: int) -> int:
        """Return the positions of a group, of which every device must hold whole ones."""
        devices = mesh_at_hand().shape.get(CONTEXT, 1)
        group = min(self.config.group or length, length)
        if devices > 1 and length % devices == 0:
            # A device holds an early part of the row and a late one (kernels/zigzag.py).
            piece = length // (2 * devices) if length % (2 * devices) == 0 else length // devices
            if piece % group:
                raise UserError(
                    f"mesh.context={devices} cuts a row of {length} positions into pieces of {piece}, which "
                    f"model.experts.group={self.config.group} does not divide; set --model.experts.group {piece}."
                )
        return group

    def _sums(
        self,
        logits_BTE: jax.Array,
        share_BTE: jax.Array,
        choice_BTZ: jax.Array,
        real_BT1: jax.Array,
        dropped_BT: jax.Array,
    ) -> jax.Array:
        """Sum what `SUMS` names over real positions.

        Balance is that of Switch, by row and for any number of choices: E sum_e (share of the choices that e gets)
        (mean probability of e), 1 where all are alike. By row, so that it adds up over micro-batches and devices.
        """
        count, chosen = self.config.count, self.config.chosen
        real_B = real_BT1.sum((1, 2)).astype(jnp.float32)
        taken_BE = jax.nn.one_hot(choice_BTZ, count).sum((1, 2))
        mean_BE = (share_BTE * real_BT1).sum(1) / jnp.maximum(real_B, 1)[:, None]
        balance = count / chosen * (taken_BE * mean_BE).sum()
        z = (jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT1[..., 0]).sum()
        fullest = count / chosen * taken_BE.sum(0).max()
        return jnp.stack([balance, z, dropped_BT.sum(), fullest])


def _best(share_BTE: jax.Array, chosen: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest shares and their experts: [B, T, Z]; one after the other, as XLA gathers rows to sort them."""
    rest_BTE, weights, choices = share_BTE, [], []
    for _ in range(chosen):
        choices.append(rest_BTE.argmax(-1))
        taken_BTE = jax.nn.one_hot(choices[-1], share_BTE.shape[-1], dtype=bool)
        weights.append(jnp.where(taken_BTE, share_BTE, 0).sum(-1))
        rest_BTE = jnp.where(taken_BTE, -1, rest_BTE)
    return jnp.stack(weights, axis=-1), jnp.stack(choices, axis=-1)


def _matrix(linear: Linear) -> jax.Array:
    """Return the matrices of a linear map, in full where they are held as int8."""
    weight = linear.weight[...]
    return weight if linear.scale is None else weight * linear.scale[...][..., None, :]


def routing(sums_LX: jax.Array, config: ExpertsConfig) -> dict[str, jax.Array]:
    """Name what the layers summed: the losses of all layers in "loss", and the mean layer as metrics.

    "load_balance" is 1 at best, "router_z" the squared normaliser, "dropped" the share of choices without a place,
    "fullest_expert" the choices of the busiest expert of a batch over those of the mean one.
    """
    balance, z, dropped, fullest = sums_LX.mean(0)
    loss = len(sums_LX) * (config.balance_loss * balance + config.z_loss * z)
    return {"loss": loss, "load_balance": balance, "router_z": z, "dropped": dropped, "fullest_expert": fullest}


@runtime_checkable
class Routes(Protocol):
    """A model that may have experts."""

    def routed(
        self, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Read a batch as `read` does: [B, T, D], and what `routing` names; {} of a model without experts."""
