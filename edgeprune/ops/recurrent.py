"""LSTM, GRU and plain recurrent layers: the hidden width is a channel axis, the same for all layers and directions."""

from __future__ import annotations

import numpy as np

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(call: Call) -> list[Axes]:
    """Parameters per layer and direction: w_ih (gates H, inputs), w_hh (gates H, H), two biases where it has them."""
    x, states, parameters = call.value("input"), call.plain("hx"), call.plain("params")
    states = states if isinstance(states, list) else [states]
    directions, each = 2 if call.plain("bidirectional") else 1, 4 if call.plain("has_biases") else 2
    if len(parameters) != call.plain("num_layers") * directions * each:
        raise NoRule("hidden states that are projected")
    layers = [parameters[i : i + each] for i in range(0, len(parameters), each)]
    hidden: Axis = None
    for _, recurrence, *_ in layers:
        hidden = _tie_present(call, hidden, recurrence.axes[1])
    for state in states:
        call.freeze(state.axes[0], "is the axis of the layers")
        hidden = _tie_present(call, hidden, state.axes[2])
    for weights in layers:
        for own in weights:
            call.tie(call.tie_parts(own.axes[0], GATES[call.op]), hidden)
    both = None if hidden is None else np.tile(hidden, directions)
    for number, (reading, recurrence, *_) in enumerate(layers):
        first = number < directions
        call.contract(x.axes[2] if first else both, x.fixed_because, reading, 1)
        call.contract(hidden, "", recurrence, 1)
    call.masked = all(state.masked for state in states)  # a unit that starts at zero and is fed zeros stays there
    for axis in x.axes[:2]:
        call.freeze(axis, "is a step of a recurrent layer")
    return [(None, None, both), *[(None, None, hidden) for _ in states]]


def _tie_present(call: Call, left: Axis, right: Axis) -> Axis:
    return right if left is None else call.tie(left, right)


RULES: dict[str, Rule] = dict.fromkeys(GATES, recurrent)
