"""The exchange with Hugging Face: a folder of theirs into a run of ours, and back, each with a certificate."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_jax.errors import UserError
from transformer_jax.interop.exporting import Dtype, export_run
from transformer_jax.interop.hub import folder_of
from transformer_jax.interop.importing import import_folder
from transformer_jax.storage import run_path


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    path: Path
    certificate: Mapping[str, Any]
    """Also in certificate.json there."""


def convert(
    source: str,
    dest: str | Path,
    *,
    tokenizer: str = "",
    revision: str = "",
    ignore: Sequence[str] = (),
    dtype: Dtype = "float32",
    shard_bytes: int = 5_000_000_000,
) -> Conversion:
    """Turn a Hugging Face folder, or an id on the hub, into a run folder; or a run folder into a Hugging Face folder.

    Both sides then compute the same inputs; how far they lie apart stands in certificate.json beside the result. If
    it is too far, nothing is left behind.

    Args:
        source: what to convert; a folder with experiment.json is a run.
        dest: the folder to write, which must not exist or be empty.
        tokenizer: another tokenizer than the one in `source`: a file or a folder.
        revision: branch, tag or commit on the hub.
        ignore: fields of config.json that are not known here, and known not to matter.
        dtype: precision of what is exported; rounding is measured in the certificate.
        shard_bytes: most bytes of a safetensors file; larger models come in several.

    Raises:
        UserError: there is nothing to convert, something in it is not supported, or the certificate fails.
    """
    dest = Path(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists and is not an empty folder; name another.")
    if (run_path(source) / "experiment.json").is_file():
        with _staged(dest) as staging:
            certificate = export_run(run_path(source), staging, tokenizer, dtype, shard_bytes)
    else:
        folder = folder_of(source, revision)
        with _staged(dest) as staging:
            certificate = import_folder(folder, staging, source, tokenizer, ignore)
    return Conversion(dest, certificate)


@contextmanager
def _staged(dest: Path) -> Iterator[Path]:
    """Give a folder that becomes `dest` if all goes well, and goes away if not."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(dest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
