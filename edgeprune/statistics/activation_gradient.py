"""What the layers behind a group read, and the gradient of each example's loss by it, batch after batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from edgeprune.core.records import Graph, Member
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import at_units, layer_name, reading_layers, recorded_inputs
from edgeprune.statistics._losses import cross_entropy, finite

LABELS = True
CLASSIFIER = True
BATCH = 16


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:
    """activation, activation_gradient: (units, examples, places), of "in" members whose layer ran; once per batch.

    The gradient is the part that goes through this layer: several layers may read one tensor.
    """
    layers = reading_layers(model, graph)
    for inputs, targets in batches:
        assert targets is not None
        model.zero_grad(set_to_none=True)
        with recorded_inputs(layers, _alias) as read:
            finite(cross_entropy(model, inputs, targets, "sum")).backward()
        examples = len(inputs[0])

        def fill(member: Member, examples: int = examples, read: dict[str, list[Tensor]] = read) -> dict[str, Tensor]:
            name = layer_name(member)
            if member.role == "out" or name not in read:
                return {}
            calls = read[name]
            slopes = [torch.zeros_like(x) if x.grad is None else x.grad for x in calls]
            return {
                "activation": at_units(layers[name], member, [x.detach() for x in calls], examples),
                "activation_gradient": at_units(layers[name], member, slopes, examples),
            }

        yield fill


def _alias(x: Tensor) -> Tensor:
    """The same values under a tensor of its own, whose gradient is kept."""
    alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    alias.retain_grad()
    return alias
