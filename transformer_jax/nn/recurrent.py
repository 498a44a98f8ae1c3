"""Recurrent cells, and the one place where something is repeated over time.

A cell meets its input in two matmuls. `project` reads all positions at once, before the recurrence: one large matmul,
[B, T, D] -> [B, T, Z, F]. `recurrent` reads the previous state and must wait for it: one small matmul a position.

Letters: Z gates, and F for the width D on the way out of a matmul. A recurrent weight is "DZF": D lies over the fsdp
axis of the mesh and F over its tensor axis, so that every device holds whole gates of its share of the units.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.nn.layers import Linear
from transformer_jax.nn.stack import REMAT_POLICIES
from transformer_jax.sharding import constrain

Module = TypeVar("Module", bound=nnx.Module)

State = tuple[jax.Array, ...]
"""What a cell remembers, each part float32 [B, D] and the output h first: (h,), or (h, c) for an LSTM."""


class Cell(nnx.Module):
    """Called as `cell(state, gates_BZF) -> state`, with the gates' share of the input already projected."""

    gates: ClassVar[int]
    parts: ClassVar[int] = 1
    """Vectors in the state."""

    def __init__(self, key: jax.Array, inputs: int, width: int, *, recurrent_bias: bool = False) -> None:
        project, recurrent = jax.random.split(key)
        gates = {"Z": self.gates, "F": width}
        self.project = Linear(project, {"D": inputs}, gates)
        self.recurrent = Linear(recurrent, {"D": width}, gates, bias=recurrent_bias)
        self.width = width

    @abc.abstractmethod
    def __call__(self, state: State, gates_BZF: jax.Array) -> State:
        """Take one step."""

    def zeros(self, rows: int) -> State:
        """Return the state before the first step."""
        return (jnp.zeros((rows, self.width), jnp.float32),) * self.parts

    def _recall(self, state: State, gates_BZF: jax.Array) -> jax.Array:
        # The matmul computes in the dtype of the input; all that follows is float32, as the state is.
        return constrain(self.recurrent(state[0].astype(gates_BZF.dtype)), "BZF").astype(jnp.float32)


class RNN(Cell):
    """h' = tanh(W x + U h + b) (Elman 1990)."""

    gates = 1

    def __call__(self, state: State, gates_BZF: jax.Array) -> State:
        """[B, Z=1, F] -> (h,)."""
        h_BF = jnp.tanh(gates_BZF + self._recall(state, gates_BZF))[:, 0]
        return (constrain(h_BF, "BD"),)


class LSTM(Cell):
    """c' = f c + i g, h' = o tanh(c'), gates in the order i, f, g, o.

    Hochreiter and Schmidhuber 1997, with the forget gate f of Gers 2000 and no peepholes.
    """

    gates = 4
    parts = 2

    def __call__(self, state: State, gates_BZF: jax.Array) -> State:
        """[B, Z=4, F] -> (h, c)."""
        i, f, g, o = jnp.moveaxis(gates_BZF + self._recall(state, gates_BZF), 1, 0)
        c_BF = constrain(jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g), "BF")
        return constrain(jax.nn.sigmoid(o) * jnp.tanh(c_BF), "BD"), c_BF


class GRU(Cell):
    """h' = (1 - z) n + z h, gates in the order r, z, n (Cho 2014, section 2.3).

    n = tanh(W x + b + r (U h + b')): the reset gate stands after the recurrent matmul, as in cuDNN and PyTorch, where
    the paper has U (r h). One matmul then serves all three gates, and it needs a bias of its own.
    """

    gates = 3

    def __init__(self, key: jax.Array, inputs: int, width: int) -> None:
        super().__init__(key, inputs, width, recurrent_bias=True)

    def __call__(self, state: State, gates_BZF: jax.Array) -> State:
        """[B, Z=3, F] -> (h,)."""
        read_BZF, recalled_BZF = gates_BZF.astype(jnp.float32), self._recall(state, gates_BZF)
        r, z = jnp.moveaxis(jax.nn.sigmoid(read_BZF[:, :2] + recalled_BZF[:, :2]), 1, 0)
        n = jnp.tanh(read_BZF[:, 2] + r * recalled_BZF[:, 2])
        return (constrain((1 - z) * n + z * state[0], "BD"),)


