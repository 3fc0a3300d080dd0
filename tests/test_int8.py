"""Fewer bits in ONNX files: what is written, other widths of it, and whose the runtime's kernels are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exactness import random_keep, randomise
from safetensors.torch import save
from torch import nn
from zoo import torchvision_models

from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.core.records import KernelTime, Precision
from edgeprune.core.store import sha256_bytes
from edgeprune.device.runtimes.onnxruntime import Model
from edgeprune.formats import onnx as format
from edgeprune.formats import runnable_precisions
from edgeprune.formats._onnx_kernels import OnnxKernelMap
from edgeprune.formats._onnx_quantize import find_ranges, quantize, random_calibration
from edgeprune.formats._onnx_resize import ExactResizer
from edgeprune.graphs.slice import slice_model
from edgeprune.trace import trace_graph

U8, S8 = Precision(dtype="int8", activations="uint8"), Precision(dtype="int8", activations="int8")
SYMMETRIC = Precision(dtype="int8", activations="symmetric")
HALF, DYNAMIC = Precision(dtype="float16"), Precision(dtype="dynamic")
INPUTS = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
CALIBRATION = [(np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32),)]


def _resnet() -> nn.Module:
    models = torchvision_models()
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def _mobilenet_v2() -> nn.Module:
    setting = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 1, 2]]
    return torchvision_models().MobileNetV2(num_classes=10, inverted_residual_setting=setting)


def _mobilenet_v3() -> nn.Module:
    models = torchvision_models()
    one = models.mobilenetv3.InvertedResidualConfig
    setting = [one(16, 3, 32, 24, True, "HS", 1, 1, 1), one(24, 3, 64, 24, False, "HS", 1, 1, 1),
               one(24, 5, 64, 40, True, "RE", 2, 1, 1)]  # fmt: skip
    return models.MobileNetV3(setting, last_channel=128, num_classes=10)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": _resnet,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3": _mobilenet_v3,
}


def small() -> nn.Module:
    """Convolutions with a batch norm, an addition and a head."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.inner, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            return self.head(torch.relu(x + self.inner(x)).mean((2, 3)))

    torch.manual_seed(0)
    return randomise(Small())


LAYOUT_CHANGES = ("Transpose", "ReorderInput", "ReorderOutput")
"""What the runtime adds under names of its own; it is charged to the kernel beside it."""


def profile(path: Path, folder: Path, runs: int = 5) -> list[KernelTime]:
    """Kernels by the runtime's own profiler, each in its fastest run: what else the machine did is no kernel's."""
    model = Model(str(path), 1, str(folder / "profile"))
    feed = {name: np.ones(shape, kind) for name, (shape, kind) in model.inputs.items()}
    for _ in range(runs):
        model.run(feed)
    each = [kernels for _, kernels in model.end_profile()[1:]]
    return [
        KernelTime(name=same[0][0], op=same[0][1], time_s=min(seconds for *_, seconds in same))
        for same in zip(*each, strict=True)
    ]


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum()))


