"""What is told of a model file, against what was put in it; and metadata inside files."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from evidence import make_evidence
from onnx import TensorProto, helper, numpy_helper
from tflite_files import write_classifier
from torch import nn

from edgeprune.bundle import write_bundle
from edgeprune.core.describe import describe_inspection
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Inspection, Plan
from edgeprune.core.store import sha256_file, write_record
from edgeprune.export import export_model
from edgeprune.formats import _onnx_metadata, _tflite_metadata, _tflite_model, tflite
from edgeprune.formats import onnx as onnx_format
from edgeprune.inspect import inspect_file, read_any_record

LABELS = ["zero", "ünf"]
NORMALISATION = {"scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.4]}


class Net(nn.Module):
    """A convolution with stride, a depthwise, a transposed one, a linear layer and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.depthwise(self.first(x))))
        return self.linear(x.flatten(2).transpose(1, 2)) @ torch.ones(5, 2)


MACS = {
    "Conv": 8 * 4 * 4 * 3 * 9 + 8 * 4 * 4 * 9,
    "ConvTranspose": 8 * 4 * 4 * 4 * 4,
    "MatMul": 64 * 4 * 5 + 64 * 5 * 2,
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_model(Net(), (torch.randn(1, 3, 8, 8),), path)
    return path


def macs_by_kind(found: Inspection) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for operation in found.operations:
        assert operation.macs is not None
        kinds[operation.op] = kinds.get(operation.op, 0) + operation.macs
    return {kind: macs for kind, macs in kinds.items() if macs}


def test_onnx_macs_shapes_and_weights(net: Path) -> None:
    found = inspect_file(net)
    counted = macs_by_kind(found)
    if "Gemm" in counted:  # the exporter may write the linear layer either way
        counted["MatMul"] += counted.pop("Gemm")
    assert counted == MACS
    assert found.macs == sum(MACS.values())
    assert (found.sha256, found.bytes) == (sha256_file(net), net.stat().st_size)
    assert found.inputs[0].shape == (1, 3, 8, 8)
    first = next(operation for operation in found.operations if operation.op == "Conv")
    assert (first.shape, first.dtype, first.weight_bytes) == ((1, 8, 4, 4), "float32", 4 * (3 * 8 * 9 + 8))
    assert found.weights["float32"][0] >= sum(p.numel() for p in Net().parameters())
    assert found.measured == {}


def test_int8_onnx_counts_as_the_float_one(tmp_path: Path) -> None:
    """QLinearConv, ConvInteger and MatMulInteger, by hand; the free batch axis counts once."""

    def array(name: str, values: Any, dtype: str) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, dtype), name)

    constants = [
        array("w", np.ones((4, 3, 3, 3)), "int8"),
        array("m", np.ones((4, 6)), "int8"),
        array("s", 0.1, "float32"),
        array("z", 0, "int8"),
        array("u", 0, "uint8"),
    ]
    nodes = [
        helper.make_node("QLinearConv", ["x", "s", "u", "w", "s", "z", "s", "u"], ["y"]),
        helper.make_node("ConvInteger", ["x", "w"], ["c"]),
        helper.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMulInteger", ["t", "m"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info(n, TensorProto.INT32, None) for n in ("out", "c")], constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "q.onnx")
    found = inspect_file(tmp_path / "q.onnx")
    assert macs_by_kind(found) == {"QLinearConv": 432, "ConvInteger": 432, "MatMulInteger": 96}
    assert found.inputs[0].shape == (-1, 3, 4, 4)
    assert found.weights["int8"] == (108 + 24 + 1, 133)


def test_macs_that_shapes_do_not_tell_are_not_zero(tmp_path: Path) -> None:
    export_model(nn.Sequential(nn.Flatten(2), Recurrent()), (torch.randn(1, 4, 6),), tmp_path / "lstm.onnx")
    found = inspect_file(tmp_path / "lstm.onnx")
    assert found.macs is None
    assert "?" in describe_inspection(found)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tflite_macs_shapes_and_weights(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.tflite"
    write_classifier(path, dtype)
    found = inspect_file(path)
    assert macs_by_kind(found) == {"CONV_2D": 4 * 4 * 6 * 27, "FULLY_CONNECTED": 30}
    assert [operation.op for operation in found.operations] == ["CONV_2D", "MEAN", "FULLY_CONNECTED"]
    assert found.operations[0].shape == (1, 4, 4, 6)
    assert found.operations[0].dtype == dtype
    size = 4 if dtype == "float32" else 1
    assert found.operations[0].weight_bytes == 162 * size + 24
    assert found.inputs[0].scale == (None if dtype == "float32" else pytest.approx(0.04))


def test_a_damaged_or_foreign_file(net: Path, tmp_path: Path) -> None:
    write_classifier(tmp_path / "whole.tflite")
    for source in (net, tmp_path / "whole.tflite"):
        for size in (0, 3, 100):
            path = tmp_path / f"cut{source.suffix}"
            path.write_bytes(source.read_bytes()[:size])
            with pytest.raises(RecordError, match="cut"):
                inspect_file(path)
    with pytest.raises(RecordError, match="no file"):
        inspect_file(tmp_path / "absent.onnx")
    with pytest.raises(UsageError, match="cannot inspect"):
        inspect_file(tmp_path / "model.pt2")
    (tmp_path / "b.zip").write_bytes(b"PK")
    with pytest.raises(RecordError, match="truncated"):
        inspect_file(tmp_path / "b.zip")


def test_measured_numbers_of_a_report_beside_it_and_of_a_bundle(net: Path, tmp_path: Path) -> None:
    evidence = make_evidence()
    path = Path(shutil.copy(net, tmp_path / "model.onnx"))
    artifact = onnx_format.inspect(path)
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    write_record(tmp_path / "report.json", evidence.report)  # of another artifact
    assert inspect_file(path).measured == {}
    write_record(tmp_path / "report.json", report)
    beside = inspect_file(path)
    assert beside.measured["target"] == "raspberry-pi-4"
    assert report.compact.latency_s is not None
    assert beside.measured["compact"]["latency_s"]["median"] == report.compact.latency_s.median
    write_bundle(path, artifact, None, report, tmp_path / "bundle.zip")
    bundled = inspect_file(tmp_path / "bundle.zip")
    assert bundled.operations == beside.operations
    assert bundled.sha256 == artifact.sha256
    text = describe_inspection(bundled)
    assert "measured on raspberry-pi-4" in text
    assert "96.90%" in text


def test_any_record_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "plan.json", make_evidence().plan)
    assert isinstance(read_any_record(tmp_path / "plan.json"), Plan)
    for content in ("{}", "[]", "no", json.dumps({"schema": "edgeprune.Nothing/1"}), json.dumps({"schema": "x.Any/1"})):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(RecordError):
            read_any_record(tmp_path / "other.json")


# --- metadata inside the file ----------------------------------------------------------------------


def outputs(path: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        return session.run(None, {first.name: rng.standard_normal(first.shape).astype(np.float32)})[0]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    info = interpreter.get_input_details()[0]
    interpreter.set_tensor(info["index"], (20 * rng.standard_normal(info["shape"])).astype(info["dtype"]))
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy()


@pytest.mark.parametrize("kind", ["onnx", "float32", "int8"])
def test_metadata_change_no_output(net: Path, tmp_path: Path, kind: str) -> None:
    member: ModuleType = _onnx_metadata if kind == "onnx" else _tflite_metadata
    path = tmp_path / ("model.onnx" if kind == "onnx" else "model.tflite")
    if kind == "onnx":
        shutil.copy(net, path)
    else:
        write_classifier(path, kind)
    before, described = outputs(path), inspect_file(path)
    values = {"name": "tiny", "license": "MIT", "graph_sha256": "a" * 64}
    member.embed_metadata(path, {"name": "old"})
    member.embed_metadata(path, values, labels=LABELS, normalisation=NORMALISATION)
    np.testing.assert_array_equal(outputs(path), before)
    assert inspect_file(path).operations == described.operations
    found = member.read_metadata(path)
    assert values.items() <= found.items()
    assert json.loads(found["labels"]) == LABELS
    again = tmp_path / f"again{path.suffix}"
    shutil.copy(path, again)
    member.embed_metadata(again, values, labels=LABELS, normalisation=NORMALISATION)
    assert again.read_bytes() == path.read_bytes()


def test_tflite_metadata_are_the_standard_ones(tmp_path: Path) -> None:
    """Read by the places of metadata_schema.fbs: name, first input's normalisation, labels of the output's axis."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    path = tmp_path / "model.tflite"
    write_classifier(path, "int8")
    _tflite_metadata.embed_metadata(path, {"name": "tiny"}, labels=LABELS, normalisation=NORMALISATION)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    raw = next(bytes(model.buffers[e.buffer].data) for e in model.metadata if e.name == b"TFLITE_METADATA")
    assert raw[4:8] == b"M001"

    def table(of: Any, slot: int, item: int | None = None) -> Any:
        offset = of.Offset(4 + 2 * slot)
        start = of.Indirect(of.Pos + offset) if item is None else of.Indirect(of.Vector(offset) + 4 * item)
        return flatbuffers.table.Table(raw, start)

    def text(of: Any, slot: int) -> str:
        return of.String(of.Pos + of.Offset(4 + 2 * slot)).decode()

    root = flatbuffers.table.Table(raw, int.from_bytes(raw[:4], "little"))
    graph = table(root, 3, 0)
    image, scores = table(graph, 2, 0), table(graph, 3, 0)
    assert (text(root, 0), text(image, 0), text(scores, 0)) == ("tiny", "image", "scores")
    options = table(table(image, 4, 0), 1)
    vectors = [
        np.frombuffer(raw, "<f4", options.VectorLen(place), options.Vector(place))
        for place in (options.Offset(4), options.Offset(6))
    ]
    np.testing.assert_allclose(vectors[0], np.array(NORMALISATION["mean"]) * 255, rtol=1e-6)
    np.testing.assert_allclose(vectors[1], np.array(NORMALISATION["std"]) * 255, rtol=1e-6)
    assert text(table(scores, 6, 0), 0) == "labels.txt"
    with zipfile.ZipFile(path) as archive:
        assert archive.read("labels.txt").decode().splitlines() == LABELS


def test_constants_behind_the_flatbuffer_survive(tmp_path: Path) -> None:
    """So the quantizer writes larger models: at offsets in the file, which do not hold once it is packed anew."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    inline, path = tmp_path / "inline.tflite", tmp_path / "model.tflite"
    write_classifier(inline)
    model = schema.ModelT.InitFromPackedBuf(inline.read_bytes(), 0)
    contents = {number: bytes(b.data) for number, b in enumerate(model.buffers) if b.data is not None and len(b.data)}

    def pack(at: int) -> bytes:
        for number, data in contents.items():
            buffer = model.buffers[number]
            buffer.data, buffer.offset, buffer.size = None, at, len(data)
            at += -(-len(data) // 16) * 16
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    end = -(-len(pack(1 << 20)) // 16) * 16
    path.write_bytes(
        pack(end).ljust(end, b"\0") + b"".join(d.ljust(-(-len(d) // 16) * 16, b"\0") for d in contents.values())
    )
    image = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    (wanted,) = tflite.run(inline, [image])
    np.testing.assert_array_equal(tflite.run(path, [image])[0], wanted)
    _tflite_metadata.embed_metadata(path, {"name": "tiny"}, labels=LABELS, normalisation=NORMALISATION)
    np.testing.assert_array_equal(tflite.run(path, [image])[0], wanted)
    assert not any(buffer.offset for buffer in _tflite_model.unpack(path.read_bytes()).buffers)
    path.write_bytes(pack(1 << 20))
    with pytest.raises(RecordError, match="a buffer lies outside the file"):
        tflite.inspect(path)


def test_tensors_stay_aligned(tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    path = tmp_path / "model.tflite"
    write_classifier(path)
    _tflite_metadata.embed_metadata(path, {"name": "x" * 13})
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    buffers = [model.Buffers(place)._tab for place in range(model.BuffersLength())]
    starts = [tab.Vector(tab.Offset(4)) for tab in buffers if tab.Offset(4)]
    assert len(starts) >= 5
    assert not [start for start in starts if start % 16]
