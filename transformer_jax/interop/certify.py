"""Run both sides of a conversion, and write down how far they lie apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from transformer_jax.checkpoint import load_params
from transformer_jax.config import ComputeConfig, MeshConfig, ModelConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.interop import peers
from transformer_jax.interop.certificate import KL_TOLERANCE, TOLERANCE, Inputs, Outputs, compare, failures
from transformer_jax.interop.certificate import inputs as draw
from transformer_jax.interop.reference import REFERENCES
from transformer_jax.interop.table import Family
from transformer_jax.interop.tensors import Tensors
from transformer_jax.nn.module import Params, Skeleton
from transformer_jax.provenance import provenance
from transformer_jax.sharding import make_mesh

REFERENCE = "NumPy in float64"
COMPUTE = ComputeConfig(layers="scan", attention="xla")


def host() -> jax.Device:
    """Return the device on which conversions run: they need memory, and numbers that are the same everywhere."""
    return jax.devices("cpu")[0]


def inputs(config: Any, tokenizer: Tokenizer | None) -> Inputs:
    """Return what a model is given: random tokens, and text where there is a tokenizer."""
    return draw(config.vocab_size, config.context, getattr(config, "types", 1), tokenizer)


def load(run: Path, config: ModelConfig) -> tuple[Skeleton, Params]:
    """Load a run's parameters into host memory, layers stacked. Raises `UserError` if no checkpoint can be read."""
    skeleton = Skeleton.of(config, COMPUTE)
    params, _ = load_params(run, skeleton, make_mesh(MeshConfig(data=1), [host()]))
    return skeleton, params


def our_outputs(family: Family, skeleton: Skeleton, params: Params, given: Inputs) -> Outputs:
    """Compute with our model, in float32."""
    with jax.default_device(host()):
        return jax.device_get(family.outputs(skeleton.bind(params), given.batch))


def attest(
    family: Family, folder: Path, given: Inputs, ours: Outputs, facts: Mapping[str, Any], dest: Path
) -> dict[str, Any]:
    """Compare our outputs with those of a Hugging Face folder, and write certificate.json into `dest`.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    theirs = {REFERENCE: _reference_outputs(family, folder, given)}
    if peer := peers.installed():
        theirs[peer] = peers.run(folder, facts["architecture"], given.batch)
    measured = {witness: compare(ours, outputs, given.batch) for witness, outputs in theirs.items()}
    for witness, outputs in measured.items():
        if wrong := failures(outputs):
            raise UserError(f"the certificate fails, so nothing is kept: against {witness}, {'; '.join(wrong)}.")
    certificate = {
        **facts,
        "family": family.name,
        "inputs": given.described,
        "tolerance": {"difference": f"{TOLERANCE} of the largest value", "kl": KL_TOLERANCE},
        "measured": measured,
        "provenance": provenance(),
    }
    text = json.dumps(certificate, indent=2, ensure_ascii=False) + "\n"
    (dest / "certificate.json").write_text(text, encoding="utf-8")
    return certificate


def _reference_outputs(family: Family, folder: Path, given: Inputs) -> Outputs:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with Tensors(folder) as tensors:
        actual = {family.canonical(name): name for name in tensors}
        forward = REFERENCES[family.name]
        return forward(values, lambda name: tensors.read(actual[name]), frozenset(actual), given.batch)


def summary(certificate: Mapping[str, Any]) -> str:
    """Say in one line what a certificate shows."""
    outputs = [(name, m) for by_name in certificate["measured"].values() for name, m in by_name.items()]
    name, worst = max(outputs, key=lambda item: item[1]["difference"] / item[1]["value"])
    kl = max((m["kl"] for _, m in outputs if m["kl"] is not None), default=None)
    rows = [f"{len(rows['tokens_by_row'])} rows of {kind}" for kind, rows in certificate["inputs"].items()]
    return (
        f"certificate: '{name}' differs by {worst['difference']:.1e} at most, of values up to {worst['value']:.3g}"
        + ("" if kl is None else f", KL at most {max(kl, 0.0):.1e} nats")
        + _rounding(certificate)
        + f" ({' and '.join(rows).replace('_', ' ')}; against {' and '.join(certificate['measured'])})"
    )


def _rounding(certificate: Mapping[str, Any]) -> str:
    if "rounding" not in certificate:
        return ""
    moved = max(m["difference"] / m["value"] for m in certificate["rounding"].values())
    return f"; rounding to {certificate['dtype']} has moved it by {moved:.1e} of its largest value"
