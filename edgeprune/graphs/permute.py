"""Other orders of the units of groups, consistently in all that goes with them: the model computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeprune.core.errors import RecordError
from edgeprune.core.records import Graph, Group, IntArray
from edgeprune.graphs.capture import Inputs, evaluating
from edgeprune.graphs.slice import named_tensors

TOLERANCE = 1e-4
"""Largest difference between a model in two orders of its channels, relative to the largest output."""


@torch.no_grad()
def permute_units(module: nn.Module, graph: Graph, orders: Mapping[str, IntArray]) -> None:
    """Reorder in place: unit order[i] comes to place i.

    orders: per group, (units,) a permutation. raises: RecordError when the graph is of another model.
    """
    tensors = named_tensors(module)
    for group in graph.groups:
        if (order := orders.get(group.name)) is None:
            continue
        for member in group.members:
            if (tensor := tensors.get(member.parameter)) is None or tensor.shape[member.axis] <= member.index.max():
                raise RecordError(f"the model has no '{member.parameter}' as in the graph; trace it again")
            places = torch.arange(tensor.shape[member.axis])
            places[torch.from_numpy(member.index.ravel())] = torch.from_numpy(member.index[order].ravel())
            tensor.copy_(tensor.index_select(member.axis, places.to(tensor.device)))


def movable_groups(module: nn.Module, inputs: Inputs, graph: Graph) -> list[Group]:
    """Groups whose units can be in any order: tried, since code may pick channels by number."""
    free = [
        group
        for group in graph.prunable
        if group.step == 1 and all((constant.count == constant.count[0]).all() for constant in group.constants)
    ]

    def stays(groups: Sequence[Group]) -> bool:
        trial = copy.deepcopy(module)
        permute_units(trial, graph, {group.name: np.arange(group.units)[::-1].copy() for group in groups})
        return same_outputs(module, trial, inputs)

    return free if stays(free) else [group for group in free if stays([group])]


@torch.no_grad()
def same_outputs(module: nn.Module, other: nn.Module, inputs: Inputs) -> bool:
    """Whether two models compute the same on noise of the inputs' shapes, to float tolerance."""
    noise = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)
    with evaluating(module), evaluating(other):
        mine, theirs = (_outputs(each, noise) for each in (module, other))
    limits = [TOLERANCE * max(float(tensor.abs().max()), 1e-6) for tensor in mine]
    return all(float((a - b).abs().max()) <= limit for a, b, limit in zip(mine, theirs, limits, strict=True))


def _outputs(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [leaf.float() for leaf in pytree.tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]
