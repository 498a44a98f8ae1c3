"""The Language Model Evaluation Harness (`lm-eval`, EleutherAI) drives a run of ours: all its tasks, its numbers.

    python -m transformer_jax.lm_eval_adapter --model tjax --model_args run=runs/gpt2_demo --tasks lambada_openai

or `lm_eval.simple_evaluate(TjaxLM("runs/gpt2_demo"), tasks=[...])`. Texts that are too long lose their beginning, as
the harness does it for every model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from transformer_jax.completion import Completer, Score
from transformer_jax.errors import UserError
from transformer_jax.generation import Completion, Generation

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    missing = f"the adapter needs the harness ({error}): pip install 'transformer_jax[lm-eval]'."
    raise (SystemExit(missing) if __name__ == "__main__" else UserError(missing)) from error

MAX_GEN_TOKS: Final = 256
"""Tokens to write where a task names no number, as in the harness."""


@register_model("tjax")
class TjaxLM(LM):
    """A decoder-only run as a model of the harness."""

    def __init__(
        self,
        run: str | Completer,
        average: int = 1,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Open a run folder; the last two are the harness's, JAX finds memory and devices itself.

        Raises:
            UserError: no decoder-only run, or a batch size that is no number.
        """
        super().__init__()
        del max_batch_size, device
        if not str(batch_size).isdecimal():
            raise UserError(f"--batch_size must be a number, got {batch_size}.")
        self.completer = run if isinstance(run, Completer) else Completer.open(run, int(average))
        self._batch = int(batch_size)
        self._context = self.completer.config.context

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its cached requests under."""
        return self.completer.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether greedy would write it."""
        pairs = self.completer.encoder.encode_pairs([request.args for request in requests])
        results = [(score.log_prob, score.greedy) for score in self._scored(pairs, disable_tqdm)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, read in windows that do not overlap."""
        start, windows, owners = self.completer.encoder.start, [], []
        if not start:
            raise UserError("the tokenizer has no token that a text could begin with.")
        texts = [request.args[0] for request in requests]
        for number, ids in enumerate(self.completer.tokenizer.encode_batch(texts)):
            for window in get_rolling_token_windows(ids, start[0], self._context, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, score in zip(owners, self._scored(windows, disable_tqdm), strict=True):
            totals[owner] += score.log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what is written after each context, up to a stop string or the end of the text."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        drawn: Counter[str] = Counter()  # a context that is asked again gets another sample
        for numbers in groups.values():
            generation = self._generation(requests[numbers[0]].args[1])
            for first in tqdm(range(0, len(numbers), self._batch), disable=disable_tqdm, desc="generate_until"):
                chosen = numbers[first : first + self._batch]
                rows = []
                for number in chosen:
                    prompt = self._shortened(requests[number].args[0], self._context - generation.max_tokens)
                    rows.append(Completion(prompt, drawn[prompt]))
                    drawn[prompt] += 1
                for _ in self.completer.stream(rows, generation):
                    pass
                for number, row in zip(chosen, rows, strict=True):
                    texts[number] = row.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, row.text)
        return [texts[number] for number in range(len(requests))]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[Score]:
        most, scores = self._context + 1, []
        for _, after in pairs:
            if len(after) > self._context:
                raise UserError(f"a continuation has {len(after)} tokens, but the model reads {self._context}.")
        kept = [(before[max(len(before) + len(after) - most, 0) :], after) for before, after in pairs]
        step = 16 * self._batch  # rows of like length share a batch
        for first in tqdm(range(0, len(kept), step), disable=disable_tqdm, desc="loglikelihood"):
            scores += self.completer.score_tokens(kept[first : first + step], self._batch)
        return scores

    def _generation(self, arguments: dict[str, Any]) -> Generation:
        asked = dict(normalize_gen_kwargs(arguments, MAX_GEN_TOKS))
        generation = Generation(
            max_tokens=asked["max_gen_toks"],
            stop=tuple(filter(None, asked["until"])),
            temperature=float(asked.get("temperature", 0.0)),
            top_k=int(asked.get("top_k", 0)),
            top_p=float(asked.get("top_p", 1.0)),
        )
        generation.check(self.completer.config.vocab_size)
        if generation.max_tokens >= self._context:
            raise UserError(
                f"the task writes up to {generation.max_tokens} tokens, but the model reads {self._context}; "
                f"set a smaller number: --gen_kwargs max_gen_toks=N."
            )
        return generation

    def _shortened(self, text: str, most: int) -> str:
        """Cut the beginning of a text that has more than `most` tokens."""
        tokenizer, keep = self.completer.tokenizer, most - len(self.completer.encoder.prefix)
        (ids,) = tokenizer.encode_batch([text])
        for size in range(keep, 0, -1):  # what is left may be tokenized into more pieces
            if len(ids) <= keep:
                break
            text = tokenizer.decode(ids[-size:], stop=False)
            if len(tokenizer.encode_batch([text])[0]) <= keep:
                break
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
