"""An .onnx file as the model: every operator against ONNX Runtime, whole nets, names, files that cannot be taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import edgeprune
from exactness import LIMIT, random_keep, randomise, relative_error
from onnx import TensorProto, helper, numpy_helper
from small_nets import NETS, ResNet20
from torch import Tensor, nn
from zoo import timm_model, torchvision_models

from edgeprune.compact import compact_model, save_compact
from edgeprune.core.errors import DataError, InputError, ModelError
from edgeprune.core.records import ModelSpec
from edgeprune.export import export_model
from edgeprune.formats._onnx_import.batch import FixedBatch, across_batches
from edgeprune.formats._onnx_import.build import OPERATORS
from edgeprune.formats.onnx import import_model, inspect
from edgeprune.graphs.ports import get_ports
from edgeprune.graphs.slice import mask_model
from edgeprune.load import example_inputs, load_data, load_model
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    shapes: Sequence[Sequence[int | str]],
    weights: dict[str, Any] | None = None,
    *,
    opset: int = 20,
    outputs: Sequence[str] = ("out",),
) -> Path:
    """A file of these nodes whose inputs are x0, x1 ..."""
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", inputs, results, tensors)
    model = helper.make_model(graph, opset_imports=_opsets(opset), ir_version=10)
    onnx.save_model(model, str(path))
    return path


def _opsets(opset: int) -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]


def run_file(path: Path, *inputs: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in inputs]
    return [torch.from_numpy(out) for out in session.run(None, dict(zip(names, arrays, strict=True)))]


def leaves(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        given = module(*inputs)
    return list(given) if isinstance(given, tuple) else [given]


# --- every operator ------------------------------------------------------------------------------

IMAGE = (1, 8, 6, 6)
STEPS = (3, 1, 4)
"""Of a sequence, whose second axis is the batch."""
BLOCK = np.stack(np.meshgrid([0], [2, 4], [1, 2, 3], indexing="ij"), -1)
"""Indices of x[:, 2:5:2, 1:4]."""
Case = tuple[str, dict[str, Any], list[Any], Sequence[int], int]


def case(
    kind: str, *others: Any, shape: Sequence[int] = IMAGE, opset: int = 20, **attributes: Any
) -> tuple[str, dict[str, Any], list[Any], Sequence[int], int]:
    """A node whose first input is the model's; others: constants, "x" for the input again, None for one left out."""
    return kind, attributes, list(others), shape, opset


UNARY = """Abs Atan Ceil Celu Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu Round
    Selu Sigmoid Sign Sin Softplus Softsign Tan Tanh ThresholdedRelu Sinh Cosh Asinh Dropout"""
