"""Weights of 1x1 convolutions stored without their zeros: what XNNPACK's sparse kernels start from.

A sparse tensor holds the values that are not zero and where they stand (compressed rows), and a DENSIFY operation
gives it to the convolution. A runtime unpacks it once, when it opens the file; one that has sparse kernels for the
processor takes it as a hint to use them.
source: TFLite's schema, SparsityParameters; XNNPACK's delegate, "Sparse Inference": 1x1 convolutions of which two
thirds of the weights are zero, in a stretch from a 3x3 convolution of stride 2 over three channels to a mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeprune.core.errors import UsageError
from edgeprune.core.store import write_atomic
from edgeprune.core.tensors import Array
from edgeprune.formats._tflite_model import (
    constant,
    indices,
    name_of,
    operator_names,
    pack,
    read,
    shape_of,
)

LEAST_ZEROS = 0.5
"""Share from which storing where the others stand takes no more bytes than storing the zeros."""
TYPES = (schema.TensorType.FLOAT32, schema.TensorType.FLOAT16, schema.TensorType.INT8)
"""Of weights that DENSIFY unpacks."""


def encode_sparse(path: Path) -> int:
    """Rewrite a file so that 1x1 convolutions, half of whose weights or more are zero, store the others only.

    returns: how many layers. raises: UsageError when there is none; RecordError for a damaged file.
    """
    model, _ = read(path)
    graph = model.subgraphs[0]
    found = [tensor for tensor in _pointwise_weights(model) if _zeros(constant(model, tensor)) >= LEAST_ZEROS]
    if not found:
        raise UsageError(
            f"no 1x1 convolution of the model has {LEAST_ZEROS:.0%} of its weights at zero, so nothing is stored "
            "sparsely; make it sparse with `edgeprune sparsify --pattern unstructured:sparsity=0.8`"
        )
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DENSIFY
    code.version = 1
    model.operatorCodes.append(code)
    graph.operators = [_store(model, tensor, len(model.operatorCodes) - 1) for tensor in found] + graph.operators
    write_atomic(path, pack(model))
    return len(found)


def _pointwise_weights(model: Any) -> list[Any]:
    """Constant 1x1 filters, each once, as the schema's objects."""
    graph, found = model.subgraphs[0], {}
    for operator, name in zip(graph.operators, operator_names(model), strict=True):
        if name == "CONV_2D":
            place = indices(operator.inputs)[1]
            tensor = graph.tensors[place]
            if shape_of(tensor)[1:3] == (1, 1) and tensor.type in TYPES and tensor.sparsity is None:
                found[place] = tensor
    return [tensor for tensor in found.values() if constant(model, tensor) is not None]


def _zeros(values: Array | None) -> float:
    return 0.0 if values is None else float((values == 0).mean())


def _store(model: Any, tensor: Any, code: int) -> Any:
    """Move a tensor's values into a sparse one. returns: the operation that unpacks them into it."""
    graph, values = model.subgraphs[0], constant(model, tensor)
    assert values is not None
    rows = values.reshape(-1, values.shape[-1])
    live = rows != 0
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(rows[live].tobytes(), np.uint8)
    model.buffers.append(buffer)
    sparse = schema.TensorT()
    sparse.name, sparse.shape, sparse.type = f"{name_of(tensor)}_sparse", tensor.shape, tensor.type
    sparse.quantization, sparse.hasRank, sparse.buffer = tensor.quantization, True, len(model.buffers) - 1
    sparse.sparsity = _describe(values.shape, live)
    graph.tensors.append(sparse)
    place = next(index for index, each in enumerate(graph.tensors) if each is tensor)
    if not any(each is not tensor and each.buffer == tensor.buffer for each in graph.tensors):
        model.buffers[tensor.buffer].data = None
    tensor.buffer = 0  # the empty one: it is computed now
    operator = schema.OperatorT()
    operator.opcodeIndex = code
    operator.inputs = np.array([len(graph.tensors) - 1], np.int32)
    operator.outputs = np.array([place], np.int32)
    operator.builtinOptionsType = schema.BuiltinOptions.DensifyOptions
    operator.builtinOptions = schema.DensifyOptionsT()
    return operator


def _describe(shape: tuple[int, ...], live: Array) -> Any:
    """Where the values stand: all axes dense but the last, whose rows are compressed."""
    sparsity = schema.SparsityParametersT()
    sparsity.traversalOrder = np.arange(len(shape), dtype=np.int32)
    sparsity.dimMetadata = []
    for size in shape[:-1]:
        axis = schema.DimensionMetadataT()
        axis.format, axis.denseSize = schema.DimensionType.DENSE, size
        sparsity.dimMetadata.append(axis)
    axis = schema.DimensionMetadataT()
    axis.format = schema.DimensionType.SPARSE_CSR
    axis.arraySegmentsType, axis.arraySegments = _vector(np.concatenate([[0], live.sum(axis=1).cumsum()]))
    axis.arrayIndicesType, axis.arrayIndices = _vector(np.nonzero(live)[1])
    sparsity.dimMetadata.append(axis)
    return sparsity


def _vector(numbers: Array) -> tuple[int, Any]:
    """Numbers in as few bytes each as hold them all."""
    for kind, made, dtype in (
        (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT(), np.uint8),
        (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT(), np.uint16),
    ):
        if numbers.max(initial=0) <= np.iinfo(dtype).max:
            made.values = numbers.astype(dtype)
            return kind, made
    made = schema.Int32VectorT()
    made.values = numbers.astype(np.int32)
    return schema.SparseIndexVector.Int32Vector, made
