"""Fewer bits for an ONNX model: weights of 16 or 8 bits, and activations of 8.

Every tensor keeps its name, so that what was learnt of the float model (which node an operation came
from, how an axis follows the widths) holds for the quantised one as well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph, Precision
from edgeprune.core.tensors import Array, Calibration
from edgeprune.formats._onnx_kernels import GraphNodes

Ranges = Mapping[str, tuple[Array, Array]]
"""Tensor -> least and largest value, float32 scalars."""

EXAMPLES = 2
"""Random inputs that are run to find ranges; which ones they are does not matter for the speed."""
LEAST_SIZE = 64
"""Weights of fewer elements stay as they are: storing them otherwise would save nothing."""


SYMMETRIC = {
    "ActivationSymmetric": True, "QuantizeBias": False, "DedicatedQDQPair": True, "AddQDQPairToWeight": True,
}  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """A quantised model, and where its tensors come from.

    origins: its initialiser -> the float one, and which of that one's axes each of its axes is.
    """

    model: ModelProto
    origins: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


def quantize(model: ModelProto, precision: Precision, ranges: Ranges, exclude: Collection[str] = ()) -> Quantized:
    """The model at another precision.

    ranges: of all activations, for int8. exclude: names of operations that stay in float32.
    raises: ModelError where ONNX Runtime has no quantizer or fails on this model.
    """
    if precision.dtype == "float16":
        return _store_half(model, exclude)
    if precision.dtype == "dynamic":
        return _quantize_weights(model, exclude)
    return _quantize_all(model, precision.activations, ranges, exclude)


def float_operations(model: ModelProto, precision: Precision, graph: Graph | None) -> list[str]:
    """Names of the operations that `precision.float_nodes` became. raises: ModelError for an unknown node."""
    if not precision.float_nodes:
        return []
    if graph is None:
        raise ModelError("to leave nodes in float32 the graph they belong to is needed; trace the model")
    known = {node.name for node in graph.nodes}
    if unknown := [name for name in precision.float_nodes if name not in known]:
        raise ModelError(f"the model has no node '{unknown[0]}' to leave in float32; `edgeprune trace` lists its nodes")
    finder = GraphNodes(graph)
    return [
        node.name
        for node in model.graph.node
        if (found := finder.find(node)) is not None and found.name in precision.float_nodes
    ]


# --- ranges --------------------------------------------------------------------------------------


def find_ranges(model: ModelProto, calibration: Calibration) -> dict[str, tuple[Array, Array]]:
    """Least and largest value of every float tensor of the model over the calibration data.

    calibration: batches of any size; they are cut to the model's own. raises: ModelError.
    """
    inferred = shape_inference.infer_shapes(model).graph
    floats = {
        value.name: None
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [name for name in floats if name not in {tensor.name for tensor in model.graph.initializer}]
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            watched.graph.node.append(helper.make_node(op, [name], [f"{name}/{op}"], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(f"{name}/{op}", TensorProto.FLOAT, []))
    session = _open(watched)
    found: list[Array] = [np.array(session.run(None, feed), np.float32) for feed in _feeds(session, calibration)]
    low, high = np.min(found, 0)[0::2], np.max(found, 0)[1::2]
    for name, least, most in zip(names, low, high, strict=True):
        if not np.isfinite([least, most]).all():
            raise ModelError(f"{name} holds NaN or infinity on the calibration data; int8 has no range for it")
    return {name: (low[place], high[place]) for place, name in enumerate(names)}


def random_calibration(model: ModelProto, seed: int = 0) -> Calibration:
    """Random inputs, which are enough where only the speed is asked for."""
    rng = np.random.default_rng(seed)
    inputs = []
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            shape = [dim.dim_value or 1 for dim in kind.shape.dim]
            inputs.append((shape, helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    # Zeros where numbers are indices: any other could lie outside the table they index.
    return [
        tuple(
            rng.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
            for shape, kind in inputs
        )
        for _ in range(EXAMPLES)
    ]


def _feeds(session: onnxruntime.InferenceSession, calibration: Calibration) -> Iterator[dict[str, Array]]:
    """The calibration data in batches of the model's size; the last one is filled up with its own examples."""
    values = session.get_inputs()
    sizes = [value.shape[0] for value in values if value.shape]
    size = next((length for length in sizes if isinstance(length, int)), 1)
    for arrays in calibration:
        count = max(len(array) for array in arrays)
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count
            yield {
                value.name: array[rows] if array.ndim else array for value, array in zip(values, arrays, strict=True)
            }


