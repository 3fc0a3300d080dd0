"""Lists of the same work laid beside each other: traced nodes, operations of a TFLite file, what a runtime timed.

Neighbouring lists are in the same order, but each lacks some of the other's: converters fold batch norms into
convolutions, XNNPACK folds a padding into the convolution behind it and takes the ReLU of an addition as a step of
its own. So they are aligned as sequences are, by the best sum of scores of what may belong together.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from edgeprune.core.records import Graph, Node
from edgeprune.formats._tflite_graph import WEIGHTED, TfliteGraph

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


def same_work(kind: str, op: str) -> float:
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
