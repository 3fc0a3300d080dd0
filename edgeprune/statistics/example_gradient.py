"""Gradient of every parameter, of one example after the other, with labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn

from edgeprune.core.records import Graph
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import held_gradients
from edgeprune.statistics._losses import sampled_loss

LABELS = False
CLASSIFIER = True
BATCH = 1
MOST = 256
"""Examples; each takes a pass of its own."""


def collect(
    model: nn.Module,
    graph: Graph,  # noqa: ARG001 the contract has it
    batches: Iterable[Batch],
    *,
    most: int = MOST,
) -> Iterator[Fill]:
    """gradient: (units, k), whose expected square is the diagonal of the true Fisher; once per example."""
    generator = torch.Generator().manual_seed(0)
    for inputs, _ in islice(batches, most):
        model.zero_grad(set_to_none=True)
        sampled_loss(model, inputs, generator).backward()
        yield held_gradients(model)
