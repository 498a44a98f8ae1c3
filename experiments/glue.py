"""The tasks of GLUE (Wang 2019) that are classified: what a recipe of any model needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from transformer_jax.data.labelled_rows import Kind


@dataclass(frozen=True)
class Task:
    """One task."""

    examples: int
    """Of training."""
    labels: int
    kind: Kind = "classes"
    similarity: bool = False
    """Whether it is about how alike two texts are, so that their order means nothing."""

    @property
    def steps(self) -> int:
        """Three epochs in batches of 32, as BERT and GPT-1 were fine-tuned."""
        return 3 * self.examples // 32


GLUE = {
    "cola": Task(8_551, 2),
    "sst2": Task(67_349, 2),
    "mrpc": Task(3_668, 2, similarity=True),
    "qqp": Task(363_846, 2, similarity=True),
    "stsb": Task(5_749, 1, "number", similarity=True),
    "mnli": Task(392_702, 3),
    "qnli": Task(104_743, 2),
    "rte": Task(2_490, 2),
}
