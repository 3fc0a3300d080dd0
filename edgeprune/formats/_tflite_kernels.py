"""From the operations that TFLite's profiler sees to the traced nodes and the widths they depend on.

Three lists of the same work have to be laid beside each other: the traced nodes, the operations of the
file, and what the runtime timed (`device/runtimes/tflite.py`: `node:N` is operation N of the file,
`delegate:N` the N-th thing that XNNPACK does in one partition). Neighbouring lists are in the same order,
but each lacks some of the other's: converters fold batch norms into convolutions, XNNPACK folds a padding
into the convolution behind it and takes the ReLU of an addition as a step of its own. So they are aligned
as sequences are, by the best sum of scores of what may belong together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from edgeprune.core.errors import RecordError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import Extent, Graph, Kernel, KernelTime, Node

WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "CONV_3D"})
PADS = frozenset({"PAD", "PADV2", "MIRROR_PAD"})
RESHAPES = frozenset({"RESHAPE", "EXPAND_DIMS", "SQUEEZE"})
CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})
WITH_WEIGHTS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul", "convolution"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
# fmt: off
XNNPACK_WORDS = {
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution",),
    "FULLY_CONNECTED": ("Fully Connected", "Convolution", "Batch Matrix"),
    "TRANSPOSE_CONV": ("Deconvolution",),
    "BATCH_MATMUL": ("Batch Matrix", "Fully Connected"),
    "SUB": ("Subtract",), "MUL": ("Multiply",), "DIV": ("Divide",), "NEG": ("Negate",), "LOGISTIC": ("Sigmoid",),
    "PAD": ("Constant Pad",), "PADV2": ("Constant Pad",),
    "MEAN": ("Mean", "Global Average"), "AVERAGE_POOL_2D": ("Average Pooling", "Global Average"),
    "MAX_POOL_2D": ("Max Pooling",),
    "RELU": ("Clamp",), "RELU6": ("Clamp",), "RELU_N1_TO_1": ("Clamp",), "RELU_0_TO_1": ("Clamp",),
    "RESHAPE": ("Static Reshape", "Copy"), "EXPAND_DIMS": ("Static Expand", "Static Reshape", "Copy"),
    "SQUEEZE": ("Static Reshape", "Copy"),
    "CONCATENATION": ("Concatenate", "Copy"), "SPLIT": ("Even Split", "Static Slice", "Copy"),
    "SLICE": ("Static Slice", "Slice"), "STRIDED_SLICE": ("Static Slice", "Slice"),
    "RESIZE_BILINEAR": ("Static Resize Bilinear", "Resize Bilinear"),
    "QUANTIZE": ("Convert",), "DEQUANTIZE": ("Convert",),
}
"""Operation -> how the names of XNNPACK's operators for it begin, where not as its own."""
TRACED_WORDS = {
    "MEAN": ("mean", "adaptive_avg_pool2d", "avg_pool2d"), "AVERAGE_POOL_2D": ("avg_pool2d", "adaptive_avg_pool2d"),
    "MAX_POOL_2D": ("max_pool2d", "adaptive_max_pool2d"), "LOGISTIC": ("sigmoid", "silu", "glu"),
    "MUL": ("mul", "hardsigmoid", "silu", "glu"), "RELU6": ("relu6", "hardtanh", "clamp", "hardsigmoid"),
    "RELU_0_TO_1": ("hardsigmoid", "hardtanh", "clamp"), "RELU_N1_TO_1": ("hardtanh", "clamp"), "ADD": ("add", "iadd"),
    "PAD": ("pad", "constant_pad_nd"), "PADV2": ("pad", "constant_pad_nd"), "MIRROR_PAD": ("pad",),
    "STRIDED_SLICE": ("slice", "narrow", "chunk", "split"), "SLICE": ("slice", "narrow", "chunk", "split"),
    "SPLIT": ("split", "chunk", "unbind"), "CONCATENATION": ("cat", "concat"), "TRANSPOSE": ("permute", "transpose"),
    "RESHAPE": ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    "BATCH_MATMUL": ("matmul", "bmm", "scaled_dot_product_attention"),
    "SOFTMAX": ("softmax", "scaled_dot_product_attention"),
    "RESIZE_BILINEAR": ("upsample_bilinear2d", "interpolate"),
    "RESIZE_NEAREST_NEIGHBOR": ("upsample_nearest2d", "interpolate"),
}
"""Operation -> traced operations that become it, where they are called otherwise."""
# fmt: on
SURE, KIND, HINT = 10.0, 2.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of the file; tensors are numbers of its main graph."""

    kind: str
    activation: str
    stride: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weight: tuple[int, ...] | None
    """Shape as (out, in, *window), without a window of one position."""


@dataclass(frozen=True, kw_only=True)
class TfliteGraph:
    """What of a file's main graph the kernels depend on."""

    operations: tuple[Operation, ...]
    names: tuple[str, ...]
    """Of the tensors."""
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]

    @cached_property
    def producer(self) -> dict[int, int]:
        """Tensor -> operation."""
        return {tensor: place for place, operation in enumerate(self.operations) for tensor in operation.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Tensor -> operations."""
        found: dict[int, list[int]] = {}
        for place, operation in enumerate(self.operations):
            for tensor in operation.inputs:
                found.setdefault(tensor, []).append(place)
        return found

    def before(self, place: int) -> list[int]:
        """Operations whose outputs an operation reads."""
        return [self.producer[tensor] for tensor in self.operations[place].inputs if tensor in self.producer]

    def behind(self, place: int) -> list[int]:
        """Operations that read an operation's outputs."""
        return [reader for tensor in self.operations[place].outputs for reader in self.consumers.get(tensor, ())]


def read_tflite_graph(model: bytes) -> TfliteGraph:
    """The main graph of a file. raises: RecordError; MissingLibrary."""
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ModuleNotFoundError as error:
        raise MissingLibrary("TFLite files need ai-edge-litert: pip install 'edgeprune[tflite]'") from error
    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    activations = {
        value: name for name, value in vars(schema.ActivationFunctionType).items() if not name.startswith("_")
    }
    if model[4:8] != b"TFL3":
        raise RecordError("this is no TFLite model: it does not say TFL3")
    parsed = schema.ModelT.InitFromPackedBuf(model, 0)
    graph = parsed.subgraphs[0]
    shapes = tuple(tuple(map(int, _given(tensor.shape))) for tensor in graph.tensors)

    def read(operator: Any) -> Operation:
        code = parsed.operatorCodes[operator.opcodeIndex]
        kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        options = operator.builtinOptions
        inputs = tuple(map(int, _given(operator.inputs)))
        # A transposed convolution's first input is the size of its output.
        shape = shapes[inputs[1]] if kind in WEIGHTED else None
        return Operation(
            kind=kind,
            activation=activations.get(getattr(options, "fusedActivationFunction", 0), "NONE"),
            stride=tuple(int(getattr(options, name)) for name in ("strideH", "strideW") if hasattr(options, name)),
            inputs=tuple(tensor for tensor in inputs if tensor >= 0),
            outputs=tuple(map(int, _given(operator.outputs))),
            weight=None if shape is None else _weight_shape(kind, shape),
        )

    return TfliteGraph(
        operations=tuple(map(read, _given(graph.operators))),
        names=tuple((tensor.name or b"").decode("utf-8", "replace") for tensor in graph.tensors),
        shapes=shapes,
        inputs=tuple(map(int, _given(graph.inputs))),
    )


class TfliteKernelMap:
    """Kernels of the dense artifact, and who pays for what is run at other widths."""

    def __init__(self, model: bytes, graph: Graph, times: Sequence[KernelTime] | None) -> None:
        self._file = read_tflite_graph(model)
        self._node_of = match_nodes(self._file, graph)
        self._nodes = {node.name: node for node in graph.nodes}
        self._parameters = {parameter.name: parameter for parameter in graph.parameters}
        self._located: dict[tuple[tuple[str, str], ...], list[int]] = {}
        mains = self._expect() if times is None else sorted(set(self._locate(times)))
        self._owner = self._assign(mains)
        chains: dict[int, list[int]] = {main: [] for main in mains}
        for place, main in sorted(self._owner.items()):
            chains[main].append(place)
        covered = self._cover(graph, chains)
        self.kernels: tuple[Kernel, ...] = tuple(
            self._describe(main, chain, covered[main]) for main, chain in chains.items()
        )

    def charge(self, times: Sequence[KernelTime]) -> dict[str, float]:
        """Seconds per kernel name; what cannot be placed is charged to the kernel next to it.

        times: in the order of execution.
        """
        charged: dict[str, float] = {}
        for time, place in zip(times, self._locate(times), strict=True):
            name = self._name(self._owner[place])
            charged[name] = charged.get(name, 0.0) + time.time_s
        return charged

    def _name(self, place: int) -> str:
        return f"{self._file.operations[place].kind.lower()}_{place}"

    def _expect(self) -> list[int]:
        """Operations that probably take time of their own."""
        operations = self._file.operations
        mains = []
        for place, operation in enumerate(operations):
            behind = [operations[reader].kind for reader in self._file.behind(place)]
            folded = operation.kind in PADS and behind and all(kind in WEIGHTED for kind in behind)
            computed = self._file.before(place) or operation.inputs[0] in self._file.inputs
            constant = operation.kind in CONVERSIONS and not computed
            if not (folded or constant or operation.kind in RESHAPES):
                mains.append(place)
        return mains or list(range(len(operations)))

    # --- what was timed -> operations ---------------------------------------------------------------

    def _locate(self, times: Sequence[KernelTime]) -> list[int]:
        """The operation that each of the times belongs to."""
        key = tuple((time.name, time.op) for time in times)
        if key not in self._located:
            self._located[key] = self._place(key)
        return self._located[key]

    def _place(self, timed: Sequence[tuple[str, str]]) -> list[int]:
        operations = self._file.operations
        found: list[int | None] = [None] * len(timed)
        alone = set()
        for position, (name, _) in enumerate(timed):
            kind, _, number = name.partition(":")
            if kind == "node" and number.isdigit() and int(number) < len(operations):
                found[position] = int(number)
                alone.add(int(number))
        delegated = [place for place in execution_order(self._file, alone) if place not in alone]
        inside = [position for position, place in enumerate(found) if place is None]

        def score(left: int, right: int) -> float:
            return _same_work(operations[delegated[left]].kind, timed[inside[right]][1])

        for left, right in align(len(delegated), len(inside), score):
            found[inside[right]] = delegated[left]
        return self._fill(found, timed)

    @staticmethod
    def _fill(found: list[int | None], timed: Sequence[tuple[str, str]]) -> list[int]:
        """Times without an operation go to the one before; what prepares another's input, to the one behind."""
        filled = []
        for position, place in enumerate(found):
            before = next((p for p in reversed(found[:position]) if p is not None), None)
            behind = next((p for p in found[position:] if p is not None), None)
            prepares = timed[position][1].startswith(("Convert", "Constant Pad"))
            near = (behind, before) if prepares else (before, behind)
            filled.append(place if place is not None else next((p for p in near if p is not None), 0))
        return filled

    # --- operations -> kernels ----------------------------------------------------------------------

    def _assign(self, mains: list[int]) -> dict[int, int]:
        """The kernel, by its main operation, that every operation is computed in."""
        owner = {main: main for main in mains}
        places = range(len(self._file.operations))
        # Paddings and conversions go with what reads them, last first; all else with what it reads.
        for place in reversed(places):
            reader = next((reader for reader in self._file.behind(place) if reader in owner), None)
            if place not in owner and reader is not None and self._file.operations[place].kind in PADS | CONVERSIONS:
                owner[place] = owner[reader]
        for place in places:
            if place not in owner and (before := [owner[p] for p in self._file.before(place) if p in owner]):
                owner[place] = max(before)
        for place in places:
            if place not in owner:
                owner[place] = min(mains, key=lambda main: abs(main - place))
        return owner

    def _cover(self, graph: Graph, chains: dict[int, list[int]]) -> dict[int, tuple[str, ...]]:
        """Traced nodes of each kernel; those that left no operation go with the node they read."""
        kernel_of = {
            self._node_of[place].name: main
            for main, chain in chains.items()
            for place in chain
            if place in self._node_of
        }
        for node in graph.nodes:
            if node.name not in kernel_of and (readable := [name for name in node.inputs if name in kernel_of]):
                kernel_of[node.name] = kernel_of[readable[0]]
        return {main: tuple(n.name for n in graph.nodes if kernel_of.get(n.name) == main) for main in chains}

    def _describe(self, main: int, chain: list[int], nodes: tuple[str, ...]) -> Kernel:
        name, operation = self._name(main), self._file.operations[main]
        node = self._node_of.get(main) or self._near(main)
        ops = "+".join(
            self._file.operations[place].kind + _suffix(self._file.operations[place].activation) for place in chain
        )
        if node is None:
            return Kernel(name=name, nodes=nodes, signature=f"{ops} {name}", out_extent=Extent(fixed=1))
        size = _spatial(node.out_shape)
        weight = next((self._parameters[key] for key in node.parameters if key in self._parameters), None)
        if operation.kind in WEIGHTED and main in self._node_of and weight is not None and len(weight.shape) >= 2:
            groups = int(node.attributes.get("groups", 1) or 1)
            out, into = weight.extents[0], weight.extents[1]
            if node.op in TRANSPOSED:
                out, into = into, out
            depthwise = groups > 1 and weight.shape[1] == 1
            kind = "" if groups == 1 else " depthwise" if depthwise else f" groups={groups}"
            window = "x".join(map(str, weight.shape[2:]))
            stride = "x".join(map(str, operation.stride))
            return Kernel(
                name=name,
                nodes=nodes,
                signature=f"{ops}{kind} kernel={window} stride={stride} size={size}",
                out_extent=out,
                in_extent=None if depthwise else into,
                positions=prod(node.out_shape[2:]),
                taps=prod(weight.shape[2:]),
            )
        # A mean costs what it reads, a padding what it writes.
        read = next((self._nodes[key] for key in node.inputs if key in self._nodes), None)
        if main in self._node_of and read is not None and _spatial(read.out_shape) != size:
            size = f"{_spatial(read.out_shape)}->{size}"
        varying = next((extent for extent in node.out_extents if extent.groups), None)
        if varying is None:
            channels = node.out_shape[1] if len(node.out_shape) > 1 else 1
            varying = Extent(fixed=channels)
            size = f"{size} channels={channels}"
        return Kernel(
            name=name, nodes=nodes, signature=f"{ops} size={size}", out_extent=varying,
            positions=prod(node.out_shape[2:]),
        )  # fmt: skip

    def _near(self, place: int) -> Node | None:
        """The node of the nearest operation that has one: first of those it reads, then of its readers."""
        for step in (self._file.before, self._file.behind):
            queue, seen = [place], {place}
            while queue:
                at = queue.pop(0)
                if at in self._node_of:
                    return self._node_of[at]
                fresh = [other for other in step(at) if other not in seen]
                seen.update(fresh)
                queue += fresh
        return None


# --- laying lists beside each other ------------------------------------------------------------------


def align(left: int, right: int, score: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Pairs of two sequences, ascending in both, of the greatest sum of scores (only positive ones pair).

    left, right: lengths. source: Needleman and Wunsch, J. Mol. Biol. 48 (1970), without gap costs.
    """
    best = [[0.0] * (right + 1) for _ in range(left + 1)]
    scores = [[score(i, j) for j in range(right)] for i in range(left)]
    for i in reversed(range(left)):
        for j in reversed(range(right)):
            paired = scores[i][j] + best[i + 1][j + 1] if scores[i][j] > 0 else 0.0
            best[i][j] = max(paired, best[i + 1][j], best[i][j + 1])
    pairs = []
    i = j = 0
    while i < left and j < right:
        if scores[i][j] > 0 and best[i][j] == scores[i][j] + best[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def execution_order(file: TfliteGraph, alone: set[int]) -> list[int]:
    """Operations in the order in which an interpreter executes them that delegates all but `alone`.

    It takes what is ready of one sort as long as there is some, then of the other.
    source: TFLite's partitioning (graph_info.cc), as what runs shows it.
    """
    operations = file.operations
    order: list[int] = []
    done: set[int] = set()
    while len(order) < len(operations):
        sort: bool | None = None
        grew = True
        while grew:
            grew = False
            for place in range(len(operations)):
                if place in done or any(before not in done for before in file.before(place)):
                    continue
                sort = place in alone if sort is None else sort
                if (place in alone) == sort:
                    done.add(place)
                    order.append(place)
                    grew = True
        if sort is None:  # a cycle: no valid file has one
            order += [place for place in range(len(operations)) if place not in done]
    return order


def match_nodes(file: TfliteGraph, graph: Graph) -> dict[int, Node]:
    """Operation -> the traced node that it came from, where there is one."""
    operations = file.operations
    parameters = {parameter.name: parameter for parameter in graph.parameters}

    def node_weight(node: Node) -> tuple[int, ...] | None:
        if node.op not in WITH_WEIGHTS | TRANSPOSED:
            return None
        shape = next((parameters[key].shape for key in node.parameters if key in parameters), ())
        if len(shape) < 2:
            return None
        if node.op in TRANSPOSED:
            shape = (shape[1], shape[0], *shape[2:])
        return (*shape[:2], *(length for length in shape[2:] if length > 1))

    weights = [node_weight(node) for node in graph.nodes]

    def score(left: int, right: int) -> float:
        operation, node = operations[left], graph.nodes[right]
        out = operation.outputs[0]
        hint = HINT if _names_path(file.names[out], node.path) else 0.0
        if operation.weight is not None:
            return SURE + hint if operation.weight == weights[right] else 0.0
        if not _came_from(operation.kind, node.op):
            return 0.0
        return KIND + hint + (HINT if sorted(file.shapes[out]) == sorted(node.out_shape) else 0.0)

    pairs = align(len(operations), len(graph.nodes), score)
    found = {place: graph.nodes[number] for place, number in pairs}
    # Branches may come in another order: what has weights is still told by their shape.
    left_over = [
        number for number, weight in enumerate(weights) if weight and graph.nodes[number] not in found.values()
    ]
    for place, operation in enumerate(operations):
        if operation.weight is not None and place not in found:
            fitting = [number for number in left_over if score(place, number) > 0]
            if fitting:
                number = max(fitting, key=lambda candidate: score(place, candidate))
                found[place] = graph.nodes[number]
                left_over.remove(number)
    return found


def _same_work(kind: str, op: str) -> float:
    """How surely an operator of XNNPACK does the work of an operation; 0: it does not."""
    words = XNNPACK_WORDS.get(kind)
    if words is None:
        return KIND if _letters(op.partition(" (")[0]).startswith(_letters(kind)) else 0.0
    if not op.startswith(words):
        return 0.0
    if kind not in WEIGHTED:
        return KIND
    return SURE + (HINT if ("DWConv" in op) == (kind == "DEPTHWISE_CONV_2D") else 0.0)


def _came_from(kind: str, op: str) -> bool:
    return op.rstrip("_") in TRACED_WORDS.get(kind, ()) or _letters(op) == _letters(kind)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _names_path(tensor: str, path: str) -> bool:
    """Whether a tensor is named after a module: `.../package.Class_layer1/package.Class_0/...;` for `layer1.0`."""
    wanted = path.split(".")
    return bool(path) and any(
        len(parts) >= len(wanted)
        and all(part.endswith(f"_{name}") for part, name in zip(parts[-len(wanted) :], wanted, strict=True))
        for parts in (piece.split("/") for piece in tensor.split(";"))
    )


def _weight_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "FULLY_CONNECTED":
        return shape
    if kind == "CONV_3D":
        window, into, out = shape[:3], shape[3], shape[4]
    elif kind == "DEPTHWISE_CONV_2D":
        window, into, out = shape[1:3], 1, shape[3]
    else:
        window, into, out = shape[1:-1], shape[-1], shape[0]
    return (out, into, *(length for length in window if length > 1))


def _suffix(activation: str) -> str:
    return "" if activation == "NONE" else f"+{activation}"


def _spatial(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:]))


def _given(values: Any) -> Any:
    return () if values is None else values
