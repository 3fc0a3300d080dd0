"""`Where` on one boolean becomes `If`, so that what is not chosen is not computed.

A model decides per example with `torch.where(condition, a, b)`, which computes both sides. In a file for one example
the condition is a single boolean, and whatever only one side needs moves into a branch of an `If`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, shape_inference

from edgeprune.formats._onnx_kernels import all_nodes

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
"""A side without one of these is cheaper computed than decided about."""
FOLLOWING = frozenset({"Relu", "Clip", "LeakyRelu", "HardSwish", "QuantizeLinear", "DequantizeLinear"})
"""Operations on single values that go into the branches with what they follow: runtimes fuse them with layers."""


def sink_choices(model: ModelProto) -> int:
    """Turn choices into branches, in place. returns: how many `If` the model has now."""
    graph = model.graph
    inferred = shape_inference.infer_shapes(model).graph  # rewriting to other precisions loses some
    known = {value.name: value for value in (*inferred.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    rewriter = _Rewriter(known, weights)
    nodes = rewriter.sink(list(graph.node), [value.name for value in graph.output])
    if rewriter.made:
        del graph.node[:]
        read = {name for node in nodes for name in _reads(node)} | {value.name for value in graph.output}
        graph.node.extend(node for node in nodes if read & {*node.output})
        _keep(graph, known, weights)
    return rewriter.made


@dataclass
class _Rewriter:
    """known, weights: of the whole model, by name. made: branches so far."""

    known: dict[str, ValueInfoProto]
    weights: dict[str, TensorProto]
    made: int = 0

    def sink(self, nodes: list[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
        """The nodes of one graph, in order, with branches for choices; the last first: others may lie in it."""
        for where in reversed([node for node in nodes if self._chooses(node)]):
            if not any(node is where for node in nodes):
                continue  # it went into a branch, and was looked at there
            place = next(index for index, node in enumerate(nodes) if node is where)
            sides = [_needed_by_nothing_else(nodes, place, side, outputs) for side in (1, 2)]
            if not any(nodes[index].op_type in LAYERS for side in sides for index in side):
                continue
            tail = _following(nodes, place, outputs)
            made = self._branch(nodes, where, sides, [nodes[index] for index in tail])
            gone = {place, *sides[0], *sides[1], *tail}
            nodes = [
                made if index == place else node
                for index, node in enumerate(nodes)
                if index == place or index not in gone
            ]
            self.made += 1
        return nodes

    def _chooses(self, node: NodeProto) -> bool:
        if node.op_type != "Where" or node.input[0] in self.weights:
            return False
        condition, *values = (self._shape(name) for name in (node.input[0], *node.input[1:], node.output[0]))
        return condition is not None and prod(condition) == 1 and values[0] is not None and len({*values}) == 1

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.weights:
            return tuple(self.weights[name].dims)
        if name not in self.known or not self.known[name].type.tensor_type.HasField("shape"):
            return None
        return tuple(dim.dim_value for dim in self.known[name].type.tensor_type.shape.dim)

    def _plain(self, nodes: Sequence[NodeProto], condition: str) -> str:
        """The condition before it was given axes: a branch needs none."""
        made_by = {name: node for node in nodes for name in node.output}
        while condition in made_by and made_by[condition].op_type in ("Unsqueeze", "Reshape", "Squeeze"):
            condition = made_by[condition].input[0]
        return condition

    def _branch(
        self, nodes: Sequence[NodeProto], where: NodeProto, sides: Sequence[list[int]], tail: Sequence[NodeProto]
    ) -> NodeProto:
        graphs = []
        end = tail[-1].output[0] if tail else where.output[0]
        for name, side, value in zip(("then_branch", "else_branch"), sides, where.input[1:], strict=True):
            inside = [nodes[index] for index in side]
            for follower in tail:
                inner = NodeProto()
                inner.CopyFrom(follower)
                inner.name, inner.input[0] = f"{follower.name}_{name}", value
                value = inner.output[0] = f"{follower.output[0]}_{name}"
                inside.append(inner)
            if not inside:
                inside.append(helper.make_node("Identity", [value], [f"{end}_{name}"], f"{end}_{name}"))
                value = f"{end}_{name}"
            inside = self.sink(inside, [value])
            result = ValueInfoProto()
            result.CopyFrom(self.known[end])
            result.name = value
            graph = helper.make_graph(inside, f"{end}_{name}", [], [result])
            graphs.append(graph)
        made = helper.make_node("If", [self._plain(nodes, where.input[0])], [end], where.name)
        for name, graph in zip(("then_branch", "else_branch"), graphs, strict=True):
            made.attribute.append(helper.make_attribute(name, graph))
        made.metadata_props.extend(where.metadata_props)
        return made


def _reads(node: NodeProto) -> set[str]:
    """What a node reads, in its branches as well."""
    inner = (name for graph in _branches(node) for each in all_nodes(graph) for name in each.input)
    outer = (value.name for graph in _branches(node) for value in graph.output)
    return {*node.input, *inner, *outer} - {""}


def _branches(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _readers(nodes: Iterable[NodeProto]) -> dict[str, set[int]]:
    readers: dict[str, set[int]] = {}
    for index, node in enumerate(nodes):
        for name in _reads(node):
            readers.setdefault(name, set()).add(index)
    return readers


def _needed_by_nothing_else(
    nodes: Sequence[NodeProto], place: int, side: int, outputs: Collection[str]
) -> list[int]:  # fmt: skip
    """Indices of the nodes that are computed for one side of a choice alone, in order."""
    readers, where = _readers(nodes), nodes[place]
    value = where.input[side]
    inside: set[int] = set()
    for index in range(place - 1, -1, -1):
        names = [name for name in nodes[index].output if name]
        used = {reader for name in names for reader in readers.get(name, ())}
        if place in used and (list(where.input).count(value) > 1 or not {*names} & {*where.input} <= {value}):
            continue
        if used and used <= inside | {place} and not {*names} & {*outputs}:
            inside.add(index)
    return sorted(inside)


def _following(nodes: Sequence[NodeProto], place: int, outputs: Collection[str]) -> list[int]:
    """Indices of the operations on single values behind a choice, as far as nothing else reads what is between."""
    readers, produced = _readers(nodes), {name for node in nodes for name in node.output}
    tail: list[int] = []
    value = nodes[place].output[0]
    while value not in outputs and len(users := readers.get(value, set())) == 1:
        (index,) = users
        node = nodes[index]
        fits = node.op_type in FOLLOWING and node.input[0] == value and not {*node.input[1:]} & produced
        if not fits:
            break
        tail.append(index)
        value = node.output[0]
    return tail


def _keep(graph: GraphProto, known: dict[str, ValueInfoProto], weights: dict[str, TensorProto]) -> None:
    """Give every graph the weights and shapes that it alone uses: a runtime prepares weights where it finds them."""
    del graph.initializer[:]
    del graph.value_info[:]
    _place(graph, set(weights), known, weights)


def _place(
    graph: GraphProto, mine: set[str], known: dict[str, ValueInfoProto], weights: dict[str, TensorProto]
) -> None:
    ports = {value.name for value in (*graph.input, *graph.output)}
    made = {name for node in graph.node for name in node.output}
    graph.value_info.extend(
        known[name] for node in graph.node for name in node.output if name in known and name not in ports
    )
    users: dict[str, list[int]] = {}
    inner = [branch for node in graph.node for branch in _branches(node)]
    for name in (name for node in graph.node for name in node.input):
        users.setdefault(name, []).append(-1)
    for number, branch in enumerate(inner):
        for name in {name for node in branch.node for name in _reads(node)} | {value.name for value in branch.output}:
            users.setdefault(name, []).append(number)
    for value in graph.output:
        if value.name not in made:
            users.setdefault(value.name, []).append(-1)
    alone = [{name for name in mine if users.get(name) == [number]} for number in range(len(inner))]
    lower = set().union(*alone) if alone else set()
    graph.initializer.extend(weights[name] for name in weights if name in mine - lower and name in users)
    for branch, names in zip(inner, alone, strict=True):
        _place(branch, names, known, weights)
