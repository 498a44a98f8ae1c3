"""config.json, with no field passed over: each is used, or must have the one value that we compute, or is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformer_jax.errors import UserError

T = TypeVar("T")

_WORDS = """
attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop finetuning_task
gradient_checkpointing hidden_dropout_prob initializer_range problem_type resid_pdrop summary_first_dropout

_attn_implementation_autoset _name_or_path architectures bos_token_id cls_token_id dtype eos_token_id id2label
label2id mask_token_id model_type name_or_path num_labels pad_token_id sep_token_id tokenizer_class torch_dtype
transformers_version unk_token_id use_bfloat16

chunk_size_feed_forward keys_to_ignore_at_inference output_attentions output_hidden_states output_past
pretraining_tp return_dict torchscript use_cache

bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
repetition_penalty return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p

directionality n_ctx pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
summary_activation summary_proj_to_labels summary_type summary_use_proj
"""
"""Training and initialisation; names, tokens and storage; how outputs are handed over, and how the same numbers are
computed; generation; heads that are not exchanged, and what no version reads."""

HARMLESS = frozenset(_WORDS.split())
"""Fields that do not change what the model computes: training, generation, storage, and names."""


class Fields:
    """The fields of a config.json, each taken once."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()

    @staticmethod
    def load(path: Path) -> Fields:
        """Read a file. Raises `UserError` if there is none, or it is not the JSON of a model."""
        if not path.is_file():
            held = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:4]) or "nothing"
            raise UserError(
                f"{path.parent} has no config.json (it holds: {held}); a folder of Hugging Face has that and "
                "model.safetensors, a run folder of ours has experiment.json."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from error
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise UserError(f'{path}: no "model_type" in it; it is not the config.json of a Hugging Face model.')
        return Fields(values, str(path))

    @property
    def model_type(self) -> str:
        """The family that wrote the file."""
        return self.take("model_type", str)

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of a field; a null counts as absent.

        Raises:
            UserError: it is absent and there is no default, or it is of another type.
        """
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where}: the field '{name}' is missing.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where}: '{name}' should be of type {kind.__name__}, got {value!r}.")
        return value

    def choose(self, name: str, meanings: dict[str, T], default: str) -> T:
        """Return what the value of a field means. Raises `UserError` if it is none of `meanings`."""
        value = self.take(name, str, default)
        if value not in meanings:
            raise UserError(f"{self.where}: {name}='{value}' is not supported; known are {', '.join(meanings)}.")
        return meanings[value]

    def require(self, **expected: Any) -> None:
        """Refuse a field that is there with another value than the one that we compute (a null is none)."""
        for name, value in expected.items():
            self._read.add(name)
            found = self.values.get(name)
            if found is not None and found != value:
                raise UserError(f"{self.where}: {name}={found!r} is not supported, only {value!r}.")

    def finish(self, ignore: Sequence[str]) -> None:
        """Refuse a field that nobody has read and that is not known to be harmless."""
        for name, value in self.values.items():
            if value is not None and name not in self._read | HARMLESS | set(ignore):
                raise UserError(
                    f"{self.where}: the field {name}={value!r} is unknown and may change what the model computes; "
                    f"if you know that it does not, add --ignore {name}."
                )
