"""From a run of ours to a Hugging Face folder."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from transformer_jax.checkpoint import load_labels, load_meta
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.interop.certificate import compare
from transformer_jax.interop.certify import attest, inputs, load, our_outputs
from transformer_jax.interop.families import writer_of
from transformer_jax.interop.table import Array, Family, export_row, names, shape_of, slots, used
from transformer_jax.interop.tensors import Shards, require_space
from transformer_jax.logs import meter
from transformer_jax.nn.module import Params, Skeleton

Dtype = Literal["float32", "bfloat16", "float16"]


def export_run(run: Path, folder: Path, tokenizer: str, dtype: Dtype, shard_bytes: int) -> dict[str, Any]:
    """Write a run as a Hugging Face folder, and return its certificate.

    Raises:
        UserError: theirs has no counterpart of the model, the disk is full, or the certificate fails.
    """
    experiment, tokenizer_json = load_meta(run)
    config: Any = experiment.model
    family = writer_of(config)
    values = family.write(config)
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    words = None
    if tokenizer or tokenizer_json:
        where = tokenizer or f"the tokenizer of {run}"
        words = Tokenizer.load(Path(tokenizer)) if tokenizer else Tokenizer.from_json(tokenizer_json, where)
        words.require(config.vocab_size, where)
        values |= _ids(words)
        _write_tokenizer(words, folder, config.context)
    if labels := load_labels(run):
        values |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    values["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    skeleton, params = load(run, config)
    given = inputs(config, words)
    ours = our_outputs(family, skeleton, params, given)
    facts = {"direction": "export", "source": str(run), "architecture": values["architectures"][0], "dtype": dtype}
    if dtype != "float32":  # what is written must be the rounded model; what the rounding costs is said beside it
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        exact, ours = ours, our_outputs(family, skeleton, params, given)
        facts["rounding"] = compare(ours, exact, given.batch)
    write_tensors(family, skeleton, params, folder, shard_bytes)
    return attest(family, folder, given, ours, facts, folder)


def write_tensors(family: Family, skeleton: Skeleton, params: Params, folder: Path, shard_bytes: int) -> int:
    """Write all tensors, and return the number of files; `params` is emptied on the way, which frees it."""
    holes = slots(skeleton)
    rows = used(family.rows(skeleton.config), holes)
    full = partial(family.full, config=skeleton.config)
    size = jax.tree.leaves(params)[0].dtype.itemsize
    sizes = {full(name): size * math.prod(shape_of(row, holes)) for row in rows for name, _ in names(row, holes)}
    require_space(folder, sum(sizes.values()))
    shards = Shards(folder, sizes, shard_bytes)
    with meter(0, len(rows)) as bar:
        for i, row in enumerate(rows, start=1):
            for name, tensor in export_row(row, holes, lambda path: _take(params, path)):
                shards.add(full(name), tensor)
            bar.update(i, row.theirs)
    return shards.finish()


def _take(params: Params, path: str) -> Array:
    """Move a parameter out of the tree, so that it is freed once it has been written."""
    *parents, last = path.split(".")
    node = params
    for name in parents:
        node = node[name]
    return np.asarray(node.pop(last))


def _ids(words: Tokenizer) -> dict[str, int]:
    return {f"{role}_token_id": i for role, i in _roles(words).items() if role in ("pad", "bos", "eos")}


def _roles(words: Tokenizer) -> dict[str, int]:
    """Return the special tokens that matter: where a text stands between [CLS] and [SEP], it needs no others."""
    roles = ("pad", "unk", "cls", "sep", "mask") if words.mask is not None else ("pad", "unk", "bos", "eos")
    return {role: i for role in roles if (i := getattr(words, role)) is not None}


def _write_tokenizer(words: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, and beside it what transformers wants to know of the special tokens."""
    text = words.to_json()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    pairs = ["token_type_ids"] if words.mask is not None else []
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", *pairs, "attention_mask"],
        **{f"{role}_token": words.tokens([i])[0] for role, i in _roles(words).items()},
    }
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
