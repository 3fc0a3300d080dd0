"""TFLite: what is written at every precision, what is refused, and files of other widths."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import random_keep, randomise
from test_formats import MODELS
from torch import nn
from zoo import torchvision_models

from edgeprune.core.errors import DataError, ModelError, RecordError, UsageError
from edgeprune.core.records import Graph, Precision
from edgeprune.graphs.slice import slice_model
from edgeprune.trace import trace_graph

if importlib.util.find_spec("litert_torch") is None:  # importing it takes 14 s
    pytest.skip("pip install 'edgeprune[tflite]'", allow_module_level=True)

from edgeprune.formats import tflite as format
from edgeprune.formats._tflite_convert import convert
from edgeprune.formats._tflite_model import operator_names, pack, unpack
from edgeprune.formats._tflite_quantize import calibrate, quantize
from edgeprune.formats._tflite_resize import ExactResizer, ExportingResizer

Inputs = tuple[torch.Tensor, ...]
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "dynamic": 0.05, "int8": 0.05}
"""Of the largest output, for nets with random weights."""


def _image(size: int = 8) -> Inputs:
    return (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def _calibration(size: int = 8) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((8, 3, size, size)).astype(np.float32),) for _ in range(2)]


class Small(nn.Module):
    """A residual block with option-A padding, a depthwise layer and an image as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 32, 3, 2, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.bn(self.stem(x)))
        x = nn.functional.hardtanh(self.deep(x), 0.0, 6.0)
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        y = torch.relu(self.wide(x) + shortcut)
        return self.head(y.mean((2, 3))), y


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Graph, bytes]:
    """The net, its graph, and its float32 file: one conversion for all the tests that alter or quantise it."""
    torch.set_num_threads(1)
    module = randomise(Small())
    (data,) = convert([module], _image())
    return module, trace_graph(module, _image()), data


def _quantised(data: bytes, precision: Precision) -> bytes:
    ranges = calibrate(data, precision, _calibration()) if precision.dtype == "int8" else None
    return quantize(data, precision, ranges)


@pytest.mark.parametrize("precision", format.PRECISIONS, ids=lambda precision: precision.dtype)
def test_every_precision(small: tuple[nn.Module, Graph, bytes], precision: Precision, tmp_path: Path) -> None:
    """The file says what it is, and computes the module's outputs in the module's terms."""
    module, _, data = small
    path = tmp_path / "model.tflite"
    path.write_bytes(_quantised(data, precision))
    artifact = format.inspect(path)
    assert artifact.dtype == precision.dtype
    assert artifact.tools["transposes"] == "0"
    (image,) = artifact.inputs
    assert (image.shape, image.layout) == ((1, 8, 8, 3), "NHWC")
    assert [(info.shape, info.layout) for info in artifact.outputs] == [((1, 10), ""), ((1, 4, 4, 32), "NHWC")]
    assert (image.dtype, image.scale is not None) == (
        ("int8", True) if precision.dtype == "int8" else ("float32", False)
    )
    for (x,) in _calibration():
        with torch.no_grad():
            expected = [leaf.numpy() for leaf in module(torch.from_numpy(x[:1]))]
        for ours, theirs in zip(format.run(path, [x[:1]]), expected, strict=True):
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= TOLERANCE[precision.dtype] * np.abs(theirs).max()


def test_tensors_are_named_after_the_graph(small: tuple[nn.Module, Graph, bytes]) -> None:
    """Every convolution of the graph is found in the name of exactly one operation's output."""
    _, graph, data = small
    model = unpack(data)
    names = [model.subgraphs[0].tensors[op.outputs[0]].name.decode() for op in model.subgraphs[0].operators]
    kinds = operator_names(model)
    for node in graph.nodes:
        if node.op == "conv2d":
            found = [
                kind for kind, name in zip(kinds, names, strict=True) if f"{node.name};" in name.replace(";;", "; ;")
            ]
            assert [kind for kind in found if "CONV" in kind], (node.name, names)


