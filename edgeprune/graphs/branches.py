"""Residual branches in a captured graph: which there are, and the graph without them."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from edgeprune.core.branches import equal_nodes
from edgeprune.core.records import Branch, Graph
from edgeprune.graphs.capture import module_path, operator_name, shares_memory, writes_memory
from edgeprune.graphs.propagate import Propagation
from edgeprune.ops import Value
from edgeprune.ops.elementwise import KEEPS_ZEROS, SUMS

PRODUCTS = frozenset({"mul", "multiply", "matmul", "bmm", "mm"})
JOINS = frozenset({"cat", "stack"})
CLAMPS = frozenset({"clamp", "clamp_min", "clamp_max", "clip", "hardtanh"})
"""Zeros stay zeros only for some of their bounds."""


def find_branches(captured: fx.GraphModule, found: Propagation, taken: Container[str]) -> tuple[Branch, ...]:
    """The residual branches of a model, where they are nested the outermost.

    A branch is the side f of a sum x + f(x), or g(x) + f(x) where f has more parameters than g. Nothing else reads what
    it computes, it reads nothing but x, writes over nothing of others, and is zero where its parameters are: so
    dropping it is masking it. taken: names that a branch may not have.
    """
    readers = _parameter_readers(captured, found)
    sides = {total: side for total in captured.graph.nodes if (side := _residual_side(total, found, readers))}
    branches: list[Branch] = []
    for total, (rest, nodes) in sides.items():
        if any(nodes < others for _, others in sides.values()):
            continue
        base = name = _common_path(nodes) or total.name
        suffix = 2
        while name in taken or any(name == other.name for other in branches):
            name, suffix = f"{base}.{suffix}", suffix + 1
        branches.append(
            Branch(
                name=name,
                nodes=tuple(node.name for node in captured.graph.nodes if node in nodes),
                total=total.name,
                rest=rest.name,
                parameters=_own_parameters(nodes, readers),
            )
        )
    return tuple(branches)


def drop_branches(captured: fx.GraphModule, graph: Graph, dropped: Sequence[Branch]) -> None:
    """Take branches out of a captured graph, and what only they read out of its state dict."""
    nodes = {node.name: node for node in captured.graph.nodes}
    for name, equal in equal_nodes(graph, dropped).items():
        old, new = nodes[name], nodes[equal]
        for user in list(old.users):
            if writes_memory(user) and user.args[0] is old:
                _copy_instead(user)  # others may read what the sum is now
        old.replace_all_uses_with(new)
        for target in _erase_unread(old):
            _delete(captured, target)


def _parameter_readers(captured: fx.GraphModule, found: Propagation) -> dict[str, set[fx.Node]]:
    readers: dict[str, set[fx.Node]] = {}
    for node in captured.graph.find_nodes(op="get_attr"):
        value = found.values.get(node.name)
        if isinstance(value, Value) and value.parameter is not None:
            readers.setdefault(value.parameter, set()).update(node.users)
    return readers


def _own_parameters(nodes: set[fx.Node], readers: dict[str, set[fx.Node]]) -> tuple[str, ...]:
    return tuple(key for key, its in readers.items() if its and its <= nodes)


def _residual_side(
    total: fx.Node, found: Propagation, readers: dict[str, set[fx.Node]]
) -> tuple[fx.Node, set[fx.Node]] | None:
    """The side that stays and the branch's nodes, where `total` is a residual sum."""
    if total.op != "call_function" or operator_name(total) != "add" or total.kwargs or len(total.args) != 2:
        return None
    left, right = total.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if len({_shape(node, found) for node in (left, right, total)}) != 1 or _shape(total, found) is None:
        return None
    sides = {node: _read_by_nothing_else(node, total) for node in (left, right)}
    sizes = {node: _size(_own_parameters(sides[node], readers), found) for node in sides}
    if sizes[left] == sizes[right]:
        return None
    end, rest = (left, right) if sizes[left] > sizes[right] else (right, left)
    entries, names = _entries(sides[end]), {node.name for node in sides[end]}
    joined = entries == {rest} or (len(entries) == 1 and rest in sides[rest] and entries == _entries(sides[rest]))
    safe = all(found.memory.get(node.name) in names for node in sides[end] if writes_memory(node))
    own = _own_parameters(sides[end], readers)
    return (rest, sides[end]) if joined and safe and _gives_zeros(end, sides[end], own, found) else None