def _open(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelError(f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}") from error


# --- int8 ----------------------------------------------------------------------------------------


def _quantize_all(model: ModelProto, activations: str, ranges: Ranges, exclude: Collection[str]) -> Quantized:
    """QDQ: weights per channel and symmetric, activations per tensor.

    TensorRT takes zero points of 0 only, no biases of 32 bits, a pair of conversions for every reader, and, in its
    older versions, no weights that are integers already: it folds their conversion when it builds the engine.
    source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html; NVIDIA TensorRT developer
        guide, "Working with quantized types"
    """
    try:
        with _quiet():
            from onnxruntime.quantization import CalibrationMethod, QuantType
            from onnxruntime.quantization.calibrate import TensorsData
            from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
            from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

            kind = QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8
            quantizer = QDQQuantizer(
                shape_inference.infer_shapes(model), True, False, QuantType.QInt8, kind,
                TensorsData(CalibrationMethod.MinMax, dict(ranges)), [], list(exclude),
                sorted({*QDQRegistry, *QLinearOpsRegistry}), SYMMETRIC if activations == "symmetric" else {},
            )  # fmt: skip
            quantizer.quantize_model()
            _keep_float(quantizer.model.model, exclude)
            quantizer.model.topological_sort()
    except Exception as error:  # the quantizer's errors share no base class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"ONNX Runtime cannot make an int8 model of this one: {reason}") from error
    result: ModelProto = quantizer.model.model
    del result.graph.value_info[:]
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    origins: dict[str, tuple[str, tuple[int, ...]]] = {}
    for node in result.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        name = node.input[0].removesuffix("_quantized") if node.op_type == "DequantizeLinear" else node.input[0]
        if name in floats:
            origins[node.input[0]] = (name, tuple(range(len(floats[name].dims))))
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            for beside in node.input[1:]:
                origins[beside] = (name, (axis,))
    return Quantized(result, origins)


def _keep_float(model: ModelProto, exclude: Collection[str]) -> None:
    """Put something that does nothing between a float operation and the quantisation of what it gives.

    Without it, ONNX Runtime takes the float operation between two conversions for one to be quantised, weights and
    all, when it loads the model. It drops an Identity before that, a Max of one tensor it does not.
    """
    producer = {value: node for node in model.graph.node for value in node.output}
    for node in list(model.graph.node):
        if node.op_type != "QuantizeLinear":
            continue
        before = producer.get(node.input[0])
        while before is not None and before.op_type in ("Relu", "Clip"):
            before = producer.get(before.input[0])
        if before is not None and before.name in exclude:
            kept = f"{node.input[0]}_float"
            model.graph.node.append(helper.make_node("Max", [node.input[0]], [kept], f"{node.input[0]}_Max"))
            node.input[0] = kept


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs advice on accuracy, which is for those who call it by hand."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


# --- weights alone -------------------------------------------------------------------------------


def _store_half(model: ModelProto, exclude: Collection[str]) -> Quantized:
    """Weights as float16; ONNX Runtime folds the cast to float32 when it loads them."""
    return _rewrite(model, exclude, _half)


def _quantize_weights(model: ModelProto, exclude: Collection[str]) -> Quantized:
    """Weights as int8 per channel; products quantise their activations as they come, convolutions do not.

    ONNX Runtime has a `ConvInteger`, but only per tensor: in one profile of each it was 3 times as slow as float32 on
    MobileNetV2, and took 0.7 of its time on ResNet-18. So a convolution's weights are made float32 again when the
    model is loaded. They are cast and multiplied for that, which is folded, where a DequantizeLinear would be run
    again at every inference.
    """
    return _rewrite(model, exclude, _eight_bits)


Pieces = tuple[list[NodeProto], dict[str, Array], dict[str, tuple[int, ...]], bool]
"""New operations, initialisers, axes of the float tensor that theirs are, and whether the operation is replaced."""


def _rewrite(model: ModelProto, exclude: Collection[str], change: Any) -> Quantized:
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    done: set[str] = set()
    nodes: list[NodeProto] = []
    stored: dict[str, Array] = {}
    origins: dict[str, tuple[str, tuple[int, ...]]] = {}
    kept: set[str] = {name for node in model.graph.node if node.name in exclude for name in node.input}
    for node in model.graph.node:
        replaced = False
        for name in node.input:
            tensor = weights.get(name)
            if tensor is None or tensor.data_type != TensorProto.FLOAT or name in done or name in kept:
                continue
            array = numpy_helper.to_array(tensor)
            if array.size < LEAST_SIZE or (pieces := change(node, name, array)) is None:
                continue
            operations, arrays, axes, gone = pieces
            nodes += operations
            stored |= arrays
            origins |= {key: (name, value) for key, value in axes.items()}
            replaced |= gone
            done.add(name)
        if not replaced:
            nodes.append(node)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for name, tensor in weights.items() if name not in done)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    return Quantized(result, origins)


