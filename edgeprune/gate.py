"""Let a model decide for every input what to compute: put gates in, set them after training, say what they do."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.core.errors import DataError, ModelError
from edgeprune.core.records import Gate, Gated
from edgeprune.gating import find_gates, load_gating
from edgeprune.graphs.capture import Inputs, capture
from edgeprune.graphs.choices import Decisions, find_choices
from edgeprune.graphs.lift import lift
from edgeprune.graphs.ports import get_ports, set_ports

Batches = Iterable[tuple[Any, Tensor]]


def gate_model(module: nn.Module, inputs: Inputs, gating: str) -> nn.Module:
    """A copy of a model with gates that are not trained yet: for a batch it computes everything and masks.

    inputs: example tensors, batch first. gating: a member of `gating/` and its options (`block_skip:rate=0.6`).
    returns: a module that trains (`recover_accuracy` with the same gating), with the model's keys in its state dict and
        those of its gates besides.
    raises: UsageError; ModelError where the model has no place for a gate, or has gates already.
    """
    if get_ports(module).gates:
        raise ModelError("the model has gates already; start from the one without")
    captured = capture(copy.deepcopy(module), inputs)
    if find_choices(captured):
        raise ModelError(
            "the model itself chooses for each example (`torch.where` on one boolean an example), which gates could "
            "not be told from; take a submodule without it"
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # so that a training that is resumed starts from the same gates
        placed = load_gating(gating).place(captured)
    calls = [str(node.target) for node in captured.graph.nodes if node.op == "call_module"]
    gates = tuple(path for path in calls if path in placed)
    captured.recompile()
    set_ports(captured, replace(get_ports(captured), gates=gates))
    return lift(captured).eval()


def settle_gates(module: nn.Module, inputs: Inputs, calibration: Batches, gating: str) -> Gated:
    """Set the thresholds of trained gates on calibration examples, in place.

    module: of `gate_model` with the same gating. calibration: (inputs, labels); best examples that it was not trained
        on, as it is too sure of others.
    returns: how often each gate runs there, and which always do the same.
    raises: UsageError; DataError without examples.
    """
    chosen, gates = load_gating(gating), find_gates(module)
    if not gates:
        raise ModelError("the model has no gates that can be set; make them anew with `gate_model`")
    batches = list(calibration)
    if not batches:
        raise DataError("gates are set on calibration examples; give the data source a .calibration")
    module.eval()
    decisions = Decisions(module, inputs)
    chosen.settle(module, gates, batches, lambda: decisions.count(batches))
    runs = decisions.count(batches)
    return Gated(
        gating=gating,
        gates={name: Gate(share=gates[name].share, runs=runs[name]) for name in get_ports(module).gates},
        examples=sum(len(targets) for _, targets in batches),
    )
