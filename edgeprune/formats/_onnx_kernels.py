"""From ONNX Runtime's kernel names to the operations and the widths they depend on.

ONNX Runtime drops metadata when it fuses. In its blocked layout a fused kernel is named after its
output value (`relu_1_nchwc`), elsewhere after the operation it began as (`node_Conv_291`); layout
changes and inlined functions have names of its own making, or none. TensorRT lists what it fused
(`_tensorrt_names.py`). A kernel's weights lead back to the model: initialisers keep their state-dict keys.

Of a quantised model the map is made from the float one, whose operations and tensors have the same
names: a fused kernel bears its operation's (`node_Conv_291_token_12`), a conversion its tensor's
(`relu_QuantizeLinear`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, helper

from edgeprune.core.records import Extent, Graph, Kernel, KernelTime, Node
from edgeprune.formats._tensorrt_names import find_nodes

FUSED_BEHIND = frozenset({"Relu", "Clip", "Add", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh", "Elu"})
"""Operations that the runtime computes inside the convolution or product before them."""
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SUFFIXES = ("_kernel_time", "_nchwc")
TOKEN = re.compile(r"_token_\d+$")
"""What the runtime puts behind the name of a kernel that it fused from quantised ones."""
CONVERSION = re.compile(r"(_QuantizeLinear|_DequantizeLinear|_Max|_q|_dq)(/duplicated.*|_\d+)?$")
LAYOUT = frozenset({"ReorderInput", "Transpose", "DequantizeLinear"})
"""What the runtime puts before an operation that wants its input otherwise."""
HALF = re.compile(r"(HardSigmoid|Mul)_\d+")
"""The runtime has no HardSwish: where no convolution does it, two kernels do, one after the other, of such names."""
FX_NODE = "pkg.torch.onnx.fx_node"
SCOPES = "pkg.torch.onnx.name_scopes"


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph, and those of the branches and bodies inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


class OnnxKernelMap:
    """Kernels of the dense artifact, and who pays for what is run at other widths."""

    def __init__(self, model: ModelProto, graph: Graph, times: Sequence[KernelTime]) -> None:
        self._nodes = list(model.graph.node)
        self._by_name = {node.name: index for index, node in enumerate(self._nodes)}
        self._producer = {value: index for index, node in enumerate(self._nodes) for value in node.output}
        self._readers: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            for value in node.input:
                self._readers.setdefault(value, index)
        self._graph = graph
        mains = [main for main in self._locate(times) if main is not None]
        self._owner = self._assign(list(dict.fromkeys(mains)), self._cover(times))
        dense_name = {
            main: self._nodes[main].name if self._find_fused(time.name) else time.name
            for time, main in zip(times, self._locate(times), strict=True)
            if main is not None
        }
        chains: dict[int, list[int]] = {}
        for index, main in sorted(self._owner.items()):
            chains.setdefault(main, []).append(index)
        self._finder = GraphNodes(graph)
        self.kernels: tuple[Kernel, ...] = tuple(
            self._describe(dense_name[main], main, chain) for main, chain in chains.items()
        )
        self._name = dict(zip(chains, (kernel.name for kernel in self.kernels), strict=True))
        gates = (self._owner.get(index) for index, node in enumerate(self._nodes) if node.op_type == "HardSwish")
        self._gated = {self._name[main] for main in gates if main is not None}

    def charge(self, times: Sequence[KernelTime]) -> dict[str, float]:
        """Seconds per kernel name; what cannot be placed is charged to the kernel next to it.

        times: in the order of execution. A layout change before an operation belongs to it.
        """
        names = self.place(times)
        charged: dict[str, float] = {}
        for position, (time, name) in enumerate(zip(times, names, strict=True)):
            if name is None:
                before = next((n for n in reversed(names[:position]) if n), None)
                behind = next((n for n in names[position:] if n), None)
                name = (behind or before) if time.op in LAYOUT else (before or behind)
            if name is not None:
                charged[name] = charged.get(name, 0.0) + time.time_s
        return charged

    def place(self, times: Sequence[KernelTime]) -> list[str | None]:
        """The kernel that each time belongs to by its own name; None where that does not say."""
        found = [
            self._converts(time) if main is None else main
            for time, main in zip(times, self._locate(times), strict=True)
        ]
        names = [None if index is None else self._name.get(self._owner.get(index, -1)) for index in found]
        for position, time in enumerate(times):
            if names[position] is None and HALF.fullmatch(_plain(time)):
                before = next((name for name in reversed(names[:position]) if name), None)
                names[position] = before if before in self._gated else None
        return names

    def _converts(self, time: KernelTime) -> int | None:
        """The operation that a conversion serves: the first reader of what is made float, else the writer."""
        name = _plain(time)
        if CONVERSION.search(name) is None:
            return None
        tensor = CONVERSION.sub("", name)
        writer, reader = self._producer.get(tensor), self._readers.get(tensor)
        first, second = (reader, writer) if time.op == "DequantizeLinear" else (writer, reader)
        return second if first is None else first

    def _locate(self, times: Sequence[KernelTime]) -> list[int | None]:
        """The operation each kernel began as; None where its name does not say."""
        found: list[int | None] = [None] * len(times)
        behind: list[tuple[int, int]] = []
        for position, time in enumerate(times):
            name = _plain(time)
            if name in self._by_name:
                found[position] = self._by_name[name]
                continue
            producer = self._producer.get(name.removesuffix(SUFFIXES[1]))
            if producer is None:
                found[position] = self._main(self._find_fused(time.name))
                continue
            if time.op.endswith("Conv") and self._nodes[producer].op_type not in WEIGHTED:
                behind.append((position, producer))
            else:
                found[position] = producer
        claimed = {main for main in found if main is not None}
        # Of two convolutions before an Add, the one that is not a kernel of its own did the adding.
        for position, producer in behind:
            chain = [index for index in self._walk_back(producer) if index not in claimed]
            main = next((index for index in chain if self._nodes[index].op_type in WEIGHTED), producer)
            found[position] = main
            claimed.add(main)
        return found

    def _find_fused(self, name: str) -> list[int]:
        """The operations that TensorRT's name of a layer lists; none for other names."""
        if name.removesuffix(SUFFIXES[0]) in self._by_name or name.removesuffix(SUFFIXES[1]) in self._producer:
            return []
        return sorted(self._by_name[node] for node in find_nodes(name, self._by_name))

    def _main(self, fused: Sequence[int]) -> int | None:
        weighted = (index for index in fused if self._nodes[index].op_type in WEIGHTED)
        return next(weighted, fused[0] if fused else None)

    def _cover(self, times: Sequence[KernelTime]) -> dict[int, int]:
        """The main operation of each operation that a layer's name lists, the first layer's where two do."""
        owner: dict[int, int] = {}
        for fused in (self._find_fused(time.name) for time in times):
            if (main := self._main(fused)) is not None:
                owner.update({index: main for index in fused if index not in owner})
        return owner

    def _walk_back(self, index: int) -> Iterator[int]:
        """Weighted operations that could have been fused into an operation, nearest first."""
        queue = [index]
        while queue:
            node = self._nodes[at := queue.pop(0)]
            if node.op_type in WEIGHTED:
                yield at
            elif node.op_type in FUSED_BEHIND or node.op_type == "BatchNormalization":
                queue.extend(self._producer[value] for value in node.input if value in self._producer)

    def _assign(self, mains: list[int], covered: Mapping[int, int]) -> dict[int, int]:
        """The kernel (by its first operation) that every operation is computed in.

        covered: what the runtime itself says of it.
        """
        owner = {**covered, **{main: main for main in mains}}
        if not mains:
            return {}
        for index, node in enumerate(self._nodes):
            if index in owner:
                continue
            producers = [self._producer[value] for value in node.input if value in self._producer]
            # The latest producer: an Add is computed with the convolution that runs last.
            weighted = [p for p in producers if p in owner and self._nodes[owner[p]].op_type in WEIGHTED]
            earlier = [p for p in producers if p in owner]
            if weighted or earlier:
                owner[index] = owner[max(weighted or earlier)]
            else:
                owner[index] = min(mains, key=lambda main: abs(main - index))
        return owner

    def _describe(self, name: str, main: int, chain: list[int]) -> Kernel:
        node = self._nodes[main]
        covered = [found for index in chain if (found := self._finder.find(self._nodes[index])) is not None]
        first = self._finder.find(node)
        ops = "+".join(self._nodes[index].op_type for index in chain)
        kernel_name = TOKEN.sub("", name.removesuffix(SUFFIXES[0]))
        nodes = tuple(dict.fromkeys(found.name for found in covered))
        if first is None:
            return Kernel(name=kernel_name, nodes=nodes, signature=f"{ops} {kernel_name}", out_extent=Extent(fixed=1))
        weight = next(
            (self._finder.parameters[key] for key in first.parameters if key in self._finder.parameters), None
        )
        size = "x".join(str(length) for length in first.out_shape[2:])
        if node.op_type in WEIGHTED and weight is not None and len(weight.extents) >= 2:
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            shape = "x".join(str(length) for length in weight.shape[2:])
            strides = "x".join(str(step) for step in attributes.get("strides", ()))
            groups = attributes.get("group", 1)
            out, into = weight.extents[0], weight.extents[1]
            if node.op_type == "ConvTranspose":
                out, into = into, out
            depthwise = groups > 1 and weight.shape[1] == 1
            kind = "" if groups == 1 else " depthwise" if depthwise else f" groups={groups}"
            signature = f"{ops}{kind} kernel={shape} stride={strides} size={size}"
            return Kernel(
                name=kernel_name,
                nodes=nodes,
                signature=signature,
                out_extent=out,
                in_extent=None if depthwise else into,
                positions=prod(first.out_shape[2:]),
                taps=prod(weight.shape[2:]),
            )
        varying = next((extent for extent in first.out_extents if extent.groups), None)
        if varying is None:
            channels = first.out_shape[1] if len(first.out_shape) > 1 else 1
            varying = Extent(fixed=channels)
            size = f"{size} channels={channels}"
        return Kernel(
            name=kernel_name, nodes=nodes, signature=f"{ops} size={size}", out_extent=varying,
            positions=prod(first.out_shape[2:]),
        )  # fmt: skip


