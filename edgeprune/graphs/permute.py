"""Other orders of the units of groups, consistently in all that goes with them: the model computes what it did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from edgeprune.core.errors import RecordError
from edgeprune.core.records import Graph, IntArray
from edgeprune.graphs.slice import named_tensors


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
