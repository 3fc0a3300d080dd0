"""Kronecker factors of each layer's Fisher (K-FAC: Martens and Grosse, ICML 2015, arXiv:1503.05671).

For convolutions as in Grosse and Martens, ICML 2016, arXiv:1602.01407: with a the input patch and g the
gradient of one example's loss at one output position, the Fisher of a layer's weights is approximated by
(sum over positions of E[a aᵀ]) ⊗ (mean over positions of E[g gᵀ]). Labels are drawn from the model, so
none are needed and it is the true Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgeprune.compensation._rows import Layer, by_group, count_positions
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
from edgeprune.statistics._losses import sampled_loss

LABELS = False
CLASSIFIER = True
BATCH = 4
"""What is kept for the backward pass grows with it, beside the factors of the layers."""
ROLES: tuple[Literal["out", "in"], ...] = ("out", "in")


def split(model: nn.Module, graph: Graph) -> list[Graph]:
    """Parts whose factors fit into memory."""
    return split_groups(model, graph, ROLES, outputs=True)


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:
    """layer: LayerView, of members whose layer is a matrix product and ran; once."""
    layers = product_layers(model, graph, ROLES)
    factors, examples = sum_factors(model, layers, batches)
    for sums in factors.values():  # where they lie, since of wide layers they are large
        sums.inputs.div_(examples)
        sums.outputs.div_(max(sums.positions, 1))

    def fill(member: Member) -> dict[str, LayerView]:
        name = layer_name(member)
        if name not in factors or not factors[name].positions:
            return {}
        layer, sums = layers[name], factors[name]
        return {"layer": LayerView(weight=weight_matrix(layer), inputs=sums.inputs, outputs=sums.outputs,
                                   positions=unit_positions(layer, member))}  # fmt: skip

    yield fill


@dataclass(slots=True)
class Factors:
    """Sums over positions and examples, per convolution group: a aᵀ (G, d, d) and g gᵀ (G, o, o)."""

    inputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    positions: int = 0

    def add_outputs(self, gradient: Tensor) -> None:
        """gradient: (G, positions, o), of the summed loss."""
        self.outputs = self.outputs + (gradient.transpose(1, 2) @ gradient).double()


def sum_factors(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Batch],
    moments: Callable[[Layer, Tensor], Tensor | None] = collect_gram,
) -> tuple[dict[str, Factors], int]:
    """Both factors of layers of the model, in evaluation, and the number of examples.

    moments: a aᵀ (G, d, d) of what a layer reads, in float64; of patches, or of another view of its inputs.
    """
    factors = {name: Factors() for name in layers}

    def attach(name: str) -> RemovableHandle:
        layer, sums = layers[name], factors[name]

        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            x = arguments[0].detach()
            gram = moments(layer, x)
            assert gram is not None
            sums.inputs = gram if sums.inputs.ndim == 0 else sums.inputs.add_(gram)
            sums.positions += count_positions(layer, x)
            output.register_hook(lambda gradient: sums.add_outputs(by_group(layer, gradient)))

        return layer.register_forward_hook(hook)

    generator, examples = torch.Generator().manual_seed(0), 0
    with attached(layers, attach):
        for inputs, _ in batches:
            model.zero_grad(set_to_none=True)
            sampled_loss(model, inputs, generator).backward()
            examples += len(inputs[0])
    return factors, examples
