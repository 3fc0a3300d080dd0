"""What an ONNX file computes: each node with its shape, type, multiply-accumulates and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from edgeprune.core.errors import RecordError
from edgeprune.core.records import Inspection, Operation, TensorInfo
from edgeprune.core.store import compressed_bytes, sha256_file
from edgeprune.formats._onnx_kernels import all_nodes

Shape = tuple[int, ...]
FIRST_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3}
"""Where a product's second factor stands among a node's inputs; 1 in all others."""
UNCOUNTED = frozenset({"LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention"})
"""They multiply, and how often is not told by their shapes alone."""


def describe(path: Path) -> Inspection:
    """The file's operations, weights and metadata. raises: RecordError when it is not an ONNX file.

    Free sizes are taken as 1. What lies in branches of an `If` or the body of a `Loop` follows it, and is counted once.
    """
    try:
        model = onnx.load_model(str(path), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model)
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf and ONNX raise several kinds
        raise RecordError(f"{path} is truncated or not an ONNX file; export it again") from error
    graph = inferred.graph
    if not graph.node:
        raise RecordError(f"{path} is truncated or not an ONNX file: it holds no operation; export it again")
    graphs = list(_all_graphs(graph))
    constants = {tensor.name: tensor for each in graphs for tensor in each.initializer}
    infos = {
        value.name: _tensor_info(value)
        for each in graphs
        for value in (*each.value_info, *each.input, *each.output)
        if value.type.tensor_type.HasField("shape")
    }
    shapes = {name: tuple(max(size, 1) for size in info.shape) for name, info in infos.items()}
    shapes |= {name: tuple(tensor.dims) for name, tensor in constants.items()}
    weights: dict[str, tuple[int, int]] = {}
    for tensor in constants.values():
        numbers, size = weights.get(kind := _dtype(tensor.data_type), (0, 0))
        weights[kind] = (numbers + math.prod(tensor.dims), size + _size(tensor))
    return Inspection(
        path=str(path),
        format="onnx",
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        compressed_bytes=compressed_bytes(path),
        inputs=tuple(_tensor_info(value) for value in graph.input if value.name not in constants),
        outputs=tuple(_tensor_info(value) for value in graph.output),
        operations=tuple(
            Operation(
                name=node.name or node.output[0],
                op=node.op_type,
                shape=infos[node.output[0]].shape if node.output[0] in infos else None,
                dtype=infos[node.output[0]].dtype if node.output[0] in infos else "",
                macs=_macs(node, shapes),
                weight_bytes=sum(_size(constants[name]) for name in set(node.input) & constants.keys()),
            )
            for node in all_nodes(graph)
        ),
        weights=weights,
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_graphs(inner)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Products that a node adds up; a bias counts nothing."""
    kind = node.op_type
    if kind in UNCOUNTED:
        return None
    if kind not in ("Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose", "Gemm", "MatMul",
                    "MatMulInteger", "QLinearMatMul"):  # fmt: skip
        return 0
    place = FIRST_WEIGHT.get(kind, 1)
    first, second = shapes.get(node.input[0]), shapes.get(node.input[place])
    out = shapes.get(node.output[0])
    if first is None or second is None or out is None:
        return None
    if kind == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if "Conv" in kind:
        return math.prod(out) * math.prod(second[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])


def _size(tensor: onnx.TensorProto) -> int:
    """Bytes of a constant's values; numbers of 4 bits are packed."""
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    numbers: int = math.prod(tensor.dims)
    return -(-numbers // 2) if packed else numbers * itemsize


def _dtype(kind: int) -> str:
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)))


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    sizes: Sequence[onnx.TensorShapeProto.Dimension] = value.type.tensor_type.shape.dim
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)
    return TensorInfo(name=value.name, shape=shape, dtype=_dtype(value.type.tensor_type.elem_type))
