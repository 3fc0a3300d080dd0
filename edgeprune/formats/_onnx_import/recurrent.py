"""ONNX operators that run over a sequence: LSTM, GRU, RNN, as one layer of torch each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported

ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Where torch's gates (LSTM: i f g o, GRU: r z n) stand in ONNX's order (i o f c, z r h)."""
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("LSTM", "sigmoid tanh tanh"): torch.lstm,
    ("GRU", "sigmoid tanh"): torch.gru,
    ("RNN", "tanh"): torch.rnn_tanh,
    ("RNN", "relu"): torch.rnn_relu,
}
USUAL = {"LSTM": "sigmoid tanh tanh", "GRU": "sigmoid tanh", "RNN": "tanh"}
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}


def _recurrent(op: Operation) -> Result:
    """X (steps, batch, inputs), W (directions, gates hidden, inputs), R, B, lengths, initial states."""
    direction, hidden = op.attribute("direction", "forward"), op.attribute("hidden_size")
    if op.has(4) or op.has(7) or op.attribute("layout", 0) or op.attribute("clip", 0.0):
        raise Unsupported("lengths of sequences, peepholes, a clip, or batches first")
    if op.attribute("input_forget", 0) or (op.kind == "GRU" and not op.attribute("linear_before_reset", 0)):
        raise Unsupported("coupled gates, or a reset before the product; torch has neither")
    both = direction == "bidirectional"
    function = FUNCTIONS.get((op.kind, _activations(op, 2 if both else 1)))
    if function is None:
        raise Unsupported(f"activations {op.attribute('activations')}")
    parameters = [parameter for way in range(2 if both else 1) for parameter in _parameters(op, way, hidden)]
    x = op.call(torch.flip, op.flow(0), [0]) if direction == "reverse" else op.flow(0)
    states = [_state(op, 5 + place, 2 if both else 1, hidden) for place in range(STATES[op.kind])]
    given = states if op.kind == "LSTM" else states[0]
    found = op.call(function, x, given, parameters, op.has(3), 1, 0.0, False, both, False)
    steps = op.call(_by_direction, op.call(operator.getitem, found, 0), hidden)
    steps = op.call(torch.flip, steps, [0]) if direction == "reverse" else steps
    return (steps, *(op.call(operator.getitem, found, 1 + place) for place in range(STATES[op.kind])))


def _activations(op: Operation, directions: int) -> str:
    """Those of one direction, when both have the same."""
    given = [text.decode() if isinstance(text, bytes) else text for text in op.attribute("activations", [])]
    each = len(given) // directions
    if given[:each] != given[each:] and directions == 2:
        return "unlike"
    return " ".join(given[:each]).lower() or USUAL[op.kind]


def _parameters(op: Operation, way: int, hidden: int) -> list[Any]:
    suffix = "_l0_reverse" if way else "_l0"
    names = {1: ("weight_ih",), 2: ("weight_hh",), 3: ("bias_ih", "bias_hh")}
    found = []
    for index, parts in names.items():
        for part, name in enumerate(parts if op.has(index) else ()):
            given = np.split(op.constant(index)[way], len(parts))[part]
            gates = given.reshape(len(ORDER[op.kind]), hidden, -1)[list(ORDER[op.kind])]
            found.append(op.layer_weight(index, name + suffix, gates.reshape(given.shape)))
    return found


def _state(op: Operation, index: int, directions: int, hidden: int) -> Any:
    """The initial state; one that is known is the same for every example."""
    if op.has(index) and not op.is_constant(index):
        return op.flow(index)
    known = op.constant(index) if op.has(index) else np.zeros((directions, 1, hidden), np.float32)
    if not known.any():
        return op.call(_zeros, op.flow(0), directions, hidden)
    if (known != known[:, :1]).any():
        raise Unsupported("initial states that differ between examples")
    return op.call(_for_each, op.buffer(known[:, :1]), op.flow(0))


def _zeros(x: Tensor, directions: int, hidden: int) -> Tensor:
    return x.new_zeros(directions, x.shape[1], hidden)


def _for_each(state: Tensor, x: Tensor) -> Tensor:
    return state.repeat(1, x.shape[1], 1)


def _by_direction(steps: Tensor, hidden: int) -> Tensor:
    """(steps, batch, directions hidden) -> (steps, directions, batch, hidden)."""
    return torch.unflatten(steps, 2, (-1, hidden)).permute(0, 2, 1, 3)


OPERATORS: dict[str, Operator] = {"GRU": _recurrent, "LSTM": _recurrent, "RNN": _recurrent}