CASES: dict[str, Case] = {name: case(name) for name in UNARY.split()} | {
    "Add": case("Add", noise(8, 1, 1)),
    "Sub, a number": case("Sub", np.float32(2.0)),
    "Mul, twice the input": case("Mul", "x"),
    "Div": case("Div", np.abs(noise(1, 8, 1, 1)) + 1),
    "Pow": case("Pow", np.float32(2.0)),
    "Max": case("Max", noise(1, 8, 1, 1), "x"),
    "Min": case("Min", noise(1, 8, 1, 1)),
    "Sum": case("Sum", "x", noise(8, 1, 1)),
    "Mean": case("Mean", "x", noise(8, 1, 1)),
    "Mod": case("Mod", np.float32(2.0), fmod=1),
    "Clip": case("Clip", np.float32(-0.5), np.float32(0.5)),
    "Clip, relu6": case("Clip", np.float32(0), np.float32(6)),
    "Clip, attributes": case("Clip", opset=10, min=-0.5, max=0.5),
    "Clip, one bound": case("Clip", None, np.float32(0.5)),
    "PRelu": case("PRelu", noise(8, 1, 1)),
    "Gelu, tanh": case("Gelu", approximate="tanh"),
    "HardSigmoid, a sixth": case("HardSigmoid", alpha=1 / 6),
    "Conv": case("Conv", noise(12, 8, 3, 3), noise(12), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    "Conv, depthwise": case("Conv", noise(8, 1, 3, 3), kernel_shape=[3, 3], group=8, dilations=[2, 2]),
    "Conv, uneven pads": case("Conv", noise(4, 8, 3, 3), kernel_shape=[3, 3], pads=[0, 1, 2, 1]),
    "Conv, SAME_UPPER": case("Conv", noise(4, 8, 3, 3), kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, SAME_LOWER": case("Conv", noise(4, 8, 3, 3), kernel_shape=[3, 3], auto_pad="SAME_LOWER", strides=[2, 2]),
    "Conv, one axis": case("Conv", noise(4, 8, 3), kernel_shape=[3], shape=(1, 8, 10)),
    "Conv, three axes": case("Conv", noise(4, 2, 2, 2, 2), kernel_shape=[2, 2, 2], shape=(1, 2, 4, 4, 4)),
    "ConvTranspose": case("ConvTranspose", noise(8, 4, 2, 2), noise(4), kernel_shape=[2, 2], strides=[2, 2]),
    "ConvTranspose, pads": case(
        "ConvTranspose", noise(8, 4, 3, 3), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0],
        output_padding=[1, 1],
    ),
    "Gemm": case("Gemm", noise(8, 5), noise(5), shape=(1, 8)),
    "Gemm, turned and scaled": case("Gemm", noise(5, 8), noise(1, 5), shape=(1, 8), transB=1, alpha=0.5, beta=2.0),
    "Gemm, no bias": case("Gemm", noise(8, 5), shape=(1, 8)),
    "MatMul": case("MatMul", noise(8, 5), shape=(1, 4, 8)),
    "MatMul, of the input": case("MatMul", "x", shape=(1, 8, 8)),
    "Einsum": case("Einsum", noise(8, 5), shape=(1, 4, 8), equation="bnc,cd->bnd"),
    "BatchNormalization": case("BatchNormalization", noise(8), noise(8), noise(8), np.abs(noise(8)) + 0.5),
    "InstanceNormalization": case("InstanceNormalization", noise(8), noise(8)),
    "LayerNormalization": case("LayerNormalization", noise(8), noise(8), shape=(1, 4, 8)),
    "LayerNormalization, two axes": case("LayerNormalization", noise(4, 8), shape=(1, 4, 8), axis=1),
    "GroupNormalization": case("GroupNormalization", noise(8), noise(8), opset=21, num_groups=2),
    "RMSNormalization": case("RMSNormalization", noise(8), shape=(1, 4, 8), opset=23, axis=-1),
    "LRN": case("LRN", size=3, alpha=0.01),
    "LpNormalization": case("LpNormalization", axis=1),
    "MaxPool": case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool, ceiling": case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "MaxPool, uneven pads": case("MaxPool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1]),
    "AveragePool": case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool, counting pads": case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "AveragePool, uneven pads": case("AveragePool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1], opset=19),
    "GlobalAveragePool": case("GlobalAveragePool"),
    "GlobalMaxPool": case("GlobalMaxPool"),
    "Resize, nearest": case(
        "Resize", None, np.float32([1, 1, 2, 2]), mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    ),
    "Resize, linear, sizes": case("Resize", None, None, whole(1, 8, 9, 9), mode="linear"),
    "Resize, corners": case(
        "Resize", None, np.float32([1, 1, 1.5, 1.5]), mode="linear", coordinate_transformation_mode="align_corners"
    ),
    "Resize, cubic": case("Resize", None, None, whole(1, 8, 12, 12), mode="cubic"),
    "Upsample": case("Upsample", np.float32([1, 1, 2, 2]), mode="nearest", opset=9),
    "GridSample": case("GridSample", np.tanh(noise(1, 4, 4, 2)), align_corners=1),
    "Softmax": case("Softmax", axis=1),
    "Softmax, old": case("Softmax", axis=1, opset=11),
    "LogSoftmax": case("LogSoftmax", axis=-1),
    "ReduceMean": case("ReduceMean", whole(2, 3), keepdims=0),
    "ReduceMean, attribute": case("ReduceMean", opset=13, axes=[2, 3]),
    "ReduceSum": case("ReduceSum", whole(1)),
    "ReduceMax": case("ReduceMax", whole(-1), keepdims=0),
    "ReduceMin": case("ReduceMin", whole(1)),
    "ReduceL1": case("ReduceL1", whole(1)),
    "ReduceL2": case("ReduceL2", whole(1)),
    "ReduceSumSquare": case("ReduceSumSquare", whole(1)),
    "ReduceLogSumExp": case("ReduceLogSumExp", whole(1)),
    "CumSum": case("CumSum", np.int64(1)),
    "Reshape": case("Reshape", whole(1, 2, 4, 36)),
    "Reshape, minus one": case("Reshape", whole(1, -1)),
    "Reshape, zero": case("Reshape", whole(0, -1, 6)),
    "Flatten": case("Flatten"),
    "Flatten, inside": case("Flatten", axis=2),
    "Transpose": case("Transpose", perm=[0, 2, 3, 1]),
    "Squeeze": case("Squeeze", whole(2), shape=(1, 8, 1, 6)),
    "Squeeze, attribute": case("Squeeze", shape=(1, 8, 1, 6), opset=11, axes=[2]),
    "Unsqueeze": case("Unsqueeze", whole(1, -1)),
    "Concat": case("Concat", "x", noise(1, 3, 6, 6), axis=1),
    "Slice": case("Slice", whole(2), whole(7), whole(1)),
    "Slice, step and end": case("Slice", whole(0, -4), whole(2**63 - 1, -1), whole(2, 3), whole(2, 1)),
    "Slice, backwards": case("Slice", whole(-1), whole(-(2**63)), whole(3), whole(-1)),
    "Slice, attributes": case("Slice", opset=9, starts=[1], ends=[5], axes=[1]),
    "Gather": case("Gather", whole(0, 3, 2), axis=1),
    "Gather, one": case("Gather", np.int64(-1), axis=1),
    "Gather, a run": case("Gather", whole(2, 3, 4), axis=1),
    "GatherElements": case("GatherElements", np.zeros((1, 8, 6, 2), np.int64), axis=3),
    "Expand": case("Expand", whole(1, 8, 6, 6), shape=(1, 8, 1, 1)),
    "Tile": case("Tile", whole(1, 2, 1, 1)),
    "Pad": case("Pad", whole(0, 2, 1, 0, 0, 2, 0, 1), np.float32(0.5)),
    "Pad, reflected": case("Pad", whole(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    "Pad, attribute": case("Pad", opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1]),
    "Col2Im": case(
        "Col2Im", whole(5, 5), whole(2, 2), shape=(1, 12, 16), pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1]
    ),
    "DepthToSpace": case("DepthToSpace", blocksize=2),
    "DepthToSpace, CRD": case("DepthToSpace", blocksize=2, mode="CRD"),
    "SpaceToDepth": case("SpaceToDepth", blocksize=2),
    "ScatterND, a block": case("ScatterND", BLOCK, noise(1, 2, 3, 6)),
    "ScatterND, points": case("ScatterND", whole(4, 1, 0, 5).reshape(2, 2), noise(2, 6), shape=(6, 6, 6)),
    "ScatterElements": case("ScatterElements", np.zeros((1, 8, 6, 1), np.int64) + 2, noise(1, 8, 6, 1), axis=3),
    "LSTM": case("LSTM", noise(1, 20, 4), noise(1, 20, 5), noise(1, 40), shape=STEPS, hidden_size=5),
    "LSTM, both ways, a state": case(
        "LSTM", noise(2, 20, 4), noise(2, 20, 5), noise(2, 40), None, noise(2, 1, 5), noise(2, 1, 5), shape=STEPS,
        hidden_size=5, direction="bidirectional",
    ),
    "LSTM, backwards, no bias": case(
        "LSTM", noise(1, 20, 4), noise(1, 20, 5), shape=STEPS, hidden_size=5, direction="reverse"
    ),
    "GRU": case(
        "GRU", noise(1, 15, 4), noise(1, 15, 5), noise(1, 30), shape=STEPS, hidden_size=5, linear_before_reset=1
    ),
    "GRU, both ways": case(
        "GRU", noise(2, 15, 4), noise(2, 15, 5), noise(2, 30), shape=STEPS, hidden_size=5, linear_before_reset=1,
        direction="bidirectional",
    ),
    "RNN": case("RNN", noise(1, 5, 4), noise(1, 5, 5), noise(1, 10), shape=STEPS, hidden_size=5),
    "RNN, relu": case("RNN", noise(1, 5, 4), noise(1, 5, 5), shape=STEPS, hidden_size=5, activations=["Relu"]),
    "SimplifiedLayerNormalization": case(
        "SimplifiedLayerNormalization", noise(8), shape=(1, 4, 8), axis=-1, epsilon=1e-6
    ),
    **{f"contrib {name}": case(f"com.microsoft.{name}") for name in ("Gelu", "FastGelu", "QuickGelu")},
    "contrib FastGelu, bias": case("com.microsoft.FastGelu", noise(8), shape=(1, 4, 8)),
    "contrib BiasGelu": case("com.microsoft.BiasGelu", noise(8), shape=(1, 4, 8)),
    "contrib FusedConv": case(
        "com.microsoft.FusedConv", noise(8, 8, 3, 3), noise(8), "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
        activation="Relu",
    ),
    **{
        f"contrib FusedConv, {kind}": case(
            "com.microsoft.FusedConv", noise(4, 8, 3, 3), kernel_shape=[3, 3], activation=kind, activation_params=given
        )
        for kind, given in {"LeakyRelu": [0.2], "Clip": [0.0, 6.0], "HardSigmoid": [0.2, 0.5]}.items()
    },
    "contrib FusedGemm": case(
        "com.microsoft.FusedGemm", noise(5, 8), noise(5), shape=(1, 8), transB=1, activation="Tanh"
    ),
    "contrib FusedMatMul": case("com.microsoft.FusedMatMul", noise(5, 8), shape=(1, 4, 8), transB=1, alpha=0.5),
    "contrib FusedMatMul, of the input": case("com.microsoft.FusedMatMul", "x", shape=(1, 4, 8), transB=1, alpha=0.5),
    "contrib SkipLayerNormalization": case(
        "com.microsoft.SkipLayerNormalization", "x", noise(8), noise(8), noise(8), shape=(1, 4, 8), epsilon=1e-5
    ),
    "contrib SkipSimplifiedLayerNormalization": case(
        "com.microsoft.SkipSimplifiedLayerNormalization", "x", noise(8), shape=(1, 4, 8), epsilon=1e-5
    ),
    "contrib Attention": case(
        "com.microsoft.Attention", noise(8, 24), noise(24), shape=(1, 4, 8), num_heads=2
    ),
    "Trilu": case("Trilu", np.int64(1)),
    "Attention": case("Attention", "x", "x", shape=(1, 2, 5, 4), opset=23),
    "Swish": case("Swish", opset=24, alpha=1.0),
}  # fmt: skip
CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Split": (
        [
            helper.make_node("Split", ["x0", "sizes"], ["a", "b"], axis=1),
            helper.make_node("Concat", ["b", "a"], ["out"], axis=1),
        ],
        {"sizes": whole(3, 5)},
    ),
    "Cast, Equal, Where, Not": (
        [
            helper.make_node("Greater", ["x0", "zero"], ["positive"]),
            helper.make_node("Not", ["positive"], ["other"]),
            helper.make_node("Where", ["other", "small", "x0"], ["kept"]),
            helper.make_node("Cast", ["other"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["kept", "number"], ["out"]),
        ],
        {"zero": np.float32(0), "small": np.float32(0.1)},
    ),
    "Less, And, Or, Xor": (
        [
            helper.make_node("Less", ["x0", "half"], ["low"]),
            helper.make_node("GreaterOrEqual", ["x0", "half"], ["high"]),
            helper.make_node("LessOrEqual", ["x0", "zero"], ["negative"]),
            helper.make_node("And", ["low", "negative"], ["a"]),
            helper.make_node("Or", ["a", "high"], ["b"]),
            helper.make_node("Xor", ["b", "low"], ["c"]),
            helper.make_node("Cast", ["c"], ["out"], to=TensorProto.FLOAT),
        ],
        {"zero": np.float32(0), "half": np.float32(0.5)},
    ),
    "ArgMax, ArgMin, Equal": (
        [
            helper.make_node("ArgMax", ["x0"], ["most"], axis=1),
            helper.make_node("ArgMin", ["x0"], ["least"], axis=1),
            helper.make_node("Equal", ["most", "least"], ["same"]),
            helper.make_node("CastLike", ["same", "x0"], ["out"]),
        ],
        {},
    ),
    "TopK": (
        [helper.make_node("TopK", ["x0", "k"], ["out", "where"], axis=1)],
        {"k": whole(3)},
    ),
    "Log, Sqrt, Reciprocal, Acos, Asin, Acosh, Atanh": (
        [
            helper.make_node("Sigmoid", ["x0"], ["s"]),
            helper.make_node("Log", ["s"], ["a"]),
            helper.make_node("Sqrt", ["s"], ["b"]),
            helper.make_node("Reciprocal", ["s"], ["c"]),
            helper.make_node("Acos", ["s"], ["d"]),
            helper.make_node("Asin", ["s"], ["e"]),
            helper.make_node("Acosh", ["c"], ["f"]),
            helper.make_node("Atanh", ["s"], ["g"]),
            helper.make_node("Sum", ["a", "b", "c", "d", "e", "f", "g"], ["out"]),
        ],
        {},
    ),
    "Shape, a condition that is known": (
        [
            helper.make_node("Shape", ["x0"], ["shape"]),
            helper.make_node("Gather", ["shape", "one"], ["channels"], axis=0),
            helper.make_node("Equal", ["channels", "eight"], ["is_eight"]),
            helper.make_node(
                "If", ["is_eight"], ["out"],
                then_branch=helper.make_graph(
                    [helper.make_node("Relu", ["x0"], ["y"])], "then", [],
                    [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                ),
                else_branch=helper.make_graph(
                    [helper.make_node("Neg", ["x0"], ["z"])], "else", [],
                    [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
                ),
            ),
        ],
        {"one": np.int64(1), "eight": np.int64(8)},
    ),
    "an index of several axes": (
        [
            helper.make_node("Transpose", ["x0"], ["t"], perm=[2, 3, 0, 1]),
            helper.make_node("GatherND", ["t", "where"], ["g"]),
            helper.make_node("Transpose", ["g"], ["out"], perm=[1, 2, 0]),
        ],
        {"where": whole(0, 1, 2, 3, 5, 5).reshape(3, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *CHAINS])
def test_an_operator_computes_what_onnx_runtime_does(name: str, tmp_path: Path) -> None:
    shape: Sequence[int] = IMAGE
    if name in CHAINS:
        nodes, weights = CHAINS[name]
        path = write(tmp_path / "op.onnx", nodes, [shape], weights)
    else:
        kind, attributes, others, shape, opset = CASES[name]
        names = ["x0" if isinstance(o, str) else "" if o is None else f"w{i}" for i, o in enumerate(others)]
        weights = {n: o for n, o in zip(names, others, strict=True) if n.startswith("w")}
        domain, _, kind = kind.rpartition(".")
        node = helper.make_node(kind, ["x0", *names], ["out"], domain=domain, **attributes)
        path = write(tmp_path / "op.onnx", [node], [shape], weights, opset=opset)
    try:
        images = [torch.from_numpy(noise(*shape)) for _ in range(2)]
        expected = [run_file(path, image)[0] for image in images]
    except Exception as error:
        pytest.skip(f"this ONNX Runtime has no {name}: {str(error)[:80]}")
    module = import_model(path)
    for image, out in zip(images, expected, strict=True):
        torch.testing.assert_close(leaves(module, image)[0], out, rtol=1e-4, atol=1e-5)
    if shape != STEPS and name != "ScatterND, points":  # the first axis is no batch
        both = leaves(module, torch.cat(images))[0]
        torch.testing.assert_close(both, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_every_operator_is_in_a_case() -> None:
    kinds = {kind for kind, *_ in CASES.values()} | {node.op_type for nodes, _ in CHAINS.values() for node in nodes}
    assert {f"{domain}.{name}".lstrip(".") for domain, name in OPERATORS} <= kinds


@pytest.mark.parametrize(
    ("shape", "axis", "outer", "target", "free"),
    [
        ([1, 8, 6, 6], 0, 1, [1, 288], [-1, 288]),
        ([1, 56, 8, 4], 0, 1, [1, 7, 8, 2, 4, 4], [-1, 7, 8, 2, 4, 4]),
        ([1, 8, 8, 7, 7, 2], 0, 1, [64, 49, 2], [-1, 49, 2]),
        ([3, 1, 4, 9, 2], 1, 1, [3, 4, 9, 2], [3, -1, 9, 2]),
        ([9, 1, 96], 1, 1, [9, 3, 32], [9, -1, 32]),
        ([17, 4, 16], 1, 1, [17, 64], [-1, 64]),  # heads of a batch-second attention, put together
        ([17, 64], 0, 17, [17, 1, 64], [17, -1, 64]),  # and taken apart again
        ([4, 5, 1], 2, 1, [20, 1], [20, -1]),
        ([1, 4], 0, 1, [4], [-1]),
    ],
)
def test_where_the_batch_stands_in_a_reshape(
    shape: list[int], axis: int, outer: int, target: list[int], free: list[int]
) -> None:
    one, other = torch.from_numpy(noise(*shape)), torch.from_numpy(noise(*shape))
    split = (outer, shape[axis] // outer)
    two = torch.stack([x.unflatten(axis, split) for x in (one, other)], axis + 1).flatten(axis, axis + 2)
    assert across_batches(one, two, target) == free
    assert across_batches(one, one, target) == across_batches(one, None, target) == target


def test_examples_that_are_mixed_fix_the_batch() -> None:
    one = torch.from_numpy(noise(4, 3))
    with pytest.raises(FixedBatch, match="mixed"):
        across_batches(one, torch.from_numpy(noise(8, 3)), [12])
    with pytest.raises(FixedBatch, match="several axes"):
        across_batches(one, torch.from_numpy(noise(8, 6)), [12])


# --- whole nets ----------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(weights=None, **options)


def _vit() -> nn.Module:
    return torchvision_models().VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)


def _swin() -> nn.Module:
    return torchvision_models().SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4])


# name -> (builder, input size, groups that must be prunable at least)
ZOO: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (ResNet20, 32, 12),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64, 27),
    "shufflenet": (_torchvision("shufflenet_v2_x0_5"), 64, 33),
    "vit": (_vit, 32, 4),
    "swin": (_swin, 32, 8),
    "convnext": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1)), 32, 4),
}
EXPORTERS = ["dynamo", "torchscript"]
LONG = {("mobilenet_v3_small", "dynamo"), ("shufflenet", "dynamo"), ("swin", "dynamo")}


