"""A training step is the same however it is laid out: the check that the tests of the families share."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from transformer_jax.config import ComputeConfig, Experiment, MeshConfig
from transformer_jax.train import Trainer


def assert_same_step_on_a_mesh(experiment: Experiment, batch, compute: ComputeConfig | None = None) -> None:
    """Take a step on one device, and on a mesh of 2 x 2 x 2 (with `compute`, if given): same parameters and metrics."""
    results = []
    for mesh, devices, how in (
        (MeshConfig(1), jax.devices()[:1], experiment.compute),
        (MeshConfig(2, 2, 2), jax.devices(), compute or experiment.compute),
    ):
        trainer = Trainer.of(replace(experiment, mesh=mesh, compute=how), devices)
        state, metrics = trainer.train_step()(trainer.init(), trainer.put(batch))
        results.append(jax.device_get((state.params, metrics)))
    (params, metrics), (sharded_params, sharded_metrics) = results
    for key, value in metrics.items():
        np.testing.assert_allclose(sharded_metrics[key], value, rtol=2e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sharded_params, params)
