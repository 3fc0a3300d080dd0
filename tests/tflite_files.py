"""Small TFLite files made of the schema's own objects: what a converter would write, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

TYPES = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}


def write_classifier(
    path: Path, dtype: str = "float32", seed: int = 0, side: int = 4, kernel: int = 3, channels: int = 6,
    zeros: float = 0.0,
) -> None:  # fmt: skip
    """Image (1, side, side, 3), convolution to 6 channels with ReLU, mean over space, 5 scores; layout NHWC.

    dtype: float32, or int8 with scales that were not fitted to anything. zeros: share of the weights.
    """
    rng = np.random.default_rng(seed)
    graph = schema.SubGraphT()
    graph.name, graph.tensors, graph.operators = b"main", [], []
    model = schema.ModelT()
    model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], [schema.BufferT()], []
    quantised = dtype == "int8"

    def tensor(
        name: str, shape: tuple[int, ...], scale: float, values: np.ndarray | None = None, kind: str = dtype
    ) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name.encode(), list(shape), TYPES[kind], 0
        if quantised:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [scale], [0]
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            made.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def weights(name: str, shape: tuple[int, ...]) -> int:
        values = rng.standard_normal(shape)
        values[rng.random(shape) < zeros] = 0
        if quantised:
            return tensor(name, shape, 0.02, np.clip(np.rint(values / 0.02), -127, 127).astype(np.int8))
        return tensor(name, shape, 0.02, values.astype(np.float32))

    def bias(name: str, size: int, scale: float) -> int:
        values = rng.standard_normal(size)
        if quantised:
            return tensor(name, (size,), scale, np.rint(values / scale).astype(np.int32), "int32")
        return tensor(name, (size,), scale, values.astype(np.float32))

    def operator(code: int, version: int, inputs: list[int], output: int, kind: int, options: object) -> None:
        entry = schema.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = version
        model.operatorCodes.append(entry)
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = len(model.operatorCodes) - 1, inputs, [output]
        made.builtinOptionsType, made.builtinOptions = kind, options
        graph.operators.append(made)

    image = tensor("image", (1, side, side, 3), 0.04)
    convolved = tensor("convolved", (1, side, side, channels), 0.1)
    convolution = schema.Conv2DOptionsT()
    convolution.strideH = convolution.strideW = 1
    convolution.fusedActivationFunction = schema.ActivationFunctionType.RELU
    inputs = [image, weights("conv.weight", (channels, kernel, kernel, 3)), bias("conv.bias", channels, 0.04 * 0.02)]
    options = schema.BuiltinOptions
    operator(schema.BuiltinOperator.CONV_2D, 3, inputs, convolved, options.Conv2DOptions, convolution)
    pooled = tensor("pooled", (1, channels), 0.1)
    axes = tensor("axes", (2,), 1.0, np.array([1, 2], np.int32), "int32")
    graph.tensors[axes].quantization = None
    operator(
        schema.BuiltinOperator.MEAN, 2, [convolved, axes], pooled, options.ReducerOptions, schema.ReducerOptionsT()
    )
    scores = tensor("scores", (1, 5), 0.2)
    inputs = [pooled, weights("fc.weight", (5, channels)), bias("fc.bias", 5, 0.1 * 0.02)]
    linear = schema.FullyConnectedOptionsT()
    operator(schema.BuiltinOperator.FULLY_CONNECTED, 4, inputs, scores, options.FullyConnectedOptions, linear)
    graph.inputs, graph.outputs = [image], [scores]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