def export_net(module: nn.Module, images: Tensor, path: Path, exporter: str, **names: Any) -> Path:
    if exporter == "dynamo":
        torch.onnx.export(module, (images,), path, dynamo=True, external_data=False, verbose=False, **names)
    else:
        torch.onnx.export(module, (images,), str(path), dynamo=False, opset_version=17, **names)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        pytest.param(name, exporter, marks=[pytest.mark.long] if (name, exporter) in LONG else [])
        for name in ZOO
        for exporter in EXPORTERS
    ],
)
def test_a_net_comes_in_is_compacted_exactly_and_goes_out(name: str, exporter: str, tmp_path: Path) -> None:
    build, size, prunable = ZOO[name]
    torch.manual_seed(0)
    dense = randomise(build())
    images = torch.randn(3, 3, size, size)
    names = {"input_names": ["pixels.1"], "output_names": ["class scores"]}
    module = import_model(export_net(dense, images[:1], tmp_path / "net.onnx", exporter, **names))
    assert relative_error(leaves(module, images)[0], leaves(dense, images)[0]) < LIMIT
    graph = trace_graph(module, (images[:1],))
    assert len(graph.prunable) >= prunable
    keep = random_keep(graph, np.random.default_rng(1))
    compact = compact_model(module, (images[:1],), graph, keep)
    masked = leaves(mask_model(module, graph, keep), images)[0]
    assert relative_error(leaves(compact, images)[0], masked) < LIMIT
    artifact = export_model(compact, (images[:1],), tmp_path / "small.onnx", graph=graph)
    assert [info.name for info in artifact.inputs] == ["pixels.1"]
    assert [info.name for info in artifact.outputs] == ["class scores"]
    assert relative_error(run_file(tmp_path / "small.onnx", images[:1])[0], masked[:1]) < LIMIT