def test_float_nodes_stay_float(small: tuple[nn.Module, Graph, bytes], tmp_path: Path) -> None:
    _, graph, data = small
    wide = next(node.name for node in graph.nodes if node.path == "wide")
    path = tmp_path / "mixed.tflite"
    path.write_bytes(_quantised(data, Precision(dtype="int8", float_nodes=(wide,))))
    assert format.inspect(path).dtype == "int8"
    model = unpack(path.read_bytes())
    kinds = {}
    for op, name in zip(model.subgraphs[0].operators, operator_names(model), strict=True):
        if "CONV" in name:
            kinds[model.subgraphs[0].tensors[op.outputs[0]].name.decode()] = (
                model.subgraphs[0].tensors[op.inputs[0]].type
            )
    assert [kind for name, kind in kinds.items() if wide in name] == [0]
    assert {kind for name, kind in kinds.items() if wide not in name} == {9}
    with pytest.raises(ModelError, match="nowhere"):
        _quantised(data, Precision(dtype="int8", float_nodes=("nowhere",)))


def test_packing_changes_nothing_and_aligns(small: tuple[nn.Module, Graph, bytes], tmp_path: Path) -> None:
    _, _, data = small
    path = tmp_path / "packed.tflite"
    path.write_bytes(packed := pack(unpack(data)))
    assert operator_names(unpack(packed)) == operator_names(unpack(data))
    weights = next(
        buffer.data for buffer in unpack(packed).buffers if buffer.data is not None and len(buffer.data) > 999
    )
    assert packed.index(weights.tobytes()) % 16 == 0
    (tmp_path / "was.tflite").write_bytes(data)
    x = _image()[0].numpy()
    for ours, theirs in zip(format.run(path, [x]), format.run(tmp_path / "was.tflite", [x]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "missing", "offsets", "short_weights"])
