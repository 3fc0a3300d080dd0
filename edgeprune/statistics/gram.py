"""Second moments XᵀX of what the layers behind a group multiply their weights with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgeprune.compensation.obs import collect_gram
from edgeprune.core.records import Graph, Member
from edgeprune.criteria import LayerView
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import (
    attached,
    layer_name,
    product_layers,
    split_groups,
    unit_positions,
    weight_matrix,
)

LABELS = False
CLASSIFIER = False
BATCH = 32


def split(model: nn.Module, graph: Graph) -> list[Graph]:
    """Parts whose second moments fit into memory."""
    return split_groups(model, graph, ("in",), outputs=False)


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:
    """layer: LayerView without outputs, of "in" members whose layer is a matrix product and ran; once."""
    layers = product_layers(model, graph, ("in",))
    grams: dict[str, Tensor] = {}

    def attach(name: str) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            gram = collect_gram(layers[name], arguments[0])
            assert gram is not None
            grams[name] = grams.get(name, 0) + gram

        return layers[name].register_forward_pre_hook(hook)

    with torch.no_grad(), attached(layers, attach):
        for inputs, _ in batches:
            model(*inputs)

    def fill(member: Member) -> dict[str, LayerView]:
        name = layer_name(member)
        if member.role == "out" or name not in grams:
            return {}
        layer = layers[name]
        return {"layer": LayerView(weight=weight_matrix(layer), inputs=grams[name], outputs=None,
                                   positions=unit_positions(layer, member))}  # fmt: skip

    yield fill
