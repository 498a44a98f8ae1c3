"""The recurrent encoder-decoders before the Transformer: one context vector, then attention.

    Cho 2014, Sutskever 2014   the decoder knows the source by one vector, the encoder's last state
    Bahdanau 2015              it attends to all of the encoder's outputs, before each step of its cell
    Luong 2015                 it attends after the cell; with input feeding the next step reads what was found

What can wait for no earlier step is computed for all positions at once: input projections, output projections, and
the attention of Luong 2015 without input feeding.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ComputeConfig, ModelConfig
from transformer_jax.errors import UserError
from transformer_jax.nn.alignment import Additive, Multiplicative, Seen
from transformer_jax.nn.layers import Embedding, Linear, dropout, split
from transformer_jax.nn.recurrent import CELLS, RecurrentLayer, State, gathered, over_time, recur
from transformer_jax.sharding import constrain


@dataclass(frozen=True)
class RNNSeq2SeqConfig(ModelConfig):
    """Sizes and parts; the defaults are the network of Sutskever 2014, section 3.4, with one joint vocabulary."""

    vocab_size: int = 80_000
    """Joint vocabulary of source and target, padding and special tokens included."""
    width: int = 1000
    """Units of each cell, and of the attention."""
    embedding: int = 1000
    """Channels of a token vector."""
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    encoder_layers: int = 4
    decoder_layers: int = 4
    bidirectional: bool = False
    """Every encoder layer reads in both directions."""
    reverse_source: bool = False
    """Read the source from its last token to its first (Sutskever 2014, section 3.3)."""
    attention: Literal["none", "additive", "dot", "general"] = "none"
    """additive: Bahdanau 2015, before the cell; dot and general: Luong 2015, after it."""
    feed_context: bool = False
    """Without attention: the context vector enters every step (Cho 2014, section 2.2), not only the first state."""
    input_feeding: bool = False
    """The attentional vector of a step enters the next one (Luong 2015, section 3.3)."""
    maxout: int = 0
    """Units of a maxout layer that reads state, last token and context; 0 leaves it out.

    Bahdanau 2015, A.2.2, but with the new state s_i of the paper's equation 4, where the appendix prints s_{i-1}.
    """
    tied: bool = False
    """One embedding for source, target and output, scaled by sqrt(embedding) on the way in (Vaswani 2017, section 3.4).

    The papers have three, unscaled.
    """
    dropout: float = 0.0
    """On embeddings and on the output of every layer, never from step to step (Zaremba 2014)."""
    init_scale: float = 0.0
    """Draw every parameter uniformly in +- this (Sutskever 2014: 0.08; Luong 2015: 0.1); 0: as elsewhere here."""

    def check(self) -> None:
        """Raise `UserError` if a size is not positive or the parts do not fit together."""
        for name in ("vocab_size", "width", "embedding", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must lie in [0, 1), got {self.dropout}.")
        if min(self.maxout, self.init_scale) < 0:
            raise UserError(f"model.maxout={self.maxout} and init_scale={self.init_scale} must not be negative.")
        luong = self.attention in ("dot", "general")
        if self.input_feeding and not luong:
            raise UserError(f"model.input_feeding needs attention dot or general, got '{self.attention}'.")
        if self.maxout and luong:
            raise UserError(f"model.maxout={self.maxout}: the attentional vector of '{self.attention}' stands there.")
        if self.feed_context and self.attention != "none":
            raise UserError(f"model.feed_context needs attention none, got '{self.attention}'.")
        if self.attention == "dot" and self.bidirectional:
            raise UserError(
                f"model.attention=dot: a bidirectional encoder's {self.memory_width} channels do not match "
                f"model.width={self.width}; use general."
            )
        if self.tied and (self.maxout or self.width) != self.embedding:
            raise UserError(
                f"model.tied: model.{'maxout' if self.maxout else 'width'}={self.maxout or self.width} is projected "
                f"by the embedding, so it must be model.embedding={self.embedding}."
            )

    @property
    def memory_width(self) -> int:
        """Channels of the encoder's outputs."""
        return self.width * (1 + self.bidirectional)

    @property
    def fed_width(self) -> int:
        """Channels of what enters the decoder's first cell beside the token."""
        if self.attention == "additive":
            return self.memory_width
        return self.width * (self.feed_context or self.input_feeding)

    def build(self, key: jax.Array, compute: ComputeConfig) -> RNNSeq2Seq:
        """Construct the module."""
        return RNNSeq2Seq(key, self, compute)

    def forward_flops(self, batch: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs to read "source" [B, S] and write "target" [B, T + 1].

        What is multiplied once a sentence is left out, but for the context that is fed to every step: it is added up
        there, and multiplied once.
        """
        rows, s = batch["source"]
        h, m, t = self.width, self.memory_width, batch["target"][1] - 1
        gates = CELLS[self.cell].gates * h
        encoder = sum(s * 2 * gates * (i + h) for i in [self.embedding, *[m] * (self.encoder_layers - 1)])
        decoder = sum(t * 2 * gates * (i + h) for i in [self.embedding, *[h] * (self.decoder_layers - 1)])
        decoder += (1 if self.feed_context else t) * 2 * gates * self.fed_width
        if self.attention != "none":
            decoder += 2 * t * s * (h + m)
        if self.attention in ("additive", "general"):
            decoder += s * 2 * m * h
        decoder += t * 2 * h * {"none": 0, "additive": h}.get(self.attention, m + h)
        decoder += t * 2 * (h + self.embedding + self.fed_width) * 2 * self.maxout
        head = t * 2 * (self.maxout or h) * self.vocab_size
        return rows * (encoder * (1 + self.bidirectional) + decoder + head)


class Memory(NamedTuple):
    """What the encoder hands to the decoder."""

    x_BSD: jax.Array
    segments_BS: jax.Array
    final: list[State]
    """The last state of each layer; both directions side by side, of which the backward one ends at the start."""


class Decoded(NamedTuple):
    """What a decoder says about T positions."""

    h_BTD: jax.Array
    context_BTD: jax.Array | None
    """What it read of the source, the same for all T (T = 1) if there is no attention."""
    weights_BTS: jax.Array | None
    """Attention weights."""


class Decoder(nnx.Module):
    """A stack of cells; each subclass is one paper's way from the source to them.

    Its state is a pytree whose every leaf leads with the rows, so a beam is reordered by indexing.
    """

    def __init__(self, key: jax.Array, config: RNNSeq2SeqConfig, compute: ComputeConfig) -> None:
        cells, feed, bridge = jax.random.split(key, 3)
        layers, width, cell = config.decoder_layers, config.width, CELLS[config.cell]
        self.config = config
        self.remat = compute.remat
        inputs = [config.embedding, *[width] * (layers - 1)]
        self.cells = nnx.List(
            [cell(k, size, width) for k, size in zip(jax.random.split(cells, layers), inputs, strict=True)]
        )
        # The first cell reads [token; fed]: the tokens' share for all positions at once, this one when it is known.
        gates, fed = {"Z": cell.gates, "F": width}, config.fed_width
        self.feed = Linear(feed, {"D": fed}, gates, bias=False) if fed else None
        matches = config.encoder_layers == layers and not config.bidirectional and not config.feed_context
        read = width if config.attention == "additive" or config.feed_context else config.memory_width
        self.bridge = None if matches else Linear(bridge, {"D": read}, {"Z": layers * cell.parts, "F": width})

    @abc.abstractmethod
    def begin(self, memory: Memory) -> tuple[Any, Any]:
        """Return the state before the first token, and what every step reads and none changes."""

    @abc.abstractmethod
    def __call__(
        self, state: Any, memory: Any, y_BTD: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[Decoded, Any]:
        """Read T embedded tokens, from any state on."""

    def first_states(self, final: list[State], h_BD: jax.Array) -> list[State]:
        """Take over the encoder's states where the layers match; else tanh(W h) for each (Bahdanau 2015, A.2.2)."""
        if self.bridge is None:
            return final
        parts = list(jnp.moveaxis(jnp.tanh(self.bridge(h_BD)).astype(jnp.float32), 1, 0))
        n = self.cells[0].parts
        return [tuple(parts[i : i + n]) for i in range(0, len(parts), n)]

    def tokens(self, y_BTD: jax.Array) -> jax.Array:
        """Return the tokens' share of the first cell's gates."""
        return constrain(self.cells[0].project(y_BTD), "BTZF")

    def enter(self, gates_BTZF: jax.Array, fed_BTD: jax.Array | None) -> jax.Array:
        """Add the share of what is fed to the first cell beside the tokens, if something is."""
        return gates_BTZF if self.feed is None or fed_BTD is None else gates_BTZF + self.feed(fed_BTD)

    def run(self, states: list[State], gates_BTZF: jax.Array, key: jax.Array | None) -> tuple[jax.Array, list[State]]:
        """Run the cells over T positions, one layer after the other."""
        keys = split(key, len(self.cells))
        last = []
        for i, cell in enumerate(self.cells):
            h_BTD, state = recur(cell, gates_BTZF, states[i], remat=self.remat)
            h_BTD = dropout(h_BTD, self.config.dropout, keys[i])
            last.append(state)
            if i + 1 < len(self.cells):
                gates_BTZF = constrain(self.cells[i + 1].project(h_BTD), "BTZF")
        return h_BTD, last

    def one_by_one(
        self, read: Callable[..., tuple[Decoded, Any]], state: Any, gates_BTZF: jax.Array, key: jax.Array | None
    ) -> tuple[Decoded, Any]:
        """Call `read(state, gates_BTZF, key)` with T = 1 for every position: each step needs what the last found."""

        def step(state: Any, gates_BZF: jax.Array, key: jax.Array | None) -> tuple[Decoded, Any]:
            decoded, state = read(state, gates_BZF[:, None], key)
            return jax.tree.map(lambda x: x[:, 0], decoded), state

        return over_time(step, state, gates_BTZF, key=key, remat=self.remat)


class ContextDecoder(Decoder):
    """Without attention: the source is a first state (Sutskever 2014), or a vector that enters every step (Cho 2014).

    The latter is c = tanh(V h) of the encoder's last output h, and the first state is then tanh(V' c).
    """

    def __init__(self, key: jax.Array, config: RNNSeq2SeqConfig, compute: ComputeConfig) -> None:
        stack, summary = jax.random.split(key)
        super().__init__(stack, config, compute)
        self.summary = Linear(summary, {"D": config.memory_width}, {"F": config.width}) if config.feed_context else None

    def begin(self, memory: Memory) -> tuple[list[State], jax.Array | None]:
        """Return the first states and the context vector [B, D], if it enters every step."""
        h_BD = _top(memory.final, memory.x_BSD.dtype)
        if self.summary is None:
            return self.first_states(memory.final, h_BD), None
        context_BD = jnp.tanh(self.summary(h_BD))
        return self.first_states(memory.final, context_BD), context_BD

    def __call__(
        self, state: list[State], memory: jax.Array | None, y_BTD: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[Decoded, list[State]]:
        """Read T tokens, all at once in each layer."""
        context_BTD = None if memory is None else memory[:, None]
        h_BTD, state = self.run(state, self.enter(self.tokens(y_BTD), context_BTD), key)
        return Decoded(h_BTD, context_BTD, None), state


class BahdanauDecoder(Decoder):
    """Attention before the cell: the state after the last token asks, the answer enters with the next (A.2.2).

    The first state is tanh(W h) of the backward cell's last output, as published.
    """

    def __init__(self, key: jax.Array, config: RNNSeq2SeqConfig, compute: ComputeConfig) -> None:
        stack, attention = jax.random.split(key)
        super().__init__(stack, config, compute)
        self.attention = Additive(attention, config.width, config.memory_width)

    def begin(self, memory: Memory) -> tuple[list[State], Seen]:
        """Return the first states and what attention looks at."""
        h_BD = _top(memory.final, memory.x_BSD.dtype)
        seen = self.attention.look_at(memory.x_BSD, memory.segments_BS)
        return self.first_states(memory.final, h_BD[:, -self.config.width :]), seen

    def __call__(
        self, state: list[State], memory: Seen, y_BTD: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[Decoded, list[State]]:
        """Read T tokens one by one."""

        def read(state: list[State], gates_B1ZF: jax.Array, key: jax.Array | None) -> tuple[Decoded, list[State]]:
            context_B1D, weights_B1S = self.attention(_top(state, y_BTD.dtype)[:, None], memory)
            h_B1D, state = self.run(state, self.enter(gates_B1ZF, context_B1D), key)
            return Decoded(h_B1D, context_B1D, weights_B1S), state

        return self.one_by_one(read, state, self.tokens(y_BTD), key)


class LuongState(NamedTuple):
    """The states of the cells, and the last attentional vector."""

    cells: list[State]
    attentional_BD: jax.Array


class LuongDecoder(Decoder):
    """Attention after the cells; the attentional vector tanh(W [context; h]) predicts (Luong 2015, equation 5)."""

    def __init__(self, key: jax.Array, config: RNNSeq2SeqConfig, compute: ComputeConfig) -> None:
        stack, attention, combine = jax.random.split(key, 3)
        super().__init__(stack, config, compute)
        general = config.attention == "general"
        self.attention = Multiplicative(attention, config.width, config.memory_width, general=general)
        self.combine = Linear(combine, {"D": config.memory_width + config.width}, {"F": config.width}, bias=False)

    def begin(self, memory: Memory) -> tuple[LuongState, Seen]:
        """Return the first states, with a vector of zeros, and what attention looks at."""
        h_BD = _top(memory.final, memory.x_BSD.dtype)
        zeros_BD = jnp.zeros((len(h_BD), self.config.width), h_BD.dtype)
        seen = self.attention.look_at(memory.x_BSD, memory.segments_BS)
        return LuongState(self.first_states(memory.final, h_BD), zeros_BD), seen

    def __call__(
        self, state: LuongState, memory: Seen, y_BTD: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[Decoded, LuongState]:
        """Read T tokens: one by one with input feeding, else all at once in each layer and in the attention."""

        def read(state: LuongState, gates_BTZF: jax.Array, key: jax.Array | None) -> tuple[Decoded, LuongState]:
            gates_BTZF = self.enter(gates_BTZF, state.attentional_BD[:, None])
            h_BTD, cells = self.run(state.cells, gates_BTZF, key)
            context_BTD, weights_BTS = self.attention(h_BTD, memory)
            h_BTD = jnp.tanh(self.combine(jnp.concatenate([context_BTD, h_BTD], axis=-1)))
            return Decoded(h_BTD, context_BTD, weights_BTS), LuongState(cells, h_BTD[:, -1])

        gates_BTZF = self.tokens(y_BTD)
        if self.feed is None:
            return read(state, gates_BTZF, key)
        return self.one_by_one(read, state, gates_BTZF, key)


DECODERS: dict[str, Callable[..., Decoder]] = {
    "none": ContextDecoder,
    "additive": BahdanauDecoder,
    "dot": LuongDecoder,
    "general": LuongDecoder,
}


class RNNSeq2Seq(nnx.Module):
    """Encoder and decoder over one vocabulary; token 0 is padding."""

    def __init__(self, key: jax.Array, config: RNNSeq2SeqConfig, compute: ComputeConfig) -> None:
        source, target, output, encoder, decoder, maxout = jax.random.split(key, 6)
        width, embedding, pieces = config.width, config.embedding, {"F": config.maxout, "Z": 2}
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.remat = compute.remat
        self.embedding = Embedding(source, config.vocab_size, embedding)
        self.target_embedding = None if config.tied else Embedding(target, config.vocab_size, embedding)
        self.output = None if config.tied else Embedding(output, config.vocab_size, config.maxout or width)
        inputs = [embedding, *[config.memory_width] * (config.encoder_layers - 1)]
        self.encoder = nnx.List(
            RecurrentLayer(k, CELLS[config.cell], size, width, bidirectional=config.bidirectional)
            for k, size in zip(jax.random.split(encoder, config.encoder_layers), inputs, strict=True)
        )
        self.decoder = DECODERS[config.attention](decoder, config, compute)
        read = width + embedding + config.fed_width
        self.maxout = Linear(maxout, {"D": read}, pieces) if config.maxout else None
        if config.init_scale:
            _draw_uniformly(self, key, config.init_scale)

    def __call__(self, source_BS: jax.Array, target_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Teacher forcing: logits [B, T, V] of the token that follows each of `target_BT`."""
        encoder_key, decoder_key = split(key, 2)
        state, memory = self.decoder.begin(self.encode(source_BS, key=encoder_key))
        return self._decode(state, memory, target_BT, decoder_key)[0]

    def encode(self, source_BS: jax.Array, *, key: jax.Array | None = None) -> Memory:
        """Read the source: [B, S] -> [B, S, D], in the order of `source_BS` even if it is read in reverse."""
        keys = split(key, len(self.encoder) + 1)
        segments_BS = (source_BS != 0).astype(jnp.int32)
        ids_BS = _reversed(source_BS, segments_BS) if self.config.reverse_source else source_BS
        x_BSD = self._embed(self.embedding, ids_BS, keys[0])
        final = []
        for layer, layer_key in zip(self.encoder, keys[1:], strict=True):
            x_BSD, state = layer(x_BSD, segments_BS != 0, remat=self.remat)
            x_BSD = dropout(constrain(x_BSD, "BSD"), self.config.dropout, layer_key)
            final.append(state)
        return Memory(_reversed(x_BSD, segments_BS) if self.config.reverse_source else x_BSD, segments_BS, final)

    def start(self, source_BS: jax.Array, max_length: int) -> tuple[Any, Any]:
        """Prepare decoding: what changes (the state of each row) and what stays; any length fits in a state."""
        del max_length
        return self.decoder.begin(self.encode(source_BS))

    def step(self, state: Any, memory: Any, token_B: jax.Array) -> tuple[jax.Array, Any]:
        """Decode one token for every row: logits [B, V] of the next one, and the new state."""
        logits_B1V, _, state = self._decode(state, memory, token_B[:, None], None)
        return logits_B1V[:, 0], state

    def attention_maps(self, source_BS: jax.Array, target_BT: jax.Array) -> dict[str, jax.Array]:
        """Attention weights of a source and a target: {"cross": [L=1, B, N=1, T, S]}, or {} without attention."""
        state, memory = self.start(source_BS, target_BT.shape[1])
        weights_BTS = self._decode(state, memory, target_BT, None)[1].weights_BTS
        return {} if weights_BTS is None else {"cross": weights_BTS[None, :, None]}

    def _decode(
        self, state: Any, memory: Any, target_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Decoded, Any]:
        """Read T tokens from a state on: logits [B, T, V], what the decoder said, and the new state."""
        embed_key, key = split(key, 2)
        y_BTD = self._embed(self.target_embedding or self.embedding, target_BT, embed_key)
        decoded, state = gathered(self.decoder)(state, memory, y_BTD, key=key)
        x_BTD = decoded.h_BTD
        if self.maxout is not None:
            seen = [x for x in (x_BTD, y_BTD, decoded.context_BTD) if x is not None]
            seen = [jnp.broadcast_to(x, (*target_BT.shape, x.shape[-1])) for x in seen]
            x_BTD = self.maxout(jnp.concatenate(seen, axis=-1)).max(-1)
        logits_BTV = constrain((self.output or self.embedding).logits(x_BTD), "BTV")
        return logits_BTV, decoded, state

    def _embed(self, embedding: Embedding, ids_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BTD = embedding(ids_BT, self.dtype)
        if self.config.tied:
            x_BTD *= jnp.asarray(self.config.embedding**0.5, self.dtype)
        return dropout(constrain(x_BTD, "BTD"), self.config.dropout, key)


def _top(states: list[State], dtype: jnp.dtype) -> jax.Array:
    """Return the output h of the top layer, [B, D], for a matmul."""
    return states[-1][0].astype(dtype)


def _reversed(x: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Reverse the real positions of each row of x [B, S, ...]; padding stays at the end."""
    length_B1, position_S = segments_BS.sum(-1, keepdims=True), jnp.arange(x.shape[1])
    index_BS = jnp.where(position_S < length_B1, length_B1 - 1 - position_S, position_S)
    return jax.vmap(lambda row, index: row[index])(x, index_BS)


def _draw_uniformly(model: nnx.Module, key: jax.Array, scale: float) -> None:
    parameters = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]
    for parameter, k in zip(parameters, jax.random.split(key, len(parameters)), strict=True):
        parameter[...] = jax.random.uniform(k, parameter.shape, minval=-scale, maxval=scale)
