"""Files in an older opset compute what they did, or stay in the newer one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from edgeprune.core.errors import ModelError
from edgeprune.formats import onnx as format
from edgeprune.formats._onnx_opset import TooNew, lower_opset

X = np.random.default_rng(0).standard_normal((2, 6, 7, 8)).astype(np.float32)
GRID = np.random.default_rng(1).uniform(-1, 1, (2, 5, 4, 2)).astype(np.float32)


def model_of(
    kind: str, *constants: Any, outputs: int = 1, kinds: int = TensorProto.FLOAT, x: np.ndarray = X, **attributes: Any
) -> ModelProto:
    """One operator of opset 20 on x; None leaves an input out."""
    names = ["" if value is None else f"c{position}" for position, value in enumerate(constants)]
    results = [f"y{index}" for index in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", *names], results, name="node", **attributes)], "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info(name, kinds, None) for name in results],
        [numpy_helper.from_array(np.asarray(value), name)
         for name, value in zip(names, constants, strict=True) if value is not None],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def run(model: ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


SAME = {
    "axes": model_of("ReduceMean", ints(2, 3), keepdims=0),
    "axes, said twice": model_of("ReduceSumSquare", ints(-1), noop_with_empty_axes=1),
    "no axes are all": model_of("ReduceMax", keepdims=1),
    "empty axes are all": model_of("ReduceL2", ints(), noop_with_empty_axes=0),
    "parts": model_of("Split", axis=1, num_outputs=3, outputs=3),
    "parts of given sizes": model_of("Split", ints(1, 5), axis=1, outputs=2),
    "pads": model_of("Pad", ints(0, 0, 1, 2, 0, 0, 3, 4), np.float32(0.5), mode="constant"),
    "size": model_of("Resize", None, np.float32([1, 1, 2, 2]), mode="linear", antialias=0,
                     coordinate_transformation_mode="half_pixel"),
    "average": model_of("AveragePool", kernel_shape=[2, 2], dilations=[1, 1], strides=[2, 2]),
    "samples": model_of("GridSample", GRID, mode="linear", padding_mode="zeros"),
    "scattered": model_of("ScatterElements", np.zeros((1, 1, 1, 1), np.int64), np.full((1, 1, 1, 1), 2, np.float32),
                          axis=1, reduction="add"),
    "other kind": model_of("Cast", to=TensorProto.FLOAT, saturate=1),
    "shape": model_of("Reshape", ints(2, -1)),
}  # fmt: skip
NEW = {
    "an operator": (model_of("Gelu"), "Gelu"),
    "axes of pads": (model_of("Pad", ints(1, 1), None, ints(2)), "Pad .* with axes"),
    "a mode": (model_of("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="wrap"), "mode = wrap"),
    "dilations": (model_of("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), "dilations"),
    "the last window": (model_of("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), "ceil_mode = 1"),
    "antialiasing": (model_of("Resize", None, np.float32([1, 1, 2, 2]), mode="linear", antialias=1), "antialias"),
    "uneven parts": (model_of("Split", axis=2, num_outputs=2, outputs=2), "num_outputs"),
    "no axes are none": (model_of("ReduceMean", noop_with_empty_axes=1), "noop_with_empty_axes"),
    "a reduction": (model_of("ScatterElements", np.zeros((1, 1, 1, 1), np.int64), np.ones((1, 1, 1, 1), np.float32),
                             reduction="max"), "reduction = max"),
    "truth values": (model_of("ReduceMax", ints(1), kinds=TensorProto.BOOL, x=X > 0), "truth values"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_an_older_opset_computes_the_same(name: str) -> None:
    newer, older = SAME[name], ModelProto()
    older.CopyFrom(newer)
    lower_opset(older)
    assert older.opset_import[0].version == 17 and older.ir_version == 8
    onnx.checker.check_model(older, full_check=True)
    for got, wanted in zip(run(older, X), run(newer, X), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)  # kernels may sum in another order


@pytest.mark.parametrize("name", NEW)
def test_what_it_has_not_is_named_and_nothing_changes(name: str) -> None:
    model, message = NEW[name]
    before = model.SerializeToString()
    with pytest.raises(TooNew, match=message):
        lower_opset(model)
    assert model.SerializeToString() == before


def test_axes_that_are_computed_stay_an_input() -> None:
    model = model_of("ReduceMean", ints(2, 3))
    model.graph.input.append(helper.make_tensor_value_info("c0", TensorProto.INT64, [2]))
    del model.graph.initializer[:]
    with pytest.raises(TooNew, match="axes"):
        lower_opset(model)


class Pooled(nn.Module):
    """Two means, one of which an older opset words otherwise, and an activation that may be new."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = nn.Conv2d(6, 4, 3), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.conv(x)).mean((2, 3)) + x.amax((1, 2, 3))[:, None]


class Shrunk(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)


@pytest.mark.parametrize(("activation", "opset"), [(nn.Hardswish(), 17), (nn.GELU(), 20)])
def test_a_model_is_written_in_the_oldest_opset_that_has_it(activation: nn.Module, opset: int) -> None:
    module, inputs = Pooled(activation).eval(), (torch.from_numpy(X),)
    with torch.no_grad():
        wanted = module(*inputs).numpy()
    for asked, written in ((None, opset), (17, 17)):  # asked for, a new operator is spelt out
        model = format.to_proto(module, inputs, opset=asked)
        assert model.opset_import[0].version == written
        np.testing.assert_allclose(run(model, X)[0], wanted, rtol=1e-4, atol=1e-5)


def test_an_opset_that_cannot_be_had_is_refused() -> None:
    inputs = (torch.from_numpy(X),)
    assert format.to_proto(Shrunk(), inputs).opset_import[0].version == 20
    with pytest.raises(ModelError, match=r"opset 17 has no Resize .* with antialias; ask for opset 18"):
        format.to_proto(Shrunk(), inputs, opset=17)
