"""Layers of a model by the parameter that a group is coupled through, watched while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgeprune.compensation._rows import MAX_FEATURES, Layer, is_plain
from edgeprune.core.records import Graph, Group, IntArray, Member
from edgeprune.statistics import Fill

Reader = nn.modules.conv._ConvNd | nn.Linear
MOMENT_BYTES = 512 << 20
"""Second moments in memory at a time; what has more takes several passes over the examples."""


def rows(tensor: Tensor, axis: int, index: IntArray) -> Tensor:
    """(units, everything of a unit in this tensor)."""
    return tensor.movedim(axis, 0)[torch.from_numpy(index)].reshape(len(index), -1)


def layer_name(member: Member) -> str:
    """Path of the module that a weight belongs to."""
    return member.parameter.removesuffix(".weight")


def reading_layers(model: nn.Module, graph: Graph) -> dict[str, Reader]:
    """Convolutions and linear layers that read a prunable group, by path."""
    layers = dict(model.named_modules())
    found = {}
    for member in (member for group in graph.prunable for member in group.members if member.role == "in"):
        layer = layers.get(layer_name(member))
        if isinstance(layer, Reader) and member.parameter.endswith(".weight"):
            found[layer_name(member)] = layer
    return found


def product_layers(model: nn.Module, graph: Graph, roles: tuple[Literal["out", "in"], ...]) -> dict[str, Layer]:
    """Layers of prunable groups that are matrix products of unfolded inputs, small enough for their second moments."""
    layers = dict(model.named_modules())
    found: dict[str, Layer] = {}
    for member in (member for group in graph.prunable for member in group.members if member.role in roles):
        layer = layers.get(layer_name(member))
        if layer is not None and is_plain(layer) and member.parameter.endswith(".weight"):
            assert isinstance(layer, Layer)
            if layer.weight[0].numel() <= MAX_FEATURES:
                found[layer_name(member)] = layer
    return found


def split_groups(
    model: nn.Module, graph: Graph, roles: tuple[Literal["out", "in"], ...], *, outputs: bool
) -> list[Graph]:
    """Graphs of neighbouring groups whose layers' second moments fit MOMENT_BYTES; of one group where they do not.

    outputs: whether there are moments of what a layer gives besides those of what it reads.
    """
    parts: list[tuple[Group, ...]] = [()]
    held: dict[str, int] = {}
    for group in graph.prunable:
        layers = product_layers(model, replace(graph, groups=(group,)), roles)
        own = {name: _moment_bytes(layer, outputs=outputs) for name, layer in layers.items()}
        if parts[-1] and sum((held | own).values()) > MOMENT_BYTES:
            parts.append(())
            held = {}
        parts[-1] += (group,)
        held |= own
    return [replace(graph, groups=part) for part in parts]


def _moment_bytes(layer: Layer, *, outputs: bool) -> int:
    """Of float64 matrices, one or two for each group of a convolution."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    sides = [layer.weight[0].numel() + (layer.bias is not None)] + [len(layer.weight) // groups] * outputs
    return 8 * groups * sum(side**2 for side in sides)


def unit_positions(layer: Layer, member: Member) -> Tensor:
    """(units, r): rows of the layer's weight matrix for "out", columns of each group's for "in"."""
    index = torch.from_numpy(member.index)
    if member.role == "out":
        return index
    taps = layer.weight[0, 0].numel()
    return (index[:, :, None] * taps + torch.arange(taps)).flatten(1)


def weight_matrix(layer: Layer) -> Tensor:
    """(G, o, d) in float64, a bias as the last column."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    matrix = layer.weight.detach().double().reshape(groups, layer.weight.shape[0] // groups, -1)
    if layer.bias is None:
        return matrix
    return torch.cat([matrix, layer.bias.detach().double().reshape(groups, -1, 1)], dim=2)


def at_units(layer: Reader, member: Member, calls: Sequence[Tensor], examples: int) -> Tensor:
    """(units, examples, places) of tensors that a layer read, at a group's units."""
    index = torch.from_numpy(member.index)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    if not isinstance(layer, nn.Linear) and not layer.transposed:
        # A weight's input axis counts within one group of a grouped convolution; it stands for all groups.
        starts = torch.arange(layer.groups) * (layer.in_channels // layer.groups)
        index = (index[:, :, None] + starts).flatten(1)
    parts = [x.movedim(axis, 0).reshape(x.shape[axis], examples, -1)[index] for x in calls]
    return torch.cat([part.movedim(1, 2).flatten(2) for part in parts], dim=2)


@contextmanager
def attached(layers: Mapping[str, nn.Module], attach: Callable[[str], RemovableHandle]) -> Iterator[None]:
    """Hooks on the layers for a while; `attach` puts one on the layer of a path."""
    handles = [attach(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_inputs(
    layers: Mapping[str, nn.Module], keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """What layers read for a while, by path, a tensor per call; `keep` makes what is recorded and read on."""
    read: dict[str, list[Tensor]] = {}

    def attach(name: str) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            read.setdefault(name, []).append(keep(arguments[0]))
            return (read[name][-1], *arguments[1:])

        return layers[name].register_forward_pre_hook(hook)

    with attached(layers, attach):
        yield read


def held_gradients(model: nn.Module) -> Fill:
    """`gradient` from what the model's parameters hold now."""
    parameters = dict(model.named_parameters())

    def fill(member: Member) -> dict[str, Tensor]:
        parameter = parameters[member.parameter]
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        return {"gradient": rows(gradient, member.axis, member.index)}

    return fill