def _plain(time: KernelTime) -> str:
    """A kernel's name without what the profiler and the fusion of quantised operations put behind it."""
    return TOKEN.sub("", time.name.removesuffix(SUFFIXES[0]))


def expected_kernels(model: ModelProto) -> list[KernelTime]:
    """The kernels that a runtime will probably make: convolutions and products with what follows them, and the rest.

    Without times, of course; a batch norm or an activation behind a weighted operation is computed inside it.
    """
    producer = {value: node for node in model.graph.node for value in node.output}
    found = []
    for node in model.graph.node:
        before = [producer[value] for value in node.input if value in producer]
        fusable = node.op_type in FUSED_BEHIND or node.op_type == "BatchNormalization"
        if node.op_type != "Constant" and not (fusable and before):
            found.append(KernelTime(name=node.name, op=node.op_type, time_s=0.0))
    return found


class GraphNodes:
    """Finds the traced node that an exported operation came from."""

    def __init__(self, graph: Graph) -> None:
        self.parameters = {parameter.name: parameter for parameter in graph.parameters}
        self._by_parameter = {key: node for node in reversed(graph.nodes) for key in node.parameters}
        self._by_name = {node.name: node for node in graph.nodes}
        self._graph = graph

    def find(self, node: NodeProto) -> Node | None:
        """By weights, else by the exporter's note of the traced operation, else by its module."""
        for value in node.input:
            if value in self._by_parameter:
                return self._by_parameter[value]
        notes = {entry.key: entry.value for entry in node.metadata_props}
        name = re.match(r"%(\w+)", notes.get(FX_NODE, ""))
        if name is not None and name.group(1) in self._by_name:
            return self._by_name[name.group(1)]
        try:
            scopes = ast.literal_eval(notes.get(SCOPES, "[]"))
        except (ValueError, SyntaxError):
            scopes = []
        paths = [str(scope) for scope in scopes[:-1] if scope]
        if paths:
            return next((found for found in self._graph.nodes if found.path == paths[-1]), None)
        return None
