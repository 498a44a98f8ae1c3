"""Text becomes the tokens a decoder-only model reads, with one line for what it cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import tokenizers

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError


@dataclass(frozen=True)
class PromptEncoder:
    """How a model wants to be prompted: what comes before a text, and how much of it can be read."""

    tokenizer: Tokenizer
    context: int
    """Most tokens of a prompt."""

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer's own file puts before every text: <s> for Llama, nothing for GPT-2."""
        inner = tokenizers.Tokenizer.from_str(self.tokenizer.to_json())
        return list(takewhile(lambda i: i != self.tokenizer.eos, inner.encode("", add_special_tokens=True).ids))

    @property
    def start(self) -> list[int]:
        """What stands for no text at all: the prefix, or the token that ends a text and so comes before the next."""
        return self.prefix or [i for i in (self.tokenizer.eos, self.tokenizer.bos) if i is not None][:1]

    def encode(self, prompts: Sequence[str], where: str = "the prompt") -> list[list[int]]:
        """Return the tokens of each prompt, at least one.

        Raises:
            UserError: text the tokenizer does not know, nothing to start from, or more tokens than the context;
                `where` names the prompts, and of several the line is added.
        """
        encoded = []
        for number, ids in enumerate(self._encode(prompts, where), 1):
            read, place = ids or self.start, _place(where, number, prompts)
            if not read:
                raise UserError(f"{place} is empty, and the tokenizer has no token to begin with; write a word.")
            if len(read) > self.context:
                raise UserError(
                    f"{place} has {len(read)} tokens, but the model reads at most {self.context}; "
                    f"shorten it by {len(read) - self.context}."
                )
            encoded.append(read)
        return encoded

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of contexts, at least one, and of their continuations, of whatever length.

        A pair is tokenized as one text. Blanks at the end of a context count to the continuation, where most
        tokenizers keep them; a token that both share counts to the context.

        Raises:
            UserError: text the tokenizer does not know, a continuation without tokens, or an empty context and no
                token to stand for it.
        """
        wholes = self._encode([context + continuation for context, continuation in pairs], "the text")
        contexts = self._encode([context.rstrip() for context, _ in pairs], "the context")
        encoded = []
        for (_, continuation), whole, context in zip(pairs, wholes, contexts, strict=True):
            before, after = whole[: len(context)] or self.start, whole[len(context) :]
            if not before:
                raise UserError("a context is empty, and the tokenizer has no token to stand for it; write a word.")
            if not after:
                raise UserError(f"the continuation '{continuation}' has no token of its own; write more of it.")
            encoded.append((before, after))
        return encoded

    def _encode(self, texts: Sequence[str], where: str) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(texts)
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), 1):
            if self.tokenizer.unk in ids:
                _, offsets = self.tokenizer.encode_with_offsets([text])[0]
                begin, end = offsets[ids.index(self.tokenizer.unk)]
                raise UserError(
                    f"{_place(where, number, texts)}: the tokenizer does not know '{text[begin:end]}' (character "
                    f"{begin + 1}); it was made of text without it."
                )
        return [self.prefix + ids for ids in encoded]


def _place(where: str, number: int, texts: Sequence[str]) -> str:
    return where if len(texts) == 1 else f"{where}, line {number}"