@pytest.mark.parametrize("precision", format.PRECISIONS, ids=lambda p: p.name)
def test_what_is_written(precision: Precision, tmp_path: Path) -> None:
    """The dtype shows in the file, its size falls, and the outputs stay close."""
    net = small()
    artifact = format.export(net, INPUTS, tmp_path / "net.onnx", precision=precision, calibration=CALIBRATION)
    dense = format.export(net, INPUTS, tmp_path / "float.onnx")
    assert artifact.dtype == precision.dtype
    kinds = {t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    stored = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
    assert stored.get(precision.dtype, onnx.TensorProto.INT8) in kinds
    assert (artifact.inputs, artifact.outputs) == (dense.inputs, dense.outputs), "the module's own terms"
    x = CALIBRATION[0][0][:1]
    (ours,), (theirs,) = format.run(tmp_path / "net.onnx", [x]), format.run(tmp_path / "float.onnx", [x])
    assert cosine(ours, theirs) > (0.999999 if precision.dtype in ("float32", "float16") else 0.99)


def test_half_weights_cost_nothing_at_run_time(tmp_path: Path) -> None:
    """The casts are folded when the file is loaded: the kernels are those of float32, the file is half."""
    net = randomise(_mobilenet_v2())
    whole = format.export(net, INPUTS, tmp_path / "float.onnx")
    for precision, share in ((HALF, 0.65), (DYNAMIC, 0.5)):
        less = format.export(
            net, INPUTS, tmp_path / f"{precision.name}.onnx", precision=precision
        )  # a fifth of this small file is structure
        assert less.bytes < share * whole.bytes
        expected = [time.op for time in profile(tmp_path / "float.onnx", tmp_path)]
        found = [time.op for time in profile(tmp_path / f"{precision.name}.onnx", tmp_path)]
        if precision is DYNAMIC:
            assert "DynamicQuantizeMatMul" in found
            found = ["Gemm" if op == "DynamicQuantizeMatMul" else op for op in found]
        assert found == expected


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "there are none"),
        ([], "there are none"),
        ([(np.ones((4, 3, 32, 32), np.float32),)], "constant"),
        ([(np.full((4, 3, 32, 32), np.nan, np.float32),)], "NaN"),
    ],
)
def test_data_that_give_no_range(calibration: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        format.export(small(), INPUTS, tmp_path / "net.onnx", precision=U8, calibration=calibration)
    assert not list(tmp_path.iterdir())


def test_ranges_are_of_all_data(tmp_path: Path) -> None:
    """The extreme of any batch counts, whatever the batch size of file and data."""
    data = np.zeros((5, 3, 32, 32), np.float32)
    data[1, 0, 0, 0], data[4, 1, 2, 3] = -3.0, 7.0
    for size in (1, 2, 4):
        inputs = (torch.randn(size, 3, 32, 32),)
        model = format.to_proto(small(), inputs)
        low, high = find_ranges(model, [(data[:3],), (data[3:],)])[model.graph.input[0].name]
        assert (low, high) == (-3.0, 7.0)


def test_nodes_that_stay_in_float32(tmp_path: Path) -> None:
    net = small()
    graph = trace_graph(net, INPUTS)
    inner = next(node.name for node in graph.nodes if "inner.weight" in node.parameters)
    mixed = Precision(dtype="int8", activations="uint8", float_nodes=(inner,))
    format.export(net, INPUTS, tmp_path / "net.onnx", precision=mixed, calibration=CALIBRATION, graph=graph)
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert kinds["inner.weight"] == onnx.TensorProto.FLOAT
    assert kinds["stem.weight_quantized"] == onnx.TensorProto.INT8
    ops = [time.op for time in profile(tmp_path / "net.onnx", tmp_path)]
    assert ops.count("QLinearConv") == 1 and ops.count("Conv") == 1
    unknown = Precision(dtype="int8", float_nodes=("conv2d_99",))
    with pytest.raises(ModelError, match="no node 'conv2d_99'"):
        format.export(net, INPUTS, tmp_path / "x.onnx", precision=unknown, calibration=CALIBRATION, graph=graph)
    with pytest.raises(ModelError, match="trace the model"):
        format.export(net, INPUTS, tmp_path / "x.onnx", precision=unknown, calibration=CALIBRATION)


def test_what_tensorrt_takes(tmp_path: Path) -> None:
    """Zeros at 0, nothing of 32 bits, each reader its own conversions, weights that are floats: its developer guide."""
    format.export(small(), INPUTS, tmp_path / "net.onnx", precision=SYMMETRIC, calibration=CALIBRATION)
    graph = onnx.load(tmp_path / "net.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    conversions = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {values[node.input[2]].dtype for node in conversions} == {np.dtype(np.int8)}
    assert not any(values[node.input[2]].any() for node in conversions)
    assert all(np.issubdtype(value.dtype, np.floating) for value in values.values() if value.size > 40)
    readers = Counter(name for node in graph.node for name in node.input)
    written = [node.output[0] for node in conversions if node.op_type == "DequantizeLinear"]
    outputs = {output.name for output in graph.output}
    assert all(readers[name] == 1 for name in written if name not in outputs)
    assert format.inspect(tmp_path / "net.onnx").dtype == "int8"


def test_what_a_runtime_can_run() -> None:
    def names(runtime: str) -> list[str]:
        return [each.name for each in runnable_precisions(format, runtime, "int8")]

    assert (names("onnxruntime"), names("tensorrt:precision=best")) == (["int8-uint8", "int8"], ["int8-symmetric"])
    assert len(runnable_precisions(format, "tensorrt", "float16")) == 1
    with pytest.raises(UsageError, match=r"\.onnx files cannot be int4; known: float32, float16, dynamic, int8"):
        runnable_precisions(format, "onnxruntime", "int4")


def test_both_halves_of_hard_swish_are_placed(tmp_path: Path) -> None:
    """ONNX Runtime runs two kernels for it that no operation of the file is named as."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 16, 3), nn.Hardswish()))
    graph = trace_graph(net, INPUTS)
    convolutions = [node.name for node in graph.nodes if node.op == "conv2d"]
    format.export(net, INPUTS, tmp_path / "net.onnx", precision=U8, calibration=CALIBRATION)
    times = profile(tmp_path / "net.onnx", tmp_path)
    mapped = OnnxKernelMap(format.to_proto(net, INPUTS), graph, times)
    nodes = {kernel.name: kernel.nodes for kernel in mapped.kernels}
    placed = zip(times, mapped.place(times), strict=True)
    halves = [nodes[owner or ""] for time, owner in placed if time.op in ("HardSigmoid", "Mul")]
    assert [each[0] for each in halves] == [name for name in convolutions for _ in range(2)]


@pytest.fixture(scope="module")
def exports() -> Iterator[None]:
    """Each net of the module is exported once for all precisions: it takes seconds."""
    export, known = format.to_proto, dict[str, onnx.ModelProto]()

    def to_proto(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
        key = sha256_bytes(save(module.state_dict()))
        if key not in known:
            known[key] = export(module, inputs)
        copy = onnx.ModelProto()
        copy.CopyFrom(known[key])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "to_proto", to_proto)
        yield


@pytest.mark.parametrize("precision", [HALF, DYNAMIC, U8, S8, SYMMETRIC], ids=lambda p: p.name)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.long
def test_other_widths_and_kernels(name: str, precision: Precision, exports: None, tmp_path: Path) -> None:
    """Other widths are what quantising a true export gives; nearly all time goes to the layer that took it."""
    net = randomise(NETS[name]())
    graph = trace_graph(net, INPUTS)
    keep = random_keep(graph, np.random.default_rng(1))
    for group in graph.prunable:
        keep[group.name] = keep[group.name][: max(len(keep[group.name]) // group.step * group.step, group.step)]
    exported = format.to_proto(slice_model(net, INPUTS, graph, keep), INPUTS)
    widths = {group: len(kept) for group, kept in keep.items()}
    resizer = format.make_resizer(net, INPUTS, graph, precision=precision)
    assert isinstance(resizer, ExactResizer)
    ranges = find_ranges(exported, random_calibration(exported)) if precision.dtype == "int8" else {}
    path = tmp_path / "exported.onnx"
    format.write_proto(quantize(exported, precision, ranges).model, path)
    expected = sorted(time.op for time in profile(path, tmp_path))
    resizer.write_weights(tmp_path / "weights.bin")
    began = time.process_time()
    resizer.write_structure(widths, tmp_path / "structure.onnx", "weights.bin")
    assert time.process_time() - began < 1
    resizer.write_model(keep, tmp_path / "whole.onnx")
    for made in ("structure", "whole"):
        assert sorted(time.op for time in profile(tmp_path / f"{made}.onnx", tmp_path)) == expected
    resizer.write_model({}, tmp_path / "dense.onnx")
    assert format.inspect(tmp_path / "dense.onnx").bytes == pytest.approx(resizer.dense_bytes, rel=0.05)
    assert format.inspect(tmp_path / "dense.onnx").dtype == precision.dtype
    (dense,) = format.run(tmp_path / "dense.onnx", [INPUTS[0].numpy()])
    with torch.no_grad():
        assert cosine(dense, net(*INPUTS).numpy()) > 0.9
    mapped = resizer.map_kernels(profile(tmp_path / "dense.onnx", tmp_path))
    layers = {node.name for node in graph.nodes if node.op in ("conv2d", "linear")}
    assert layers <= {node for kernel in mapped.kernels for node in kernel.nodes}
    for made in ("dense", "structure"):
        times = profile(tmp_path / f"{made}.onnx", tmp_path)
        charged = mapped.charge(times)
        assert sum(charged.values()) == pytest.approx(sum(time.time_s for time in times))
        named = [t.time_s for t, owner in zip(times, mapped.place(times), strict=True)
                 if owner is not None or t.op in LAYOUT_CHANGES]  # fmt: skip
        assert sum(named) >= 0.95 * sum(charged.values())
