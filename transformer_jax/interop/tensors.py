"""The safetensors of a Hugging Face folder, in one file or in shards, one tensor at a time. Nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from transformer_jax.errors import UserError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = ("F64", "F32", "F16", "BF16")
"""What is read; others are quantised, and mean nothing without what undoes it."""


class Tensors:
    """The tensors of a folder, open until the `with` block ends; only one is in memory at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the files. Raises `UserError` if there are none, or one is missing or broken."""
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        listed = _weight_map(folder)
        for file in sorted(set(listed.values())) if listed else [_single(folder)]:
            try:
                opened = self._stack.enter_context(safetensors.safe_open(folder / file, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{folder / file}: cannot be read ({error}).") from error
            self._files[file] = opened
            self._file_of |= dict.fromkeys(opened.keys(), file)
        if missing := sorted(set(listed) - set(self._file_of)):
            raise UserError(f"{folder / INDEX}: {some(missing)} not in the file that it names.")

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, as it is stored. Raises `UserError` if its numbers are none that we compute with."""
        file = self._files[self._file_of[name]]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{self.folder / self._file_of[name]}: tensor {name} is of type {dtype}; {', '.join(DTYPES)} are read, "
                "quantised weights are not."
            )
        tensor: NDArray[Any] = file.get_tensor(name)
        return tensor


class Shards:
    """Writes tensors into a folder, and starts a new file where one would grow beyond `size` bytes."""

    def __init__(self, folder: Path, sizes: dict[str, int], size: int) -> None:
        """Plan the files; `sizes` has the bytes of all tensors in the order in which they will come."""
        self.folder, self._total = folder, sum(sizes.values())
        self._held: dict[str, NDArray[Any]] = {}
        plan: list[list[str]] = [[]]
        filled = 0
        for name, count in sizes.items():
            if plan[-1] and filled + count > size:
                plan.append([])
                filled = 0
            plan[-1].append(name)
            filled += count
        files = [ONE_FILE] if len(plan) == 1 else [f"model-{i:05}-of-{len(plan):05}.safetensors" for i in _from1(plan)]
        self._map = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        self._last = {names[-1] for names in plan}

    def add(self, name: str, tensor: NDArray[Any]) -> None:
        """Take the next tensor; when a file has all of its own, write it and let go of them."""
        self._held[name] = tensor
        if name in self._last:
            save_file(self._held, self.folder / self._map[name], metadata={"format": "pt"})
            self._held = {}

    def finish(self) -> int:
        """Write the index if there are several files; return how many there are."""
        files = len(self._last)
        if files > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return files


def require_space(folder: Path, need: int) -> None:
    """Raise `UserError` if the disk of a folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"the disk of {folder.parent} has {free / 2**20:.1f} MiB free, the result needs {need / 2**20:.1f} MiB."
        )


def _from1(items: list[Any]) -> range:
    return range(1, len(items) + 1)


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no index of shards ({error}).") from error
    for file in set(files.values()):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{path}: the shard {file} is not in the folder.")
    return files


def _single(folder: Path) -> str:
    if (folder / ONE_FILE).is_file():
        return ONE_FILE
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(folder.glob(pattern))]
    if not pickled:
        raise UserError(f"{folder}: no {ONE_FILE} in it, and no {INDEX}.")
    raise UserError(
        f"{folder}: only pickled weights ({pickled[0]}), which can run any code when opened and are never read here; "
        'write safetensors where PyTorch is: python -c "import transformers as t; c = t.AutoConfig.from_pretrained'
        f"('{folder}'); getattr(t, c.architectures[0]).from_pretrained('{folder}').save_pretrained('{folder}', "
        'safe_serialization=True)".'
    )


def some(names: list[str]) -> str:
    """Name at most three, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"