def _half(_: NodeProto, name: str, array: Array) -> Pieces | None:
    stored = f"{name}_float16"
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        return None  # larger than float16 goes: these stay in float32
    cast = helper.make_node("Cast", [stored], [name], f"{name}_Cast", to=TensorProto.FLOAT)
    return [cast], {stored: half}, {stored: tuple(range(array.ndim))}, False


def _eight_bits(node: NodeProto, name: str, array: Array) -> Pieces | None:
    if len(node.input) < 2 or node.input[1] != name or array.ndim < 2:
        return None
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    plain = attributes.get("alpha", 1.0) == 1.0 == attributes.get("beta", 1.0) and not attributes.get("transA", 0)
    if node.op_type in ("Gemm", "MatMul") and array.ndim == 2 and plain:
        turned = bool(attributes.get("transB", 0))
        return _dynamic_product(node, name, array.T if turned else array, (1, 0) if turned else (0, 1))
    if node.op_type not in ("Conv", "ConvTranspose"):
        return None
    axis = 0 if node.op_type == "Conv" else 1
    scale = _scales(array, axis)
    quantized, scales = f"{name}_quantized", f"{name}_scale"
    integers = np.rint(array / scale).astype(np.int8)
    operations = [
        helper.make_node("Cast", [quantized], [f"{name}_Cast_Output"], f"{name}_Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_Cast_Output", scales], [name], f"{name}_Mul"),
    ]
    ones = tuple(axis if place == axis else -1 for place in range(array.ndim))
    axes = {quantized: tuple(range(array.ndim)), scales: ones}
    return operations, {quantized: integers, scales: scale}, axes, False


def _dynamic_product(node: NodeProto, name: str, array: Array, axes: tuple[int, int]) -> Pieces:
    """x W + b with x quantised to uint8 as it comes; ONNX Runtime makes one kernel of all this."""
    scale = _scales(array, 1)
    out, value = node.output[0], node.input[0]
    quantized, scales = f"{name}_quantized", f"{name}_scale"
    integers = np.rint(array / scale).astype(np.int8)
    biased = len(node.input) > 2 and bool(node.input[2])
    product = f"{out}_product" if biased else out
    operations = [
        helper.make_node("DynamicQuantizeLinear", [value], [f"{out}_x", f"{out}_x_scale", f"{out}_x_zero"],
                         f"{node.name}_DynamicQuantizeLinear"),
        helper.make_node("MatMulInteger", [f"{out}_x", quantized, f"{out}_x_zero"], [f"{out}_integers"], node.name),
        helper.make_node("Cast", [f"{out}_integers"], [f"{out}_floats"], f"{node.name}_Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}_x_scale", scales], [f"{out}_scale"], f"{node.name}_scale"),
        helper.make_node("Mul", [f"{out}_floats", f"{out}_scale"], [product], f"{node.name}_Mul"),
    ]  # fmt: skip
    if biased:
        operations.append(helper.make_node("Add", [product, node.input[2]], [out], f"{node.name}_Add"))
    return operations, {quantized: integers, scales: scale[0]}, {quantized: axes, scales: axes[1:]}, True


def _scales(array: Array, axis: int) -> Array:
    """Largest magnitude of each channel over 127, of the shape that divides the array."""
    others = tuple(place for place in range(array.ndim) if place != axis)
    scale: Array = np.abs(array).max(others, keepdims=True).astype(np.float32) / np.float32(127)
    return np.where(scale > 0, scale, np.float32(1))


def precision_of(model: ModelProto) -> str:
    """The `Precision.dtype` that a model's content shows."""
    kinds: Sequence[int] = [tensor.data_type for tensor in model.graph.initializer]
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    if TensorProto.INT8 in kinds or TensorProto.UINT8 in kinds:
        return "dynamic"
    return "float16" if TensorProto.FLOAT16 in kinds else "float32"