def test_inspect_refuses_damage(small: tuple[nn.Module, Graph, bytes], damage: str, tmp_path: Path) -> None:
    data = bytearray(small[2])
    if damage == "offsets":
        data[8:400] = bytes(255 - byte for byte in data[8:400])
    elif damage == "short_weights":
        model = unpack(bytes(data))
        largest = max((b for b in model.buffers if b.data is not None), key=lambda b: len(b.data))
        largest.data = largest.data[:-16]
        data = bytearray(pack(model))
    broken = {"empty": b"", "half": data[: len(data) // 2], "noise": bytes(range(256)) * 9}.get(damage, data)
    path = tmp_path / "model.tflite"
    if damage != "missing":
        path.write_bytes(broken)
    with pytest.raises(RecordError, match=r"model\.tflite"):
        format.inspect(path)


def test_inspect_refuses_over_two_gibibytes(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(RecordError, match="2 GiB"):
        format.inspect(path)


def test_refused_before_converting(tmp_path: Path) -> None:
    """Nothing here needs the converter, and nothing is written."""
    net, image, path = Small().eval(), _image(), tmp_path / "model.tflite"
    int8 = Precision(dtype="int8")
    flat = [(np.ones((4, 3, 8, 8), np.float32),)]
    broken = [(np.full((4, 3, 8, 8), np.nan, np.float32),)]
    for calibration, reason in ((None, "there are none"), (flat, "constant"), (broken, "NaN")):
        with pytest.raises(DataError, match=reason):
            format.export(net, image, path, precision=int8, calibration=calibration)
    with pytest.raises(UsageError, match="uint8"):
        format.export(
            net, image, path, precision=Precision(dtype="int8", activations="uint8"), calibration=_calibration()
        )
    with torch.device("meta"):
        large = nn.Linear(2**15, 2**14 + 1)
    with pytest.raises(ModelError, match="2 GiB"):
        convert([large], (torch.zeros(1, 2**15, device="meta"),))
    assert not list(tmp_path.iterdir())


WORKERS = {
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\)"),
    "hang": ("import time; time.sleep(60)", "did not finish within 2 s"),
    "nothing": ("print('no space left'); raise SystemExit(3)", "ended with 3.*no space left"),
}


@pytest.mark.parametrize("fault", WORKERS)
def test_a_converter_that_fails(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, reason = WORKERS[fault]
    (worker := tmp_path / "worker.py").write_text(code)
    with pytest.raises(ModelError, match=reason):
        convert([Small().eval()], _image(), worker=worker, timeout_s=2.0 if fault == "hang" else 60.0)
    assert capfd.readouterr().out == ""


@pytest.mark.long
def test_unsupported_operation_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the module it stands in; nothing is printed and nothing written."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Odd()).train()
    with pytest.raises(ModelError, match=r"in 1: TFLite has no operation for aten\.special_bessel_j0"):
        format.export(net, _image(), tmp_path / "model.tflite")
    assert net.training
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


@pytest.mark.long
def test_export_int8_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = randomise(Small())
    path = tmp_path / "model.tflite"
    artifact = format.export(net, _image(), path, precision=Precision(dtype="int8"), calibration=_calibration())
    assert artifact.dtype == "int8"
    assert artifact.bytes == path.stat().st_size
    assert capfd.readouterr().out == ""


def _mobilenet_v3() -> nn.Module:
    models = torchvision_models()
    rows = [(16, 3, 16, 16, True, "RE", 2, 1), (16, 3, 24, 24, True, "HS", 2, 1)]
    settings = [models.mobilenetv3.InvertedResidualConfig(*row, 1.0) for row in rows]
    return models.MobileNetV3(settings, 32, num_classes=10)


SHARED = ("resnet", "mobilenet_v2", "shufflenet", "densenet", "option_a", "squeeze_excite")
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: MODELS[name] for name in SHARED},
    "mobilenet_v3": (_mobilenet_v3, 32),
    "mobilenet_v3_small": (lambda: torchvision_models().mobilenet_v3_small(num_classes=10), 32),
}
TRANSPOSED = {"squeeze_excite", "shufflenet"}
"""The one's head reads every position of an image in the module's order, the other shuffles channels."""


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(NETS))
def test_resized_equals_converted(name: str, tmp_path: Path) -> None:
    """Same outputs and same operations as a true conversion of the sliced module, at every precision."""
    torch.set_num_threads(1)
    make, size = NETS[name]
    torch.manual_seed(0)
    module, inputs = randomise(make()), _image(size)
    graph = trace_graph(module, inputs, allow_inexact=True)
    resizer = format.make_resizer(module, inputs, graph)
    assert isinstance(resizer, ExactResizer), "this model should not need a conversion for every width"
    keep = random_keep(graph, np.random.default_rng(3), least=0.3)
    for group in graph.prunable:
        keep[group.name] = keep[group.name][: max(len(keep[group.name]) // group.step * group.step, group.step)]
    assert any(len(kept) < graph.units[group] for group, kept in keep.items())
    (converted,) = convert([slice_model(module, inputs, graph, keep)], inputs)
    (tmp_path / "converted.tflite").write_bytes(converted)
    resizer.write_model(keep, path := tmp_path / "resized.tflite")
    assert operator_names(unpack(path.read_bytes())) == operator_names(unpack(converted))
    assert (format.inspect(path).tools["transposes"] == "0") == (name not in TRANSPOSED)
    x = inputs[0].numpy()
    (ours,), (theirs,) = format.run(path, [x]), format.run(tmp_path / "converted.tflite", [x])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    widths = {group: len(kept) for group, kept in keep.items()}
    resizer.write_weights(tmp_path / "weights.bin")
    for precision in format.PRECISIONS:
        resizer.precision = precision
        resizer._ranges = calibrate(resizer.resize({}), precision, [(x,)]) if precision.dtype == "int8" else None
        resizer.write_structure(widths, path, "weights.bin")
        assert format.inspect(path).dtype == precision.dtype
        assert format.run(path, [x])[0].shape == theirs.shape
        ranges = calibrate(converted, precision, [(x,)]) if precision.dtype == "int8" else None
        expected = quantize(converted, precision, ranges)
        assert operator_names(unpack(path.read_bytes())) == operator_names(unpack(expected))


@pytest.mark.long
def test_values_that_depend_on_widths_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Group normalisation divides by a number of channels: such files are converted, and it is said."""
    make, size = MODELS["group_norm"]
    module, inputs = randomise(make()), _image(size)
    graph = trace_graph(module, inputs, allow_inexact=True)
    resizer = format.make_resizer(module, inputs, graph)
    keep = {g.name: np.arange(g.step) for g in graph.prunable[:1]}
    resizer.write_model(keep, path := tmp_path / "model.tflite")
    with torch.no_grad():
        expected = slice_model(module, inputs, graph, keep).eval()(*inputs).numpy()
    (output,) = format.run(path, [inputs[0].numpy()])
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert isinstance(resizer, ExportingResizer) == ("every width is converted on its own" in caplog.text)
