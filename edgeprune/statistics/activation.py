"""What the layers behind a group read, batch after batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from edgeprune.core.records import Graph, Member
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import at_units, layer_name, reading_layers, recorded_inputs

LABELS = False
CLASSIFIER = False
BATCH = 32


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:
    """activation: (units, examples, places), of "in" members whose layer ran; once per batch."""
    layers = reading_layers(model, graph)
    for inputs, _ in batches:
        # Copies: the model may go on to change its own in place.
        with torch.no_grad(), recorded_inputs(layers, Tensor.clone) as read:
            model(*inputs)
        examples = len(inputs[0])

        def fill(member: Member, examples: int = examples, read: dict[str, list[Tensor]] = read) -> dict[str, Tensor]:
            name = layer_name(member)
            if member.role == "out" or name not in read:
                return {}
            return {"activation": at_units(layers[name], member, read[name], examples)}

        yield fill
