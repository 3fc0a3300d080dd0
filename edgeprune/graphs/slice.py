"""Removing units: the smaller graph, and the dense model with the same units masked."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeprune.core.branches import dropped_branches
from edgeprune.core.errors import RecordError
from edgeprune.core.records import Branch, Constant, Graph, Group, IntArray
from edgeprune.graphs.branches import drop_branches
from edgeprune.graphs.capture import Inputs, capture, operator_name, structure_sha256
from edgeprune.graphs.lift import lift

Keep = Mapping[str, IntArray]
"""Group name -> kept units, ascending. A group that is not named keeps all; a branch that keeps none is dropped."""


def slice_model(module: nn.Module, inputs: Inputs, graph: Graph, keep: Keep) -> nn.Module:
    """The model without the removed units, as a trainable module of its own.

    inputs: as for `trace_graph`. Weights are copied; state-dict keys stay.
    raises: RecordError when `graph` is of another model or `keep` does not fit it; ModelError.
    """
    removed_units(graph, keep)  # refuse before the export, which takes seconds
    return slice_captured(capture(module, inputs), graph, keep)


def slice_captured(captured: fx.GraphModule, graph: Graph, keep: Keep) -> fx.GraphModule:
    """As `slice_model`, of a model that is captured already; `captured` is used up.

    raises: RecordError.
    """
    if structure_sha256(captured) != graph.model_sha256:
        raise RecordError("the graph was traced from another model or with other input shapes; trace this model again")
    removed = removed_units(graph, keep)
    nodes = {node.name: node for node in captured.graph.nodes}
    for group in graph.groups:
        if group.name in removed:
            for constant in group.constants:
                if constant.argument:
                    _lower(nodes[constant.node], constant, removed[group.name])
    for name, (count, fall) in _counted(graph, removed).items():
        if operator_name(nodes[name]) == "batch_norm":
            _pad_statistics(captured.graph, nodes[name], count, fall)
        else:
            _scale(captured.graph, nodes[name], 1 - fall / count)
    slices = parameter_slices(graph, removed)
    replace_tensors(captured, {name: slices.get(name, {}) for name in named_tensors(captured)})
    drop_branches(captured, graph, dropped_by(graph, keep))
    captured.recompile()
    return lift(captured)


def replace_tensors(module: nn.Module, slices: Mapping[str, Mapping[int, IntArray]]) -> None:
    """Put a sliced copy in the place of every tensor named in `slices`; what is shared stays shared."""
    named = [(name, tensor) for name, tensor in named_tensors(module).items() if name in slices]
    # A graph knows a shared tensor by one of its names; the others have no slices and must not win.
    named.sort(key=lambda item: bool(slices[item[0]]))
    copies = {id(tensor): slice_tensor(tensor, slices[name]) for name, tensor in named}
    for part in module.modules():
        for owned in (part._parameters, part._buffers):
            owned.update({name: copies[id(t)] for name, t in owned.items() if id(t) in copies})  # type: ignore[misc]


def mask_model(module: nn.Module, graph: Graph, keep: Keep) -> nn.Module:
    """A copy of the model in which every parameter entry of the removed units, and of dropped branches, is zero.

    Its output is what `slice_model` must compute.
    raises: RecordError.
    """
    removed = removed_units(graph, keep)
    masked = copy.deepcopy(module)
    tensors = named_tensors(masked)
    with torch.no_grad():
        for group in graph.groups:
            for member in group.members if group.name in removed else ():
                where = torch.from_numpy(member.index[removed[group.name]].ravel())
                _tensor(tensors, member.parameter).index_fill_(member.axis, where, 0)
        for branch in dropped_by(graph, keep):
            for name in branch.parameters:
                _tensor(tensors, name).zero_()
    return masked


@torch.no_grad()
def expand_tensors(module: nn.Module, compact: nn.Module, graph: Graph, keep: Keep) -> dict[str, torch.Tensor]:
    """The compact model's tensors in the shapes of the model it was cut from, zero where units were removed.

    The model computes with them what the compact one does, and can be pruned further under the same graph.
    returns: a state dict for `module`. raises: RecordError when the compact model was cut in another way.
    """
    slices = parameter_slices(graph, removed_units(graph, keep))
    own, small = named_tensors(module), named_tensors(compact)
    # A tensor that is shared has one of its names in the graph, and one in the compact model.
    sliced = {id(tensor): slices[name] for name, tensor in own.items() if name in slices}
    values = {id(tensor): small[name] for name, tensor in own.items() if name in small}
    state: dict[str, torch.Tensor] = {}
    for name in module.state_dict():
        tensor = own[name]
        value, gone = values.get(id(tensor)), sliced.get(id(tensor), {})
        kept = [np.setdiff1d(np.arange(size), gone.get(axis, [])) for axis, size in enumerate(tensor.shape)]
        if value is None or list(value.shape) != [len(positions) for positions in kept]:
            raise RecordError(f"'{name}' of the compact model does not fit the kept units; compact the model again")
        state[name] = torch.zeros_like(tensor)
        state[name][tuple(torch.from_numpy(grid) for grid in np.ix_(*kept))] = value.detach().to(tensor)
    return state


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by state-dict key, shared ones under each of theirs."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def removed_units(graph: Graph, keep: Keep) -> dict[str, IntArray]:
    """Units that go, per group that loses any.

    raises: RecordError for an unknown or frozen group, or units that are not ascending, in range and at least one.
    """
    groups = {group.name: group for group in graph.groups}
    branches = {branch.name for branch in graph.branches}
    removed: dict[str, IntArray] = {}
    for name, kept in keep.items():
        if name in branches:
            if list(kept) not in ([], [0]):
                raise RecordError(f"branch '{name}' is one unit: it keeps unit 0 or none")
            continue
        if name not in groups:
            raise RecordError(f"the model has no group '{name}'; make the plan again")
        gone = _complement(groups[name], np.asarray(kept, dtype=np.int64))
        if gone.size:
            removed[name] = gone
    return removed


def dropped_by(graph: Graph, keep: Keep) -> tuple[Branch, ...]:
    """The branches of which nothing is kept."""
    return dropped_branches(graph, {name: len(kept) for name, kept in keep.items()})


def _complement(group: Group, kept: IntArray) -> IntArray:
    if kept.ndim != 1 or not kept.size or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= group.units:
        raise RecordError(f"group '{group.name}' must keep ascending units of 0..{group.units - 1}, at least one")
    gone = np.setdiff1d(np.arange(group.units), kept)
    if gone.size and group.frozen_because is not None:
        raise RecordError(f"group '{group.name}' is frozen: it {group.frozen_because}")
    return gone


def parameter_slices(graph: Graph, removed: Mapping[str, IntArray]) -> dict[str, dict[int, IntArray]]:
    """Parameter -> axis -> positions that go."""
    found: dict[str, dict[int, list[IntArray]]] = defaultdict(lambda: defaultdict(list))
    for group in graph.groups:
        for member in group.members if group.name in removed else ():
            found[member.parameter][member.axis].append(member.index[removed[group.name]].ravel())
    return {key: {axis: np.concatenate(parts) for axis, parts in axes.items()} for key, axes in found.items()}


def slice_tensor(tensor: torch.Tensor, gone: Mapping[int, IntArray]) -> torch.Tensor:
    """A copy without the positions `gone` (axis -> positions); a parameter stays a parameter."""
    result = tensor.detach()
    for axis, positions in gone.items():
        kept = np.setdiff1d(np.arange(tensor.shape[axis]), positions)
        result = result.index_select(axis, torch.from_numpy(kept))
    result = result.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def _tensor(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise RecordError(f"the model has no parameter '{name}'; the graph was traced from another model")
    return tensors[name]


def _counted(graph: Graph, removed: Mapping[str, IntArray]) -> dict[str, tuple[int, int]]:
    """Node of a mean or of statistics -> positions that it is over, how many of them go."""
    all_positions: dict[str, int] = defaultdict(int)
    gone: dict[str, int] = defaultdict(int)
    for group in graph.groups:
        for constant in group.constants:
            if not constant.argument:
                all_positions[constant.node] += int(constant.count.sum())
                gone[constant.node] += int(constant.count[removed.get(group.name, [])].sum())
    return {name: (all_positions[name], fall) for name, fall in gone.items() if fall}


def _scale(graph: fx.Graph, node: fx.Node, factor: float) -> None:
    with graph.inserting_after(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _pad_statistics(graph: fx.Graph, node: fx.Node, count: int, fall: int) -> None:
    """Let a norm over the last axis see zeros in the place of what went, and cut them off again."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with graph.inserting_before(node):
        padded = graph.call_function(torch.ops.aten.constant_pad_nd.default, (source, [0, fall]))
    padded.meta = dict(source.meta)
    node.replace_input_with(source, padded)
    with graph.inserting_after(node):
        cut = graph.call_function(torch.ops.aten.slice.Tensor, (node, 2, 0, count - fall))
    cut.meta = dict(node.meta)
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


def _lower(node: fx.Node, constant: Constant, removed: IntArray) -> None:
    fall = int(constant.count[removed].sum())

    def lowered(value: Any, path: tuple[int, ...]) -> Any:
        if not path:
            return value - fall
        items = list(value)
        items[path[0]] = lowered(items[path[0]], path[1:])
        return items

    node.args = tuple(lowered(node.args, constant.argument))