@pytest.mark.parametrize(
    "name", ["transposed", "skip_and_cut", "response_norm", "one_head", "einsum_heads", "outlook", "shared"]
)
def test_small_nets_come_in(name: str, tmp_path: Path) -> None:
    dense = randomise(NETS[name]())
    images = torch.randn(2, 3, 8, 8)
    module = import_model(export_net(dense, images[:1], tmp_path / "net.onnx", "dynamo"))
    assert relative_error(leaves(module, images)[0], leaves(dense, images)[0]) < LIMIT
    graph = trace_graph(module, (images[:1],))
    keep = random_keep(graph, np.random.default_rng(1))
    compact = compact_model(module, (images[:1],), graph, keep)
    assert relative_error(leaves(compact, images)[0], leaves(mask_model(module, graph, keep), images)[0]) < LIMIT


def test_layers_are_named_after_weights_or_the_modules_they_were(tmp_path: Path) -> None:
    dense, images = randomise(ResNet20()), torch.randn(1, 3, 32, 32)
    for exporter in EXPORTERS:  # the older one renames weights that it folds batch norms into
        module = import_model(export_net(dense, images, tmp_path / f"{exporter}.onnx", exporter))
        assert isinstance(module.get_submodule("layer2.0.conv1"), nn.Conv2d)
        assert isinstance(module.get_submodule("linear"), nn.Linear)
        module.train()
        leaves(module, images)
        assert all(p.requires_grad for p in module.parameters())