def _gives_zeros(end: fx.Node, nodes: set[fx.Node], parameters: Container[str], found: Propagation) -> bool:
    """Whether the branch is zero where its parameters are."""
    zeros: set[Any] = set()
    for node in end.graph.nodes:
        if node.op == "get_attr":
            value = found.values.get(node.name)
            if isinstance(value, Value) and value.parameter in parameters:
                zeros.add(node)
        elif node in nodes and _is_zero(node, zeros):
            zeros.add(node)
    return end in zeros


def _is_zero(node: fx.Node, zeros: Container[Any]) -> bool:
    op, tensors = operator_name(node), [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), torch.Tensor)]
    if op in PRODUCTS:
        return any(source in zeros for source in tensors)
    if op == "scaled_dot_product_attention":
        return node.args[2] in zeros
    if op == "linear" or op.startswith("conv") or op.endswith("_norm"):
        weight, bias = _argument(node, "weight"), _argument(node, "bias")
        return weight in zeros and (bias is None or bias in zeros)
    keeps = op in KEEPS_ZEROS | SUMS or (shares_memory(node) and not writes_memory(node)) or op in JOINS
    return keeps and op not in CLAMPS and all(source in zeros for source in tensors)


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its name in the schema; None where there is no such argument."""
    assert isinstance(node.target, torch._ops.OpOverload)
    places = [argument.name for argument in node.target._schema.arguments]
    if name not in places:
        return None
    place = places.index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _shape(node: fx.Node, found: Propagation) -> tuple[int, ...] | None:
    value = found.values.get(node.name)
    return value.shape if isinstance(value, Value) and node.op != "get_attr" else None


def _read_by_nothing_else(end: fx.Node, total: fx.Node) -> set[fx.Node]:
    """All that is computed for nothing but `end`, and that with it, where nothing but `total` reads it."""
    inside: set[fx.Node] = set()
    node = end
    while node.op != "root":
        readers = node.users.keys() - inside
        if node.op == "call_function" and node.users and (not readers or (node is end and readers == {total})):
            inside.add(node)
        node = node.prev
    return inside


def _entries(nodes: set[fx.Node]) -> set[fx.Node]:
    """The tensors that come in, parameters aside."""
    sources = {source for node in nodes for source in node.all_input_nodes} - nodes
    return {s for s in sources if s.op != "get_attr" and isinstance(s.meta.get("val"), torch.Tensor)}


def _size(parameters: Sequence[str], found: Propagation) -> int:
    return sum(prod(found.parameters[key].shape) for key in parameters)


def _common_path(nodes: set[fx.Node]) -> str:
    """The innermost module that all of it stands in."""
    paths = [module_path(node).split(".") for node in nodes]
    common = next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))
    return ".".join(paths[0][:common])


def _copy_instead(user: fx.Node) -> None:
    """Make an operation that writes over its input leave it alone."""
    assert isinstance(user.target, torch._ops.OpOverload)
    packet = getattr(torch.ops.aten, operator_name(user))
    user.target = getattr(packet, user.target._overloadname)


def _erase_unread(node: fx.Node) -> list[str]:
    """Erase a node and what was computed for it alone. returns: targets of the parameters that nothing reads now."""
    targets: list[str] = []
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.users or node.op == "placeholder" or node._erased:
            continue
        sources = node.all_input_nodes
        if node.op == "get_attr":
            targets.append(str(node.target))
        node.graph.erase_node(node)
        waiting += sources
    return targets


def _delete(captured: fx.GraphModule, target: str) -> None:
    """Forget a tensor, and a batch norm's counter where it was the last beside it."""
    path, _, leaf = target.rpartition(".")
    owner = operator.attrgetter(path)(captured) if path else captured
    if hasattr(owner, leaf) and not any(node.target == target for node in captured.graph.find_nodes(op="get_attr")):
        delattr(owner, leaf)
    if [*owner._parameters, *owner._buffers] == ["num_batches_tracked"]:
        del owner._buffers["num_batches_tracked"]
