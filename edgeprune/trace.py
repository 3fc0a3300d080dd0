"""nn.Module -> Graph: what computes what, and which channels can only be removed together."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeprune.core.records import Constant, Extent, Graph, Group, IntArray, Member, Node, Parameter
from edgeprune.graphs.branches import find_branches
from edgeprune.graphs.capture import Inputs, capture, module_path, operator_name, shares_memory, structure_sha256
from edgeprune.graphs.propagate import Propagation, concrete, propagate
from edgeprune.ops import Axis, Value


def trace_graph(module: nn.Module, inputs: Inputs, *, allow_inexact: bool = False) -> Graph:
    """Find the coupled channels of a model.

    inputs: example tensors, batch first; shapes in the graph are for their batch.
    allow_inexact: also free channels whose removal changes others' values, such as those under a layer
        norm (`Group.inexact_because`); otherwise they are frozen.
    raises: ModelError, from torch.export.
    """
    batch = next((x.shape[0] for x in inputs if x.ndim), 1)
    return trace_captured(capture(module, inputs), batch, allow_inexact=allow_inexact)


def trace_captured(captured: fx.GraphModule, batch: int = 1, *, allow_inexact: bool = False) -> Graph:
    """As `trace_graph`, of a model that is captured already; `batch` sets the shapes in the record."""
    found = propagate(captured)
    _resize_batch(captured, found, batch)
    partition = Partition(found, allow_inexact)
    nodes = [n for n in captured.graph.nodes if n.op in ("placeholder", "call_function") and n.name in found.values]
    return Graph(
        model_sha256=structure_sha256(captured),
        inputs=tuple(n.name for n in nodes if n.op == "placeholder"),
        outputs=_outputs(captured),
        nodes=tuple(_node(n, found, partition, batch) for n in nodes),
        parameters=tuple(_parameter(captured, key, value, partition) for key, value in found.parameters.items()),
        groups=partition.groups,
        unsupported=tuple(found.unsupported),
        branches=find_branches(captured, found, partition.names),
    )


def _resize_batch(captured: fx.GraphModule, found: Propagation, batch: int) -> None:
    """Give channels that are merged with the batch as many positions as `batch` has."""
    for node in captured.graph.nodes:
        value = found.values.get(node.name)
        if isinstance(value, Value):
            axes = list(value.axes)
            for axis, size in enumerate(concrete(node.meta["val"].shape, batch)):
                if (ids := axes[axis]) is not None and len(ids) != size:
                    axes[axis] = _of_batch(ids, found.batch, batch) if len(ids) * batch == size * found.batch else None
                    if axes[axis] is None:
                        found.units.freeze(ids, f"is merged with the batch at '{node.name}'")
            found.values[node.name] = replace(value, axes=tuple(axes))


def _of_batch(ids: IntArray, examples: int, batch: int) -> Axis:
    """`batch` of the examples instead of all, whether they are the outer part of the axis or the inner one."""
    outer, inner = ids.reshape(examples, -1), ids.reshape(-1, examples)
    if (outer == outer[:1]).all():
        return np.tile(outer[0], batch)
    return np.repeat(inner[:, 0], batch) if (inner == inner[:, :1]).all() else None


class Partition:
    """Units with the same place in every tensor and parameter form a group.

    Every union is already made, so each axis' size is a sum over its units; units that take the same
    number of positions of every axis are interchangeable for shapes and costs.
    """

    def __init__(self, found: Propagation, allow_inexact: bool) -> None:
        self._units = found.units
        frozen, inexact = found.units.frozen(), found.units.inexact()
        if not allow_inexact:
            frozen = {**inexact, **frozen}
        self._roots = found.units.find(np.arange(len(found.units)))
        self._group_of: dict[int, int] = {}
        members: list[list[int]] = []
        by_signature: dict[tuple[Any, ...], int] = {}
        signature = self._signatures(found)
        for root in dict.fromkeys(self._roots.tolist()):
            key = (int(signature[root]), frozen.get(root), inexact.get(root))
            number = by_signature.setdefault(key, len(members))
            if number == len(members):
                members.append([])
            members[number].append(root)
            self._group_of[root] = number
        rank = np.zeros(len(self._roots), np.int64)
        for roots in members:
            rank[roots] = np.arange(len(roots))
        self._rank = rank[self._roots]
        self._number = np.array([self._group_of[root] for root in self._roots.tolist()], np.int64)
        self._sizes = [len(roots) for roots in members]
        self.names = _names(found, self._number, len(members))
        self.groups = tuple(
            self._group(found, number, frozen.get(root), inexact.get(root)) for number, (root, *_) in enumerate(members)
        )

    def _signatures(self, found: Propagation) -> IntArray:
        """(ids,) per root a hash of how many positions it takes in which axis."""
        rng = np.random.default_rng(0)
        total = np.zeros(len(self._roots), np.uint64)
        axes = {id(axis): axis for value in _tensors(found) for axis in value.axes if axis is not None}
        for axis in axes.values():
            roots, counts = np.unique(self._roots[axis], return_counts=True)
            salt = rng.integers(1, 2**63, dtype=np.uint64) | np.uint64(1)
            mixed = (counts.astype(np.uint64) + salt) * salt
            total[roots] += mixed ^ (mixed >> np.uint64(31))
        return total.astype(np.int64)

    def extent(self, ids: Axis, size: int) -> Extent:
        """The size of an axis as a sum over groups."""
        if ids is None or len(ids) != size:
            return Extent(fixed=size)
        numbers, counts = np.unique(self._number[ids], return_counts=True)
        terms = []
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            each, rest = divmod(count, self._sizes[number])
            assert rest == 0, "units of one group take the same number of positions"
            terms.append((self.names[number], each))
        return Extent(groups=tuple(sorted(terms)))

    def _group(self, found: Propagation, number: int, frozen: str | None, inexact: str | None) -> Group:
        units = self._sizes[number]
        members = []
        for key, value in found.parameters.items():
            for axis, ids in enumerate(value.axes):
                if ids is not None and (here := np.flatnonzero(self._number[ids] == number)).size:
                    order = np.argsort(self._rank[ids[here]], kind="stable")
                    index = here[order].reshape(units, -1)
                    consumed = (key, axis) in found.consumed
                    members.append(Member(parameter=key, axis=axis, index=index, role="in" if consumed else "out"))
        constants = []
        for node, place, ids in found.constants:
            if (here := self._number[ids] == number).any():
                count = np.bincount(self._rank[ids[here]], minlength=units)
                constants.append(Constant(node=node, argument=place, count=count))
        return Group(
            name=self.names[number],
            units=units,
            members=tuple(members),
            constants=tuple(constants),
            frozen_because=frozen,
            inexact_because=inexact,
        )


def _tensors(found: Propagation) -> list[Value]:
    values: list[Value] = list(found.parameters.values())
    for value in found.values.values():
        values += value if isinstance(value, tuple) else [value]
    return values


def _names(found: Propagation, number: IntArray, groups: int) -> list[str]:
    """Each group bears the path of the module that produces it first; a second one there a number."""
    origin: dict[int, str] = {}
    for consuming in (False, True):
        for key, value in found.parameters.items():
            for axis, ids in enumerate(value.axes):
                if ids is not None and ((key, axis) in found.consumed) == consuming:
                    for group in np.unique(number[ids]).tolist():
                        origin.setdefault(group, key.rpartition(".")[0] or key)
    names: list[str] = []
    for group in range(groups):
        base = name = origin.get(group, "padding")
        suffix = 2
        while name in names:
            name, suffix = f"{base}.{suffix}", suffix + 1
        names.append(name)
    return names


def _outputs(captured: fx.GraphModule) -> tuple[str, ...]:
    (node,) = (n for n in captured.graph.nodes if n.op == "output")
    return tuple(source.name for source in node.all_input_nodes)


def _node(node: fx.Node, found: Propagation, partition: Partition, batch: int) -> Node:
    value = found.values[node.name]
    shape = () if isinstance(value, tuple) else concrete(node.meta["val"].shape, batch)
    axes = () if isinstance(value, tuple) else value.axes
    sources = node.all_input_nodes
    read = [found.values.get(s.name) for s in sources if s.op == "get_attr"]
    parameters = [value.parameter for value in read if isinstance(value, Value)]
    return Node(
        name=node.name,
        path=module_path(node),
        op="input" if node.op == "placeholder" else operator_name(node),
        inputs=tuple(s.name for s in sources if s.op != "get_attr" and s.name in found.values),
        parameters=tuple(key for key in parameters if key is not None),
        attributes=_attributes(node),
        out_shape=shape,
        out_extents=tuple(partition.extent(ids, size) for ids, size in zip(axes, shape, strict=True)),
        view=shares_memory(node),
    )


def _attributes(node: fx.Node) -> dict[str, Any]:
    """Arguments that are plain values, by schema name; kernel_size where a weight has one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    attributes: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
        if (plain := _plain(given)) is not None:
            attributes[argument.name] = plain
    if operator_name(node).startswith("conv"):
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        attributes["kernel_size"] = list(weight.meta["val"].shape[2:])
    return attributes


def _plain(given: Any) -> Any:
    if isinstance(given, list | tuple):
        items = [_plain(item) for item in given]
        return items if items and all(item is not None for item in items) else None
    if isinstance(given, float) and not math.isfinite(given):
        return None
    return given if isinstance(given, bool | int | float | str) else None


def _parameter(captured: fx.GraphModule, key: str, value: Value, partition: Partition) -> Parameter:
    tensor = operator.attrgetter(key)(captured)
    return Parameter(
        name=key,
        shape=value.shape,
        extents=tuple(partition.extent(ids, size) for ids, size in zip(value.axes, value.shape, strict=True)),
        element_bytes=tensor.element_size(),
        trainable=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
    )
