"""Networks without some of their residual branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeprune.core.records import Branch, Graph, Kernel, Widths

IDEMPOTENT = frozenset({"relu", "relu6", "hardtanh"})
"""What changes nothing when it is done twice."""


def dropped_branches(graph: Graph, widths: Widths) -> tuple[Branch, ...]:
    """The branches of width 0."""
    return tuple(branch for branch in graph.branches if widths.get(branch.name, 1) == 0)


def equal_nodes(graph: Graph, dropped: Sequence[Branch]) -> dict[str, str]:
    """Nodes that compute nothing without these branches -> the node whose value theirs is, in order.

    Those are the sums, and an activation behind a sum that its other side has been through already.
    """
    rest = {branch.total: branch.rest for branch in dropped}
    nodes = {node.name: node for node in graph.nodes}
    equal: dict[str, str] = {}
    for node in graph.nodes:
        if node.name in rest:
            equal[node.name] = equal.get(rest[node.name], rest[node.name])
        elif node.op in IDEMPOTENT and node.inputs[0] in equal:
            before = nodes[equal[node.inputs[0]]]
            if (before.op, before.attributes) == (node.op, node.attributes):
                equal[node.name] = before.name
    return equal


def without_branches(graph: Graph, widths: Widths) -> Graph:
    """The graph without the branches of width 0; the groups and their names are the same."""
    dropped = dropped_branches(graph, widths)
    if not dropped:
        return graph
    equal = equal_nodes(graph, dropped)
    gone = equal.keys() | {name for branch in dropped for name in branch.nodes}
    lost = {name for branch in dropped for name in branch.parameters}
    return replace(
        graph,
        nodes=tuple(
            replace(node, inputs=tuple(equal.get(name, name) for name in node.inputs))
            for node in graph.nodes
            if node.name not in gone
        ),
        outputs=tuple(equal.get(name, name) for name in graph.outputs),
        parameters=tuple(parameter for parameter in graph.parameters if parameter.name not in lost),
        branches=tuple(branch for branch in graph.branches if branch not in dropped),
    )


def branch_of(branches: Sequence[Branch], node: str) -> Branch | None:
    """The branch that a node goes with."""
    return next((branch for branch in branches if node == branch.total or node in branch.nodes), None)


def branch_of_kernel(branches: Sequence[Branch], kernel: Kernel) -> Branch | None:
    """The branch that a kernel goes with: that of its first operation, since what is fused follows it."""
    return branch_of(branches, kernel.nodes[0]) if kernel.nodes else None
