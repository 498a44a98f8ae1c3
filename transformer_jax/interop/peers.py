"""The same outputs from the transformers library, where it and PyTorch are installed: a second witness."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from transformer_jax.interop.certificate import Batch, Outputs

NAMES = {
    "BertForPreTraining": {"mlm": "prediction_logits", "nsp": "seq_relationship_logits"},
    "BertForMaskedLM": {"mlm": "logits"},
    "BertForSequenceClassification": {"classify": "logits"},
    "BertForTokenClassification": {"tag": "logits"},
    "BertModel": {"hidden": "last_hidden_state", "pooled": "pooler_output"},
}
"""What they call our outputs; of a decoder it is the logits."""


def installed() -> str:
    """Return name and version of the library, or "" if it or PyTorch is absent."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return ""
    return f"transformers {importlib.metadata.version('transformers')}"


def run(folder: Path, architecture: str, batch: Batch) -> Outputs:
    """Compute what the certificate compares, in float32."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    tensors = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    inputs = {"input_ids": tensors["tokens"], "attention_mask": tensors["segments"]}
    if architecture.startswith("Bert"):
        inputs["token_type_ids"] = tensors["types"]
    with torch.no_grad():
        found = model(**inputs)
    if architecture == "BertForQuestionAnswering":
        return {"span": torch.stack([found.start_logits, found.end_logits], dim=-1).numpy()}
    return {ours: found[theirs].numpy() for ours, theirs in NAMES.get(architecture, {"next": "logits"}).items()}
