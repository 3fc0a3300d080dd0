"""A .tflite file as objects, and back: reading what may be damaged, writing with aligned buffers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.core.errors import ModelError, RecordError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.tensors import Array

try:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
except ModuleNotFoundError as error:
    raise MissingLibrary(f"TFLite files need {error.name}: pip install 'edgeprune[tflite]'") from error

MAX_BYTES = 2**31 - 1
"""Offsets in a flatbuffer have 32 bits, one of them a sign."""
IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Of buffers, as the schema demands; kernels read weights where they lie."""
DTYPES: dict[int, str] = {
    schema.TensorType.FLOAT32: "float32", schema.TensorType.FLOAT16: "float16", schema.TensorType.INT32: "int32",
    schema.TensorType.UINT8: "uint8", schema.TensorType.INT64: "int64", schema.TensorType.BOOL: "bool",
    schema.TensorType.INT16: "int16", schema.TensorType.INT8: "int8", schema.TensorType.FLOAT64: "float64",
    schema.TensorType.UINT32: "uint32", schema.TensorType.UINT64: "uint64",
}  # fmt: skip
OPERATORS: dict[int, str] = {
    code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")
}


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc, unused-ignore]  # generated without types
    """The generated class writes data at any address."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802 (generated name)
        if self.data is None or not len(self.data):
            schema.BufferStart(builder)
            return schema.BufferEnd(builder)
        data = np.ascontiguousarray(self.data).view(np.uint8).tobytes()
        builder.StartVector(1, len(data), ALIGNMENT)
        builder.head = builder.head - len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def unpack(data: bytes) -> Any:
    """The model's objects (`schema.ModelT`), with every constant inside them.

    raises: ModelError when the bytes are not a model.
    """
    try:
        if data[4:8] != IDENTIFIER:
            raise ValueError("the identifier TFL3 is missing")
        model = schema.ModelT.InitFromPackedBuf(bytearray(data), 0)
        _take_in(model, data)
        check(model)
    except Exception as error:  # whatever damaged offsets lead to
        raise ModelError(f"not a TFLite model: {str(error) or type(error).__name__}") from error
    return model


def _take_in(model: Any, data: bytes) -> None:
    """Constants that lie behind the flatbuffer, at an offset that packing it anew would not keep. raises: ValueError.

    The quantizer writes larger models so.
    """
    for buffer in model.buffers or ():
        if buffer.offset > 1:
            end = buffer.offset + buffer.size
            if end > len(data):
                raise ValueError("a buffer lies outside the file")
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0


def check(model: Any) -> None:
    """Every index leads somewhere, and every constant has the size of its tensor. raises: ValueError."""
    if not model.subgraphs or not model.operatorCodes or not model.buffers:
        raise ValueError("it holds no operation")
    for graph in model.subgraphs:
        count = len(graph.tensors)
        used = indices(graph.inputs) + indices(graph.outputs)
        for operator in graph.operators or ():
            if not 0 <= operator.opcodeIndex < len(model.operatorCodes):
                raise ValueError("an operation has no code")
            used += indices(operator.inputs) + indices(operator.outputs)
        if not all(-1 <= index < count for index in used):
            raise ValueError("an operation reads a tensor that does not exist")
        for tensor in graph.tensors:
            if not 0 <= tensor.buffer < len(model.buffers):
                raise ValueError("a tensor has no buffer")
            content = model.buffers[tensor.buffer].data
            if content is not None and len(content) and tensor.type in DTYPES and tensor.sparsity is None:
                size = int(np.prod(shape_of(tensor), dtype=np.int64)) * np.dtype(DTYPES[tensor.type]).itemsize
                if size != len(content):
                    raise ValueError(f"tensor {name_of(tensor)} has {len(content)} bytes of {size}")
    if not model.subgraphs[0].operators:
        raise ValueError("it holds no operation")


def read(path: Path) -> tuple[Any, bytes]:
    """The objects and bytes of a file. raises: RecordError when it is missing, too large, or damaged."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than the 2 GiB of a TFLite file")
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    try:
        return unpack(data), data
    except ModelError as error:
        raise RecordError(f"{path} is truncated or {error}; export it again") from error


def pack(model: Any) -> bytes:
    """The bytes of a model. raises: ModelError over 2 GiB."""
    buffers = model.buffers
    size = sum(len(buffer.data) for buffer in buffers if buffer.data is not None)
    if size > MAX_BYTES:
        raise ModelError("the model would be larger than the 2 GiB of a TFLite file; split it")
    aligned = []
    for buffer in buffers:
        copy = _AlignedBuffer()
        copy.data = buffer.data
        aligned.append(copy)
    builder = flatbuffers.Builder(size + (1 << 16))
    model.buffers = aligned
    try:
        builder.Finish(model.Pack(builder), IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(builder.Output())


def shape_of(tensor: Any) -> tuple[int, ...]:
    """A tensor's shape, () where it has none."""
    return () if tensor.shape is None else tuple(int(size) for size in tensor.shape)


def indices(given: Any) -> list[int]:
    """Tensors that are read or written, -1 for an input that is left out."""
    return [] if given is None else [int(index) for index in given]


def name_of(tensor: Any) -> str:
    """A tensor's name as text."""
    name = tensor.name or b""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def constant(model: Any, tensor: Any) -> Array | None:
    """A tensor's values, or None where they are computed or stored without their zeros."""
    if tensor.sparsity is not None:
        return None
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data):
        return None
    return np.frombuffer(bytes(data), DTYPES[tensor.type]).reshape(shape_of(tensor))


def operator_names(model: Any) -> list[str]:
    """The operations of the model in their order; custom ones by their own names."""
    names = []
    for operator in model.subgraphs[0].operators:
        code = model.operatorCodes[operator.opcodeIndex]
        # Files older than schema 3a keep the code in the field of 8 bits.
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        names.append(OPERATORS.get(builtin, str(builtin)) if code.customCode is None else code.customCode.decode())
    return names


def precision_of(model: Any) -> str:
    """`float32`, `float16`, `dynamic` or `int8`, from the types of weights and of what they are multiplied with."""
    graph, found = model.subgraphs[0], Counter[str]()
    halves = any(t.type == schema.TensorType.FLOAT16 and constant(model, t) is not None for t in graph.tensors)
    for operator, name in zip(graph.operators, operator_names(model), strict=True):
        inputs = [graph.tensors[index] for index in indices(operator.inputs) if index >= 0]
        if len(inputs) < 2 or name in ("QUANTIZE", "DEQUANTIZE"):
            continue
        small = schema.TensorType.INT8, schema.TensorType.UINT8
        if inputs[0].type in small:
            found["int8"] += 1
        elif inputs[1].type in small and inputs[0].type == schema.TensorType.FLOAT32:
            found["dynamic"] += 1
    return next((kind for kind in ("int8", "dynamic") if found[kind]), "float16" if halves else "float32")