CELLS: dict[str, type[Cell]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def gathered(module: Module) -> Module:
    """Lay the parameters of a module out as activations, whole over the fsdp axis, before a loop that uses them.

    A loop would gather them anew at every step. It would also be wrong: with three axes of the mesh above 1, XLA
    (jax 0.10.2) partitions a recurrent matmul with a sharded D inside a loop into one with wrong gradients.
    """

    def gather(parameter: Any) -> Any:
        return parameter.replace(constrain(parameter[...], parameter.get_metadata("letters")))

    return jax.tree.map(gather, module, is_leaf=lambda node: isinstance(node, nnx.Param))


def recur(
    cell: Cell,
    gates_BTZF: jax.Array,
    state: State,
    mask_BT: jax.Array | None = None,
    *,
    first_BT: jax.Array | None = None,
    reverse: bool = False,
    remat: str = "none",
) -> tuple[jax.Array, State]:
    """Run a cell over time, given `cell.project` of all inputs.

    Where the mask is False the state stays as it is. So with padding at the end, the last state of a row is the one at
    its last real token; and in reverse, padding comes first and leaves the initial state untouched. Where `first_BT` is
    True a text begins: the cell forgets what it has read.

    Returns:
        The output h at every position [B, T, D], in the dtype of the gates, and the last state (in reverse: the one at
        the first position).
    """
    cell = gathered(cell)

    def step(state: State, now: Any, _: Any) -> tuple[jax.Array, State]:
        gates_BZF, real_B, first_B = now
        if first_B is not None:
            state = tuple(jnp.where(first_B[:, None], 0.0, part) for part in state)
        new = cell(state, gates_BZF)
        if real_B is not None:
            new = tuple(jnp.where(real_B[:, None], after, before) for after, before in zip(new, state, strict=True))
        return new[0].astype(gates_BZF.dtype), new

    return over_time(step, state, (gates_BTZF, mask_BT, first_BT), reverse=reverse, remat=remat)


def states_of(cell: Cell, gates_BTZF: jax.Array, state: State) -> State:
    """Run a cell over time, given `cell.project` of all inputs, and keep every state: its parts, float32 [B, T, D]."""
    cell = gathered(cell)

    def step(state: State, gates_BZF: jax.Array, _: Any) -> tuple[State, State]:
        new = cell(state, gates_BZF)
        return new, new

    return over_time(step, state, gates_BTZF)[0]


def over_time(
    step: Callable[[Any, Any, jax.Array | None], tuple[Any, Any]],
    state: Any,
    inputs: Any,
    *,
    key: jax.Array | None = None,
    reverse: bool = False,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Scan `step(state, inputs, key) -> (outputs, state)` over axis 1 of every input; stack the outputs there.

    Each step has a key of its own. `remat` names what the backward pass recomputes (`ComputeConfig.remat`).
    """
    length = jax.tree.leaves(inputs)[0].shape[1]
    keys = None if key is None else jax.random.split(key, length)
    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)

    def advance(state: Any, now: tuple[Any, jax.Array | None]) -> tuple[Any, Any]:
        outputs, state = step(state, *now)
        return state, outputs

    # One step, as in decoding, needs no loop.
    state, outputs = jax.lax.scan(advance, state, (_swap(inputs), keys), reverse=reverse, unroll=length == 1)
    return _swap(outputs), state


def _swap(tree: Any) -> Any:
    """Exchange batch and time of every leaf."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


class RecurrentLayer(nnx.Module):
    """A cell that reads forwards and, if bidirectional, another that reads backwards (Schuster and Paliwal 1997)."""

    def __init__(self, key: jax.Array, cell: type[Cell], inputs: int, width: int, *, bidirectional: bool) -> None:
        forwards, backwards = jax.random.split(key)
        self.forwards = cell(forwards, inputs, width)
        self.backwards = cell(backwards, inputs, width) if bidirectional else None

    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array, *, remat: str = "none") -> tuple[jax.Array, State]:
        """Return the outputs and the last state, both directions side by side (the backward one ends at the start)."""

        def read(cell: Cell, *, reverse: bool) -> tuple[jax.Array, State]:
            gates_BTZF = constrain(cell.project(x_BTD), "BTZF")
            return recur(cell, gates_BTZF, cell.zeros(len(x_BTD)), mask_BT, reverse=reverse, remat=remat)

        forwards = read(self.forwards, reverse=False)
        if self.backwards is None:
            return forwards
        backwards = read(self.backwards, reverse=True)
        return jax.tree.map(lambda *both: jnp.concatenate(both, axis=-1), forwards, backwards)
