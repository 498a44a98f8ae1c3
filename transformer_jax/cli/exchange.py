"""convert: to and from Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from transformer_jax.cli.verb import Verb
from transformer_jax.errors import UserError
from transformer_jax.interop import convert
from transformer_jax.interop.certify import summary
from transformer_jax.interop.exporting import Dtype
from transformer_jax.logs import print_json, say


@dataclass(frozen=True)
class ConvertOptions:
    """Turn a Hugging Face folder or hub id into a run, or a run into a Hugging Face folder, with a certificate.

    SOURCE holds config.json and safetensors, or is the id of a model on the hub (OWNER/NAME), or is a run.
    BERT, GPT-2, Llama, Mistral and Qwen 3 are known.
    """

    dest: Annotated[str, tyro.conf.Positional] = ""
    """The folder to write; it must be empty or absent."""
    tokenizer: str = ""
    """Another tokenizer than that in SOURCE: a file or a folder."""
    revision: str = ""
    """Branch, tag or commit on the hub."""
    ignore: tuple[str, ...] = ()
    """Fields of config.json that are unknown here, and do not change what the model computes."""
    dtype: Dtype = "float32"
    """Precision of the weights (export)."""
    shard_mb: int = 5000
    """Most megabytes of one safetensors file (export)."""
    json: bool = False
    """Print the certificate as one JSON object."""


def _convert(source: str, options: ConvertOptions) -> int:
    if not options.dest:
        raise UserError("tjax convert needs SOURCE and DEST: tjax convert SOURCE DEST [options].")
    if options.shard_mb < 1:
        raise UserError(f"--shard-mb must be at least 1, got {options.shard_mb}.")
    conversion = convert(
        source,
        options.dest,
        tokenizer=options.tokenizer,
        revision=options.revision,
        ignore=options.ignore,
        dtype=options.dtype,
        shard_bytes=options.shard_mb * 1_000_000,
    )
    if options.json:
        print_json(conversion.certificate)
    say(summary(conversion.certificate))
    say(f"written: {conversion.path}")
    return 0


VERBS = {
    "convert": Verb(
        "SOURCE",
        "to and from Hugging Face, with a certificate: tjax convert SOURCE DEST",
        ConvertOptions,
        lambda _: ConvertOptions(),
        _convert,
    ),
}
