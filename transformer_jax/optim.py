"""Schedules, decay mask and the optax chain."""

from __future__ import annotations

import jax
import optax

from transformer_jax.config import OptimConfig, ScheduleConfig
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
        case "wsd":
            decay = max(int(steps * config.decay_fraction), 1)
            stable = max(steps - warmup - decay, 0)
            cooldown = optax.linear_schedule(peak, peak * config.final, decay)
            return warm(optax.join_schedules([optax.constant_schedule(peak), cooldown], [stable]))
        case "constant":
            return warm(optax.constant_schedule(peak))


def optimizer(config: OptimConfig, letters: Params) -> optax.GradientTransformation:
    """Clip, Adam (Kingma and Ba 2015), decoupled decay (Loshchilov and Hutter 2019), schedule; in that order."""

    def decays(names: str) -> bool:
        # Vectors (biases, norms) are not decayed, stacked or not.
        return len(names.removeprefix("L")) > 1

    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    chain.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(decays, letters)))
    chain.append(optax.scale_by_learning_rate(schedule(config.schedule)))
    return optax.chain(*chain)
