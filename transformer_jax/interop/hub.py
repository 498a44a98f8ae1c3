"""A folder, or the id of a model on the Hugging Face hub, by the hub's own client and cache."""

from __future__ import annotations

import re
from pathlib import Path

from transformer_jax.errors import UserError

FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TIMEOUT = 5
"""Seconds after which the hub counts as unreachable."""


def folder_of(source: str, revision: str) -> Path:
    """Return the folder of a model, downloaded if `source` is an id such as "google-bert/bert-base-uncased".

    Raises:
        UserError: there is no such folder and no such model, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or Path(source).exists():
        raise UserError(f"{source}: there is no such folder, and it is no id of the hub (OWNER/NAME).")
    import huggingface_hub  # noqa: PLC0415 - a third of a second, for those who need it

    try:
        folder = huggingface_hub.snapshot_download(
            source, revision=revision or None, allow_patterns=list(FILES), etag_timeout=TIMEOUT
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"{source}: there is no such folder, and it cannot be had from the hub ({reason}); "
            "where there is no network, give a folder that holds config.json and model.safetensors."
        ) from error
    if not any(Path(folder).glob("model*.safetensors")):
        raise UserError(f"{source}: no safetensors on the hub; pickled weights are never read.")
    return Path(folder)
