"""Schedules, decay mask and the optax chain."""

from __future__ import annotations

import jax
import optax
from optax import contrib

from transformer_jax.config import OptimConfig, ScheduleConfig
from transformer_jax.errors import UserError
from transformer_jax.nn.module import Params


def schedule(config: ScheduleConfig) -> optax.Schedule:
    """Return the learning rate of update n = 0, 1, ... (step n + 1 of the papers)."""
    peak, warmup, steps = config.peak, max(config.warmup, 1), max(config.steps, config.warmup + 1)

    def warm(after: optax.Schedule) -> optax.Schedule:
        # Update n uses peak (n + 1) / warmup, so that the first one is not wasted on a rate of zero.
        return optax.join_schedules([lambda n: peak * (n + 1) / warmup, after], [warmup])

    match config.kind:
        case "inverse_sqrt":
            # Vaswani 2017, equation 3, with d_model^-0.5 = peak warmup^0.5.
            return warm(lambda n: peak * (warmup / (n + 1 + warmup)) ** 0.5)
        case "cosine":
            return warm(optax.cosine_decay_schedule(peak, steps - warmup, config.final))
        case "linear":
            return warm(optax.linear_schedule(peak, peak * config.final, steps - warmup))
        case "wsd":
            decay = max(int(steps * config.decay_fraction), 1)
            stable = optax.constant_schedule(peak)
            cooldown = optax.linear_schedule(peak, peak * config.final, decay)
            return warm(optax.join_schedules([stable, cooldown], [cooldown_start(config) - warmup]))
        case "constant":
            return warm(optax.constant_schedule(peak))


def cooldown_start(config: ScheduleConfig) -> int:
    """Return the update from which the schedule "wsd" falls."""
    warmup = max(config.warmup, 1)
    steps = max(config.steps, config.warmup + 1)
    return warmup + max(steps - warmup - max(int(steps * config.decay_fraction), 1), 0)


def optimizer(config: OptimConfig, letters: Params, width_multiplier: float = 1.0) -> optax.GradientTransformation:
    """Clip, scale, decay (decoupled: Loshchilov and Hutter 2019), schedule; in that order.

    Args:
        config: of the chain.
        letters: tree of the parameters' layouts.
        width_multiplier: of muP: Adam's updates of matrices that read the width are divided by it (Yang 2022, table 3).
            The decay is not, so that rate x decay stays the same.

    Raises:
        UserError: muP with an optimizer that is not Adam.
    """
    if width_multiplier != 1.0 and config.kind != "adam":
        raise UserError(f"model.base_width: the rates of muP are known for optim.kind=adam, not for {config.kind}.")
    # No vectors, stacked or not, and no biases, which those of attention heads are matrices of in shape only.
    decays = jax.tree_util.tree_map_with_path(
        lambda path, names: path[-1].key != "bias" and len(names) - _stacked(names) > 1, letters
    )
    rate = schedule(config.schedule)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decay = [optax.add_decayed_weights(config.weight_decay, mask=decays)] if config.weight_decay else []
    step = optax.scale_by_learning_rate(rate)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    match config.kind:
        case "adam":
            mup = [] if width_multiplier == 1.0 else [_divided(width_multiplier, letters)]
            return optax.chain(*clip, adam, *mup, *decay, step)
        case "lamb":
            return optax.chain(*clip, adam, *decay, _by_layer(optax.scale_by_trust_ratio(), letters), step)
        case "adafactor":
            size = _by_layer(optax.scale_by_param_block_rms(), letters)
            bound = _by_layer(optax.clip_by_block_rms(1.0), letters)
            return optax.chain(*clip, optax.scale_by_factored_rms(), bound, size, *decay, step)
        case "muon":
            # Rescaled to the size of Adam's updates, so that both parts share a learning rate (Liu 2025, section 2.2).
            muon = contrib.muon(
                rate,
                weight_decay=config.weight_decay,
                weight_decay_mask=decays,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_weight_decay=0.0,
                muon_weight_dimension_numbers=jax.tree.map(_matrix, letters),
                consistent_rms=0.2,
            )
            return optax.chain(*clip, muon)


_MATRICES = {"DNH": 1, "DKH": 1, "NHD": 2, "DF": 1, "FD": 1}
"""Layouts of the hidden matrices, with the number of axes that are contracted; the others are what comes out."""


def _stacked(names: str) -> int:
    """Count the first axes along which a parameter is several: layers, experts."""
    return len(names) - len(names.removeprefix("L").removeprefix("E"))


_HEADS = ("DZ",)
"""Layouts of matrices that read the width and write something of fixed size; tables ("VD") are scaled as inputs."""


def _divided(width_multiplier: float, letters: Params) -> optax.GradientTransformation:
    """Divide the updates of the matrices that read the width."""

    def one(names: str, update: jax.Array) -> jax.Array:
        reads_width = names.removeprefix("L") in (*_MATRICES, *_HEADS)
        return update / width_multiplier if reads_width else update

    return optax.stateless(lambda updates, _: jax.tree.map(one, letters, updates))


def _matrix(names: str) -> contrib.MuonDimensionNumbers | None:
    """Say which axes of a parameter make a matrix, by layer and expert; None (tables, heads, vectors) is Adam's."""
    stacked = _stacked(names)
    inner = names[stacked:]
    if inner not in _MATRICES:
        return None
    axes = tuple(range(stacked, len(names)))
    contracted = _MATRICES[inner]
    return contrib.MuonDimensionNumbers(axes[:contracted], axes[contracted:])


def _by_layer(inner: optax.GradientTransformation, letters: Params) -> optax.GradientTransformation:
    """Apply a transformation without state to each layer, and each expert of it, by itself."""

    def one(names: str, update: jax.Array, param: jax.Array) -> jax.Array:
        def apply(update: jax.Array, param: jax.Array) -> jax.Array:
            return inner.update(update, inner.init(param), param)[0]

        for _ in range(_stacked(names)):
            apply = jax.vmap(apply)
        return apply(update, param)

    def update(updates: Params, state: optax.OptState, params: Params | None) -> tuple[Params, optax.OptState]:
        return jax.tree.map(one, letters, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
