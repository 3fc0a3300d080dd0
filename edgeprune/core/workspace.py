"""Peak activation memory as TFLite takes it where XNNPACK computes: workspaces, and the interpreter's own arena.

XNNPACK takes over every run of operations that it knows. What only lives inside such a run gets a place in its
workspace; what goes in or out, the model's inputs and outputs among it, in the interpreter's arena. Both are laid out
when the model is opened: the largest value first, each in the smallest gap that the values alive beside it leave.

Source: greedy by size, Pisarchyk & Lee, Efficient Memory Management for Deep Neural Net Inference, arXiv:2001.03288,
section 5, as in XNNPACK's memory planner; what shares a place (folded and in-place operations) was found by measuring
files of LiteRT 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from edgeprune.core.arena import CONVOLUTIONS, ELEMENTWISE, FLOAT_BYTES
from edgeprune.core.records import Graph, Node, Widths

READ_BEYOND = 16
"""Bytes behind a value that kernels may read."""
ALIGNMENT = 64
MOVES = frozenset({"permute", "transpose"})
"""Views in PyTorch, copies in a TFLite file."""


@dataclass(frozen=True, slots=True)
class Value:
    """Bytes that are needed from the operation `born`, which writes them, to `dies`, the last that reads them."""

    size: int
    born: int
    dies: int


def workspace_bytes(graph: Graph, widths: Widths) -> int:
    """Peak of the activations of a model of `widths` in float32, its inputs and outputs included."""
    owners = share_values(graph)
    turns = take_turns(graph, owners)
    places = {node.name: place for place, node in enumerate(graph.nodes)}
    steps: dict[str, int] = {}
    step, before = 0, 0
    for node in sorted(graph.nodes, key=lambda node: turns[node.name]):
        turn = turns[node.name]
        # All that XNNPACK does in one turn is one step of the interpreter.
        step += turn % 2 == 1 or turn != before
        steps[node.name], before = step, turn
    uses: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in (node.name, *node.inputs):
            uses.setdefault(owners[name], []).append(node.name)
    kept = {node.name for node in graph.nodes if node.op == "input"} | {owners[name] for name in graph.outputs}
    outer: list[Value] = []
    inner: dict[int, list[Value]] = {}
    for name, users in uses.items():
        shape = (extent.size(widths, graph.units) for extent in graph.nodes[places[name]].out_extents)
        size = -(-(FLOAT_BYTES * prod(shape) + READ_BEYOND) // ALIGNMENT) * ALIGNMENT
        if name in kept:
            outer.append(Value(size, 0, len(places)))
        elif turns[name] % 2 or any(turns[user] != turns[name] for user in users):
            outer.append(Value(size, steps[name], max(steps[user] for user in users)))
        else:
            inner.setdefault(turns[name], []).append(Value(size, places[name], max(places[user] for user in users)))
    return peak(outer) + max(map(peak, inner.values()), default=0)


def take_turns(graph: Graph, owners: dict[str, str]) -> dict[str, int]:
    """Node -> how often the work has changed hands before it: even where XNNPACK computes, odd where it cannot.

    owners: from `share_values`; what shares a value is computed where that is.
    """
    turns: dict[str, int] = {}
    for node in graph.nodes:
        if owners[node.name] != node.name:
            turns[node.name] = turns[owners[node.name]]
            continue
        latest = max((turns[name] for name in node.inputs), default=0)
        cannot = node.op == "slice" and node.attributes.get("step", 1) != 1
        turns[node.name] = latest + (latest % 2 != cannot)
    return turns


def share_values(graph: Graph) -> dict[str, str]:
    """Node -> the node whose memory holds its value; its own where it has a place of its own."""
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[str, list[Node]] = {name: [] for name in nodes}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name].append(node)
    owners: dict[str, str] = {}
    for node in graph.nodes:
        source = owners[node.inputs[0]] if node.inputs else node.name
        shared = source != node.name and nodes[source].op != "input" and _shares(node, nodes, readers)
        # What is folded into the convolutions behind it is never written, not even of the model's input.
        owners[node.name] = source if shared or _is_folded(node, readers) else node.name
    return owners


def _shares(node: Node, nodes: dict[str, Node], readers: dict[str, list[Node]]) -> bool:
    """Whether a node leaves its input as it is, or writes its result over it."""
    op = node.op.removesuffix("_")
    if not node.out_shape:
        return True
    if node.view and op not in ELEMENTWISE:
        return op not in MOVES and prod(node.out_shape) == prod(nodes[node.inputs[0]].out_shape)
    return op in ELEMENTWISE and len(node.inputs) == 1 and len(readers[node.inputs[0]]) == 1


def _is_folded(node: Node, readers: dict[str, list[Node]]) -> bool:
    behind = readers[node.name]
    return node.op in ("pad", "constant_pad_nd") and bool(behind) and all(each.op in CONVOLUTIONS for each in behind)


def peak(values: Sequence[Value]) -> int:
    """Bytes that all values together take."""
    return max((start + value.size for value, start in zip(values, lay_out(values), strict=True)), default=0)


def lay_out(values: Sequence[Value]) -> list[int]:
    """Where each value begins, so that none overlap that are needed at once."""
    places: dict[int, int] = {}
    for index in sorted(range(len(values)), key=lambda index: -values[index].size):
        value, end, chosen, smallest = values[index], 0, None, 0
        beside = [
            (place, values[other].size) for other, place in places.items()
            if values[other].born <= value.dies and value.born <= values[other].dies
        ]  # fmt: skip
        for start, size in sorted(beside):
            gap = start - end
            if gap >= value.size and (chosen is None or gap < smallest):
                chosen, smallest = end, gap
            end = max(end, start + size)
        places[index] = end if chosen is None else chosen
    return [places[index] for index in range(len(values))]
