"""The decoder of GPT on vectors: it reads a function's inputs and values, and predicts the next value (Garg 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer_jax.config import ComputeConfig
from transformer_jax.errors import UserError
from transformer_jax.models.decoder import Decoder, DecoderConfig
from transformer_jax.nn.layers import Linear


@dataclass(frozen=True)
class InContextGPTConfig(DecoderConfig):
    """Sizes; the defaults are those of Garg 2022, appendix A.1, the context too."""

    context: int = 101
    """Most positions that are read at once: two for an example, one for the last input."""
    width: int = 256
    heads: int = 8
    inputs: int = 20
    """Numbers of an input."""

    def check(self) -> None:
        """Raise `UserError` if sizes do not fit together."""
        super().check()
        if self.inputs < 1:
            raise UserError(f"model.inputs must be at least 1, got {self.inputs}.")
        if self.vocab_size:
            raise UserError(f"model.vocab_size must be 0, got {self.vocab_size}: this model reads no tokens.")

    def build(self, key: jax.Array, compute: ComputeConfig) -> InContextGPT:
        """Construct the module."""
        return InContextGPT(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs of the matrix products that read "inputs" [B, P, Z]."""
        rows, points, inputs = batch["inputs"]
        length = 2 * points - 1
        return rows * (self.block_flops(length) + 2 * self.width * (inputs * length + points))


class InContextGPT(Decoder):
    """x_1, y_1, x_2, y_2, ... as positions of one row, each a vector; what stands above x_k predicts y_k."""

    def __init__(self, key: jax.Array, config: InContextGPTConfig, compute: ComputeConfig) -> None:
        read_in, positions, blocks, read_out = jax.random.split(key, 4)
        super().__init__(positions, blocks, config, compute)
        self.config = config
        self.read_in = Linear(read_in, {"Z": config.inputs}, {"D": config.width})
        self.read_out = Linear(read_out, {"D": config.width}, {"Z": 1})

    def predict(
        self, inputs_BPZ: jax.Array, values_BP: jax.Array, segments_BP: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Predict every value from its input and the examples before it: float32 [B, P].

        Raises:
            UserError: inputs of another size than the model's, or more of them than its context holds.
        """
        points, size = inputs_BPZ.shape[1:]
        length, config = 2 * points - 1, self.config
        if length > config.context:
            raise UserError(
                f"{points} examples take {length} positions, but model.context={config.context}; "
                f"set --model.context {length}."
            )
        if size != config.inputs:
            raise UserError(f"the data has inputs of {size} numbers, but model.inputs={config.inputs}; set both alike.")
        # A value stands in the first number of its vector.
        values_BPZ = jnp.zeros_like(inputs_BPZ).at[..., 0].set(values_BP)
        interleaved_BTZ = jnp.stack([inputs_BPZ, values_BPZ], axis=2).reshape(-1, 2 * points, size)
        x_BTD = self.read_in(interleaved_BTZ[:, :length].astype(self.dtype))
        x_BTD, _ = self.decode(x_BTD, jnp.repeat(segments_BP, 2, axis=1)[:, :length], key=key)
        return self.read_out(x_BTD[:, ::2])[..., 0].astype(jnp.float32)
