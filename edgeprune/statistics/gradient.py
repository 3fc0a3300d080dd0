"""Gradient of every parameter, of one batch's mean loss after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from edgeprune.core.records import Graph
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import held_gradients
from edgeprune.statistics._losses import cross_entropy, finite

LABELS = True
CLASSIFIER = True
BATCH = 16
"""Squared means of small batches stay apart from noise at a trained minimum."""


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:  # noqa: ARG001 the contract has it
    """gradient: (units, k), 0 for a parameter that the loss does not reach; once per batch."""
    for inputs, targets in batches:
        assert targets is not None
        model.zero_grad(set_to_none=True)
        finite(cross_entropy(model, inputs, targets)).backward()
        yield held_gradients(model)
