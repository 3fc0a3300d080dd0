"""Layers in diagonal blocks: as grouped convolutions, and the same with zeros instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeprune.core.errors import DataError
from edgeprune.core.records import FloatArray, IntArray

Batches = Iterable[tuple[Any, Tensor]]
Conv = nn.Conv1d | nn.Conv2d
GATHER = "gather"
"""Buffer of a layer that reads its inputs in an order of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """What a layer becomes, equal to itself alone.

    columns: (inputs,) the order in which it reads its inputs; None: as they are.
    """

    groups: int
    columns: IntArray | None = None


def find_convolutions(module: fx.GraphModule) -> tuple[dict[str, Conv], dict[str, str]]:
    """Plain convolutions of a lifted module by path, and of its other layers with weights why they stay dense."""
    found: dict[str, Conv] = {}
    skipped: dict[str, str] = {}
    calls = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    layers = {path: module.get_submodule(path) for path in dict.fromkeys(calls)}
    weights = [id(layer.weight) for layer in layers.values() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
    for path, layer in layers.items():
        if isinstance(layer, nn.Linear):
            skipped[path] = "is a linear layer, of which runtimes have none in groups"
        elif not isinstance(layer, nn.modules.conv._ConvNd):
            continue
        elif not isinstance(layer, nn.Conv1d | nn.Conv2d):
            skipped[path] = f"is a {type(layer).__name__}, not a Conv1d or Conv2d"
        elif layer.groups > 1:
            skipped[path] = "is depthwise" if layer.groups == layer.in_channels else "has groups already"
        elif calls.count(path) > 1 or weights.count(id(layer.weight)) > 1 or f"{path}.weight" in read:
            skipped[path] = "is used twice, or its weight is"
        else:
            found[path] = layer
    return found, skipped


@torch.no_grad()
def contributions(base: nn.Module, paths: Iterable[str], calibration: Batches | None) -> dict[str, FloatArray]:
    """(outputs, inputs): squared weights over all taps times the mean square of the input, of a sum of 1."""
    layers = {path: base.get_submodule(path) for path in paths}
    squares: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            del layer
            total = given[0].double().transpose(0, 1).flatten(1).square().sum(1)
            squares[path] = squares.get(path, torch.zeros(())) + total

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        for inputs, _ in calibration or ():
            base(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        share = weight.detach().double().square().flatten(2).sum(2)
        if path in squares:
            share = share * squares[path]
        total = float(share.sum())
        if not np.isfinite(total):
            raise DataError(f"what reaches '{path}' is not finite; check weights and calibration data")
        found[path] = (share / total if total > 0 else torch.full_like(share, 1 / share.numel())).numpy()
    return found


@torch.no_grad()
def mask_blocks(module: fx.GraphModule, blocks: Mapping[str, Blocks]) -> None:
    """Zero in place what is outside of the diagonal blocks."""
    for path, chosen in blocks.items():
        weight = module.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        weight.mul_(block_mask(weight, chosen).to(weight))


def block_mask(weight: Tensor, blocks: Blocks) -> Tensor:
    """True where a weight (outputs, inputs, ...) is kept, of shape (outputs, inputs, 1...)."""
    outputs, inputs = weight.shape[:2]
    block = np.empty(inputs, np.int64)
    block[_columns(blocks, inputs)] = np.arange(inputs) * blocks.groups // inputs
    rows = np.arange(outputs) * blocks.groups // outputs
    mask = torch.from_numpy(rows[:, None] == block[None])
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))


def cut_blocks(module: fx.GraphModule, blocks: Mapping[str, Blocks]) -> None:
    """Make layers grouped convolutions in place, and let them gather their inputs where they want their own order."""
    calls = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
    for path, chosen in blocks.items():
        layer = module.get_submodule(path)
        assert isinstance(layer, Conv)
        weight = layer.weight.detach()
        columns = torch.from_numpy(_columns(chosen, weight.shape[1]))
        parts = zip(weight.chunk(chosen.groups), columns.chunk(chosen.groups), strict=True)
        cut = torch.cat([rows.index_select(1, own) for rows, own in parts])
        layer.weight = nn.Parameter(cut, requires_grad=layer.weight.requires_grad)
        layer.groups = chosen.groups
        if chosen.columns is not None:
            layer.register_buffer(GATHER, columns)
            call = calls[path]
            with module.graph.inserting_before(call):
                order = module.graph.get_attr(f"{path}.{GATHER}")
                read = module.graph.call_function(torch.ops.aten.index_select.default, (call.args[0], 1, order))
            call.args = (read, *call.args[1:])
    module.graph.lint()
    module.recompile()


def _columns(blocks: Blocks, inputs: int) -> IntArray:
    return np.arange(inputs) if blocks.columns is None else blocks.columns