def test_names_that_a_module_has_itself_or_that_meet_each_other_are_changed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x0", "train.weight"], ["a"]),
        helper.make_node("Mul", ["a", "train.weight.scale"], ["b"]),
        helper.make_node("Conv", ["b", "0"], ["c"], name="0"),
        helper.make_node("Conv", ["c", "0", "bias"], ["out"]),
    ]
    weights = {"train.weight": noise(8, 8, 1, 1), "train.weight.scale": noise(8, 1, 1), "0": noise(8, 8, 1, 1)}
    path = write(tmp_path / "net.onnx", nodes, [IMAGE], weights | {"bias": noise(8)})
    images = torch.randn(*IMAGE)
    module = import_model(path)
    assert relative_error(leaves(module, images)[0], run_file(path, images)[0]) < LIMIT
    assert "train_.weight" in module.state_dict()


def test_a_free_batch_stays_free_and_other_free_sizes_are_asked_for(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x0", "w"], ["out"], kernel_shape=[3, 3])
    path = write(tmp_path / "net.onnx", [node], [["batch", 3, "height", "width"]], {"w": noise(4, 3, 3, 3)})
    with pytest.raises(ModelError, match=r"'x0' of shape \[batch, 3, height, width\] has free sizes.*--input"):
        import_model(path)
    module = import_model(path, [(1, 3, 8, 10)])
    assert leaves(module, torch.randn(5, 3, 8, 10))[0].shape == (5, 4, 6, 8)
    with pytest.raises(ModelError, match="cannot be 1x4x8x8"):
        import_model(path, [(1, 4, 8, 8)])
    with pytest.raises(ModelError, match=r"takes 1 inputs .x0., not 2"):
        import_model(path, [(1, 3, 8, 8), (1, 3, 8, 8)])


def test_what_mixes_examples_keeps_its_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [
        helper.make_node("Flatten", ["x0"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["flat", "turned"], ["out"]),
    ]
    module = import_model(write(tmp_path / "net.onnx", nodes, [[2, 3, 4, 4]]))
    assert "takes 2 examples at a time" in caplog.text
    assert leaves(module, torch.randn(2, 3, 4, 4))[0].shape == (2, 2)


# --- names, several inputs and outputs -----------------------------------------------------------


def two_towers(path: Path) -> Path:
    """Inputs x0 and x1 of unlike shapes, outputs `sum` and `x_relu`."""
    weights = {"a.weight": noise(8, 3, 3, 3), "b.weight": noise(8, 4, 1, 1), "head.weight": noise(5, 8)}
    nodes = [
        helper.make_node("Conv", ["x0", "a.weight"], ["left"], kernel_shape=[3, 3]),
        helper.make_node("Conv", ["x1", "b.weight"], ["right"], kernel_shape=[1, 1]),
        helper.make_node("Add", ["left", "right"], ["both"]),
        helper.make_node("Relu", ["both"], ["kept"]),
        helper.make_node("GlobalAveragePool", ["kept"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight"], ["relu"], transB=1),
        helper.make_node("Neg", ["relu"], ["conv2d"]),
    ]
    return write(path, nodes, [["n", 3, 8, 8], ["n", 4, 6, 6]], weights, outputs=("relu", "conv2d"))


def test_names_survive_compaction_disk_and_export(tmp_path: Path) -> None:
    # The outputs bear names that the exporter would give to other values.
    path = two_towers(tmp_path / "two.onnx")
    spec = ModelSpec(file=path.name)
    module = load_model(spec, tmp_path)
    inputs = example_inputs(spec, module)
    assert [tuple(tensor.shape) for tensor in inputs] == [(1, 3, 8, 8), (1, 4, 6, 6)]
    graph = trace_graph(module, inputs)
    keep = {group.name: np.arange(3) for group in graph.prunable}
    assert keep, "nothing to prune"
    save_compact(compact_model(module, inputs, graph, keep), inputs, tmp_path)
    back = ModelSpec(file="compact.pt2")
    small = load_model(back, tmp_path)
    assert get_ports(small).inputs == ("x0", "x1")
    artifact = export_model(small, example_inputs(back, small), tmp_path / "small.onnx")
    assert [info.name for info in artifact.inputs] == ["x0", "x1"]
    assert [info.name for info in artifact.outputs] == ["relu", "conv2d"]
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    first, second = run_file(tmp_path / "small.onnx", *inputs)
    torch.testing.assert_close(first, -second)
    assert relative_error(first, leaves(mask_model(module, graph, keep), *inputs)[0]) < LIMIT


def test_calibration_arrays_are_matched_to_inputs_by_name(tmp_path: Path) -> None:
    arrays = {"x1": noise(90, 4, 6, 6), "x0": noise(90, 3, 8, 8)}
    np.savez(tmp_path / "data.npz", **arrays)
    data = load_data("data.npz", tmp_path, ("x0", "x1"))
    given, targets = next(iter(data.require("calibration")))
    assert [tuple(tensor.shape) for tensor in given] == [(64, 3, 8, 8), (64, 4, 6, 6)]
    assert targets.is_floating_point() and not data.labelled
    everything = [inputs for split in (data.calibration, data.test) for inputs, _ in split or ()]
    assert sum(len(left) for left, _ in everything) == 90
    pairs = {
        float(left[0, 0, 0]): float(right[0, 0, 0]) for left, right in zip(arrays["x0"], arrays["x1"], strict=True)
    }
    both = [pair for left, right in everything for pair in zip(left, right, strict=True)]
    assert all(pairs[float(a[0, 0, 0])] == float(b[0, 0, 0]) for a, b in both)
    np.savez(tmp_path / "bad.npz", a=noise(3, 4), b=noise(4, 4))
    with pytest.raises(DataError, match="as many examples"):
        load_data("bad.npz", tmp_path)


# --- files that cannot be taken ------------------------------------------------------------------


def _quantised(folder: Path) -> Path:
    weights = {"scale": np.float32(0.1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x0", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["out"]),
    ]
    return write(folder / "net.onnx", nodes, [IMAGE], weights)


def _unknown(folder: Path) -> Path:
    return write(folder / "net.onnx", [helper.make_node("Det", ["x0"], ["out"], name="the_node")], [IMAGE])


def _computed_condition(folder: Path) -> Path:
    def branch(name: str, kind: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["x0"], [name])], name, [], [out])

    nodes = [
        helper.make_node("ReduceMax", ["x0"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["positive"]),
        helper.make_node(
            "If", ["positive"], ["out"], name="fork", then_branch=branch("y", "Relu"), else_branch=branch("z", "Neg")
        ),
    ]
    return write(folder / "net.onnx", nodes, [IMAGE], {"zero": np.float32(0)})


def _truncated(folder: Path) -> Path:
    path = write(
        folder / "net.onnx", [helper.make_node("Conv", ["x0", "w"], ["out"])], [IMAGE], {"w": noise(4, 8, 3, 3)}
    )
    path.write_bytes(path.read_bytes()[:200])
    return path


def _without_its_data(folder: Path) -> Path:
    path = write(
        folder / "net.onnx", [helper.make_node("Conv", ["x0", "w"], ["out"])], [IMAGE], {"w": noise(4, 8, 3, 3)}
    )
    model = onnx.load(str(path))
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    return path


def _data_elsewhere(folder: Path) -> Path:
    path = _without_its_data(folder)
    model = onnx.load_model(str(path), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../../etc/passwd"
    path.write_bytes(model.SerializeToString())
    return path


def _half_precision(folder: Path) -> Path:
    path = _unknown(folder)
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save_model(model, str(path))
    return path


def _unknown_contrib(folder: Path) -> Path:
    node = helper.make_node("Inverse", ["x0"], ["out"], domain="com.microsoft", name="other")
    return write(folder / "net.onnx", [node], [(1, 4, 4)])


def _loop(folder: Path) -> Path:
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "v"], ["w"])], "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("v", TensorProto.FLOAT, None)],
        [scalar("on", TensorProto.BOOL, []), scalar("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceMax", ["x0"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["times"], to=TensorProto.INT64),
        helper.make_node("Loop", ["times", "", "x0"], ["out"], name="again", body=body),
    ]
    return write(folder / "net.onnx", nodes, [IMAGE])


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "quantised": (_quantised, "is quantised .it holds QuantizeLinear.; give the float32 model"),
    "an unknown operator": (_unknown, "operator Det of node 'the_node' is not supported"),
    "a computed condition": (
        _computed_condition,
        "If of node 'fork' is not supported: which branch runs is computed",
    ),
    "truncated": (_truncated, "is truncated or not an ONNX file"),
    "data missing": (_without_its_data, "the values of 'w' are in weights.bin, which is not a file beside it"),
    "data elsewhere": (_data_elsewhere, "which is not a file beside it"),
    "half precision": (_half_precision, "'x0' is float16, and models are taken in float32: give that one"),
    "a loop": (_loop, "operator Loop of node 'again' is not supported: how often it runs is computed"),
    "an unknown operator of ONNX Runtime's": (
        _unknown_contrib,
        "com.microsoft.Inverse of node 'other' is not",
    ),
    "absent": (lambda folder: folder / "net.onnx", "no model at"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_taken_says_why(name: str, tmp_path: Path) -> None:
    build, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        load_model(ModelSpec(file=build(tmp_path).name), tmp_path)
    assert caught.value.exit_code == 4


def test_external_data_beside_the_file_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "net.onnx", [helper.make_node("Conv", ["x0", "w"], ["out"])], [IMAGE], {"w": noise(4, 8, 3, 3)}
    )
    images = torch.randn(*IMAGE)
    expected = run_file(path, images)[0]
    model = onnx.load(str(path))
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    torch.testing.assert_close(leaves(import_model(path), images)[0], expected)


def test_a_very_old_file_is_converted_first(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x0"], ["r"]), helper.make_node("Softmax", ["r"], ["out"], axis=1)]
    path = write(tmp_path / "net.onnx", nodes, [(1, 8)], opset=6)
    images = torch.randn(1, 8)
    torch.testing.assert_close(leaves(import_model(path), images)[0], run_file(path, images)[0])


# --- inputs that are no floats -------------------------------------------------------------------


class Words(nn.Module):
    """Tokens that are looked up, and bytes of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(50, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.conv = nn.Conv2d(3, 10, 3, stride=2)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        seen = self.conv(image.float() / 255 - 0.5).relu().mean((2, 3))
        return self.head((self.hidden(self.table(tokens)).relu().mean(1) * seen).relu())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_whole_numbers_go_in_and_out(exporter: str, tmp_path: Path) -> None:
    dense, path = randomise(Words()), tmp_path / "net.onnx"
    inputs = torch.randint(50, (1, 6)), torch.randint(256, (1, 3, 9, 9)).to(torch.uint8)
    if exporter == "dynamo":
        torch.onnx.export(dense, inputs, path, dynamo=True, external_data=False, verbose=False)
    else:
        torch.onnx.export(dense, inputs, str(path), dynamo=False, opset_version=17)
    module = load_model(ModelSpec(file="net.onnx"), tmp_path)
    again = example_inputs(ModelSpec(file="net.onnx"), module)
    assert [tensor.dtype for tensor in again] == [torch.int64, torch.uint8]
    both = tuple(torch.cat([a, b]) for a, b in zip(inputs, again, strict=True))
    assert relative_error(leaves(module, *both)[0], leaves(dense, *both)[0]) < LIMIT
    graph = trace_graph(module, again)
    keep = random_keep(graph, np.random.default_rng(0))
    assert len(graph.prunable) >= 2
    compact = compact_model(module, again, graph, keep)
    masked = leaves(mask_model(module, graph, keep), *both)[0]
    assert relative_error(leaves(compact, *both)[0], masked) < LIMIT
    export_model(compact, again, tmp_path / "small.onnx", graph=graph)
    assert relative_error(run_file(tmp_path / "small.onnx", *inputs)[0], masked[:1]) < LIMIT
    save_compact(compact, again, tmp_path)
    kept = load_model(ModelSpec(file="compact.pt2"), tmp_path)
    assert [tensor.dtype for tensor in example_inputs(ModelSpec(file="compact.pt2"), kept)] == [
        torch.int64,
        torch.uint8,
    ]


class Sequence2(nn.Module):
    """A recurrent layer between convolutions, as in readers of text lines."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = kind(8, 7, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.stem(x).relu().mean(2).transpose(1, 2)
        return self.head(self.layer(steps)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_recurrent_net_is_pruned_from_its_file(kind: type[nn.RNNBase], exporter: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, images = randomise(Sequence2(kind)), torch.randn(2, 3, 8, 8)
    module = import_model(export_net(dense, images[:1], tmp_path / "net.onnx", exporter))
    assert relative_error(leaves(module, images)[0], leaves(dense, images)[0]) < LIMIT
    graph = trace_graph(module, (images[:1],))
    assert sum(group.units in (7, 8) for group in graph.prunable) >= 2, "inputs and hidden units"
    keep = random_keep(graph, np.random.default_rng(1))
    compact = compact_model(module, (images[:1],), graph, keep)
    assert relative_error(leaves(compact, images)[0], leaves(mask_model(module, graph, keep), images)[0]) < LIMIT


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_takes_a_file_from_trace_to_a_smaller_file(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    torch.manual_seed(0)
    names = {"input_names": ["pixels"], "output_names": ["scores"]}
    export_net(randomise(net), torch.randn(1, 3, 12, 12), tmp_path / "net.onnx", "dynamo", **names)
    np.savez(tmp_path / "images.npz", pixels=noise(40, 3, 12, 12))
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "here.toml").write_text('board = "linux"\ntransport = "local"\n')

    def command(*arguments: str, code: int = 0) -> str:
        done = edgeprune(*arguments, cwd=tmp_path, home=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "2 groups can be pruned" in command("trace", "net.onnx")
    score = ("score", "net.onnx", "--data", "images.npz", "--no-curves", "--criterion")
    assert "without labels" in command(*score, "taylor", "-o", "i.json", code=4).lower()
    assert "2 groups scored" in command(*score, "reconstruction", "-o", "i.json")
    command(
        "profile", "net.onnx", "--target", "here", "-o", "p.jsonl", "--effort", "quick", "--configurations", "4",
        "--held-out", "1",
    )  # fmt: skip
    command("plan", "net.onnx", "--profile", "p.jsonl", "--importance", "i.json", "--size", "0.5x", "-o", "plan.json")
    command("compact", "net.onnx", "--plan", "plan.json", "--data", "images.npz", "-o", "small")
    command("export", "small/compact.pt2", "-o", "small.onnx")
    small, dense = inspect(tmp_path / "small.onnx"), inspect(tmp_path / "net.onnx")
    assert [info.name for info in (*small.inputs, *small.outputs)] == ["pixels", "scores"]
    assert small.bytes < dense.bytes
    assert "quantised" in command("trace", str(_quantised(tmp_path)), code=4)
