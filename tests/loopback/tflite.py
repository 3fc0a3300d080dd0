"""Small TFLite models for the device tests, written without a converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated")
flatbuffers: Any = pytest.importorskip("flatbuffers")


def write_tflite(path: Path, *, channels: int = 16, seed: int = 0) -> Path:
    """`write_model` of loopback.models in TFLite: two 3x3 convolutions with a ReLU between them, (1, 32, 32, 3)."""
    generator = np.random.default_rng(seed)
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.subgraphs = 3, [schema.BufferT()], [graph]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CONV_2D
    model.operatorCodes = [code]
    graph.tensors, graph.operators = [], []

    def add(name: str, shape: tuple[int, ...], values: np.ndarray | None = None) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), schema.TensorType.FLOAT32, 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def convolve(name: str, x: int, inner: int, outer: int, relu: bool) -> int:
        options = schema.Conv2DOptionsT()
        options.strideW = options.strideH = options.dilationWFactor = options.dilationHFactor = 1
        options.fusedActivationFunction = int(relu)
        operator = schema.OperatorT()
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.Conv2DOptions, options
        weight = add(f"{name}.weight", (outer, 3, 3, inner), generator.standard_normal((outer, 3, 3, inner)))
        bias = add(f"{name}.bias", (outer,), np.zeros(outer))
        y = add(name, (1, 32, 32, outer))
        operator.inputs, operator.outputs = [x, weight, bias], [y]
        graph.operators.append(operator)
        return y

    x = add("x", (1, 32, 32, 3))
    y = convolve("y", convolve("hidden", x, 3, channels, True), channels, 8, False)
    graph.inputs, graph.outputs = [x], [y]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path
