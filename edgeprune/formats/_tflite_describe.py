"""What a TFLite file computes: each operator with its shape, type, multiply-accumulates and weights."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from edgeprune.core.errors import RecordError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import Inspection, Operation, TensorInfo
from edgeprune.core.store import compressed_bytes, sha256_file

try:
    from ai_edge_litert import schema_py_generated as schema
except ModuleNotFoundError as error:
    raise MissingLibrary("TFLite files need ai_edge_litert: pip install 'edgeprune[tflite]'") from error

OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
UNCOUNTED = frozenset({
    "LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM", "RNN", "SVDF", "CUSTOM",
    "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN",
})  # fmt: skip
"""They multiply (or may), and how often is not told by their shapes alone."""


def describe(path: Path) -> Inspection:
    """The file's operators, weights and metadata. raises: RecordError when it is not a TFLite file.

    Free sizes are taken as 1. The first subgraph only: others are bodies of control flow.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    if data[4:8] != b"TFL3":
        raise RecordError(f"{path} is not a TFLite file; export it again")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        graph = model.subgraphs[0]
        constants = {
            place: _bytes(model.buffers[tensor.buffer])
            for place, tensor in enumerate(graph.tensors)
            if _bytes(model.buffers[tensor.buffer])
        }
        weights: dict[str, tuple[int, int]] = {}
        for place, size in constants.items():
            numbers, total = weights.get(kind := TYPES[graph.tensors[place].type], (0, 0))
            weights[kind] = (numbers + math.prod(_shape(graph.tensors[place])), total + size)
        return Inspection(
            path=str(path),
            format="tflite",
            sha256=sha256_file(path),
            bytes=len(data),
            compressed_bytes=compressed_bytes(path),
            inputs=tuple(_tensor_info(graph.tensors[place]) for place in graph.inputs),
            outputs=tuple(_tensor_info(graph.tensors[place]) for place in graph.outputs),
            operations=tuple(_operation(model, graph, operator, constants) for operator in graph.operators or ()),
            weights=weights,
            metadata=_metadata(model),
        )
    except (struct.error, IndexError, KeyError, TypeError, AttributeError, ValueError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is truncated or altered ({error}); export it again") from error


def _operation(model: Any, graph: Any, operator: Any, constants: dict[int, int]) -> Operation:
    entry = model.operatorCodes[operator.opcodeIndex]
    # Files of before 2020 have only the old field, a byte.
    kind = OPERATORS[max(entry.builtinCode, entry.deprecatedBuiltinCode)]
    out = graph.tensors[operator.outputs[0]]
    name = kind if kind != "CUSTOM" or not entry.customCode else f"CUSTOM {entry.customCode.decode()}"
    return Operation(
        name=out.name.decode(),
        op=name,
        shape=_shape(out),
        dtype=TYPES[out.type],
        macs=_macs(kind, [graph.tensors[place] for place in operator.inputs if place >= 0], out, operator),
        weight_bytes=sum(constants.get(place, 0) for place in set(operator.inputs)),
    )


def _macs(kind: str, inputs: list[Any], out: Any, operator: Any) -> int | None:
    """Products that an operator adds up; a bias counts nothing."""
    if kind in UNCOUNTED:
        return None
    if kind not in ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"):
        return 0
    results = math.prod(max(size, 1) for size in _shape(out))
    second = _shape(inputs[1])
    if kind == "CONV_2D":
        return results * math.prod(second[1:])
    if kind == "CONV_3D":  # depth, height, width, in, out
        return results * math.prod(second[:-1])
    if kind == "DEPTHWISE_CONV_2D":
        return results * math.prod(second[1:3])
    if kind == "FULLY_CONNECTED":
        return results * second[-1]
    if kind == "TRANSPOSE_CONV":  # output's shape, weights (out, height, width, in), input
        return math.prod(max(size, 1) for size in _shape(inputs[2])) * math.prod(second[:3])
    first = _shape(inputs[0])
    return results * max(first[-2] if operator.builtinOptions.adjX else first[-1], 1)


def _bytes(buffer: Any) -> int:
    return len(buffer.data) if buffer.data is not None else int(buffer.size or 0)


def _shape(tensor: Any) -> tuple[int, ...]:
    sizes = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    return () if sizes is None else tuple(int(size) for size in sizes)


def _tensor_info(tensor: Any) -> TensorInfo:
    scales = None if tensor.quantization is None else tensor.quantization.scale
    scale = float(scales[0]) if scales is not None and len(scales) == 1 else None
    points = None if tensor.quantization is None else tensor.quantization.zeroPoint
    return TensorInfo(
        name=tensor.name.decode(),
        shape=_shape(tensor),
        dtype=TYPES[tensor.type],
        scale=scale,
        zero_point=None if scale is None else int(points[0]) if points is not None and len(points) else 0,
    )


def _metadata(model: Any) -> dict[str, str]:
    """Text as it is; of anything else, such as TFLITE_METADATA, the size."""
    found: dict[str, str] = {}
    for entry in model.metadata or ():
        data = model.buffers[entry.buffer].data
        raw = b"" if data is None else bytes(data)
        text = raw.rstrip(b"\0").decode("utf-8", "replace")
        found[entry.name.decode()] = text if text.isprintable() else f"{len(raw)} bytes"
    return found
