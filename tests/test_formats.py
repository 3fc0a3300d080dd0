"""Export, inspection and resizing: a resized model is the export of the sliced module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exactness import random_keep, randomise
from small_nets import NETS
from torch import nn
from zoo import torchvision_models

from edgeprune.core.errors import ModelError, RecordError
from edgeprune.core.records import KernelTime
from edgeprune.device.runtimes.onnxruntime import parse_profile
from edgeprune.formats import onnx as format
from edgeprune.formats._onnx_resize import ExactResizer, ExportingResizer, OnnxResizer
from edgeprune.formats._units import UnitSpace
from edgeprune.graphs.slice import slice_model
from edgeprune.trace import trace_graph


def _resnet() -> nn.Module:
    models = torchvision_models()
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def _mobilenet() -> nn.Module:
    setting = [[1, 16, 1, 1], [4, 24, 2, 2]]
    return torchvision_models().MobileNetV2(num_classes=10, width_mult=0.5, inverted_residual_setting=setting)


def _shufflenet() -> nn.Module:
    return torchvision_models().ShuffleNetV2([2, 1, 1], [16, 32, 48, 64, 64], num_classes=10)


def _densenet() -> nn.Module:
    return torchvision_models().DenseNet(8, (2, 2), 16, num_classes=10)


class _Residual(nn.Module):
    """A pre-activation stem and option-A padding, whose integers depend on two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.norm = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.head(torch.relu(self.norm(self.wide(x)) + shortcut).mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (_resnet, 32),
    "mobilenet_v2": (_mobilenet, 32),
    "shufflenet": (_shufflenet, 32),
    "densenet": (_densenet, 32),
    "option_a": (_Residual, 8),
    "group_norm": (NETS["group_norm"], 8),
    "squeeze_excite": (NETS["squeeze_excite"], 8),
    "flattened": (NETS["depthwise"], 8),
}


def _run(data: bytes | str, x: torch.Tensor, profile: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Output, and (name, op) of each kernel that the runtime executed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (output, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ((_, kernels),) = parse_profile(events)
    return output, [(name, op) for name, op, _ in kernels]


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[torch.Tensor, ...], OnnxResizer]:
    torch.set_num_threads(1)
    make, size = MODELS[request.param]
    module = randomise(make())
    inputs = (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)
    graph = trace_graph(module, inputs, allow_inexact=True)
    return module, inputs, format.make_resizer(module, inputs, graph)


@pytest.mark.slow
def test_resized_equals_exported(case: tuple[nn.Module, tuple[torch.Tensor, ...], OnnxResizer], tmp_path: Path) -> None:
    """Same outputs and same kernels as a true export of the sliced module; also with shared weights."""
    module, inputs, resizer = case
    assert isinstance(resizer, ExactResizer), "this model should not need an export for every width"
    keep = random_keep(resizer.graph, np.random.default_rng(3), least=0.3)
    for group in resizer.graph.prunable:
        keep[group.name] = keep[group.name][: max(len(keep[group.name]) // group.step * group.step, group.step)]
    assert any(len(kept) < resizer.graph.units[name] for name, kept in keep.items())
    exported = format.to_proto(slice_model(module, inputs, resizer.graph, keep), inputs).SerializeToString()
    expected, kernels = _run(exported, inputs[0], tmp_path / "exported")
    resizer.write_model(keep, tmp_path / "resized.onnx")
    output, found = _run(str(tmp_path / "resized.onnx"), inputs[0], tmp_path / "resized")
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Sorted: of kernels that do not wait for each other the runtime takes now the one first, now the other.
    assert sorted(op for _, op in found) == sorted(op for _, op in kernels)

    widths = {name: len(kept) for name, kept in keep.items()}
    resizer.write_weights(tmp_path / "weights.bin")
    resizer.write_structure(widths, tmp_path / "structure.onnx", "weights.bin")
    shared, found = _run(str(tmp_path / "structure.onnx"), inputs[0], tmp_path / "structure")
    assert shared.shape == expected.shape
    assert sorted(op for _, op in found) == sorted(op for _, op in kernels)
    assert format.inspect(tmp_path / "structure.onnx").bytes > (tmp_path / "weights.bin").stat().st_size


@pytest.mark.slow
def test_every_kernel_is_charged(case: tuple[nn.Module, tuple[torch.Tensor, ...], OnnxResizer], tmp_path: Path) -> None:
    """All time at every width goes to kernels of the dense model, whose extents follow the weights."""
    _, inputs, resizer = case
    resizer.write_weights(tmp_path / "weights.bin")
    smaller = {group.name: max(group.step, group.units // 2) for group in resizer.graph.prunable}
    mapped = None
    for widths in ({}, smaller):
        resizer.write_structure(widths, tmp_path / "model.onnx", "weights.bin")
        _, kernels = _run(str(tmp_path / "model.onnx"), inputs[0], tmp_path / "profile")
        times = [KernelTime(name=name, op=op, time_s=1.0 + place) for place, (name, op) in enumerate(kernels)]
        mapped = mapped or resizer.map_kernels(times)
        charged = mapped.charge(times)
        assert sum(charged.values()) == pytest.approx(sum(time.time_s for time in times))
        assert set(charged) <= {kernel.name for kernel in mapped.kernels}
    assert mapped is not None
    layers = {node.name for node in resizer.graph.nodes if node.op in ("conv2d", "linear")}
    covered = {node for kernel in mapped.kernels for node in kernel.nodes}
    assert layers <= covered
    weights = {parameter.name: parameter for parameter in resizer.graph.parameters}
    for node in resizer.graph.nodes:
        if node.op == "conv2d":
            (kernel,) = [k for k in mapped.kernels if k.nodes and k.nodes[0] == node.name]
            assert kernel.out_extent == weights[node.parameters[0]].extents[0]


def _tiny() -> nn.Module:
    return randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    )


X = (torch.ones(1, 3, 8, 8),)


def test_exporting_resizer_is_the_same_model(tmp_path: Path) -> None:
    """The way out for models that cannot be rewritten gives what rewriting gives."""
    module = _tiny()
    graph = trace_graph(module, X)
    exact = format.make_resizer(module, X, graph)
    assert isinstance(exact, ExactResizer)
    exporting = ExportingResizer(module, X, graph, format.to_proto)
    keep = random_keep(graph, np.random.default_rng(1))
    outputs = []
    for resizer in (exact, exporting):
        resizer.write_model(keep, tmp_path / "model.onnx")
        outputs.append(_run(str(tmp_path / "model.onnx"), X[0], tmp_path / "p")[0])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_values_that_depend_on_widths_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A float that follows the width cannot be rewritten: every width is then exported, not guessed."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(y / y.shape[1])

    module = randomise(Scaled())
    graph = trace_graph(module, X)
    if not graph.prunable:
        pytest.skip("the channel count in a value freezes the channels")
    resizer = format.make_resizer(module, X, graph)
    keep = {graph.prunable[0].name: np.arange(3)}
    resizer.write_model(keep, tmp_path / "model.onnx")
    exported = format.to_proto(slice_model(module, X, graph, keep), X).SerializeToString()
    expected, _ = _run(exported, X[0], tmp_path / "e")
    output, _ = _run(str(tmp_path / "model.onnx"), X[0], tmp_path / "r")
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_export_keeps_names_mode_and_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = _tiny().train()
    graph = trace_graph(module, X)
    module.train()
    artifact = format.export(module, X, tmp_path / "model.onnx", graph=graph)
    assert module.training
    assert capfd.readouterr().out == ""
    assert artifact.graph_sha256 == graph.model_sha256
    assert artifact.inputs[0].shape == (1, 3, 8, 8)
    assert artifact.bytes == (tmp_path / "model.onnx").stat().st_size
    assert artifact.tools["opset"] == "17"
    names = {tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {"0.weight", "4.weight", "4.bias"} <= names
    assert not list(tmp_path.glob("*.data"))
    with torch.no_grad():
        expected = module.eval()(X[0]).numpy()
    output, _ = _run(str(tmp_path / "model.onnx"), X[0], tmp_path / "p")
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_export_refuses(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot export"):
        format.export(Branching(), X, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "missing"])
def test_inspect_refuses_damage(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    format.export(_tiny(), X, path)
    data = path.read_bytes()
    broken = {"empty": b"", "half": data[: len(data) // 2], "noise": bytes(range(256)) * 9, "missing": None}[damage]
    path.unlink() if broken is None else path.write_bytes(broken)
    with pytest.raises(RecordError, match=r"model\.onnx"):
        format.inspect(path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "gone.bin"])
def test_inspect_refuses_data_elsewhere(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "folder"
    format.export(_tiny(), X, folder / "model.onnx")
    (tmp_path / "secret.bin").write_bytes(b"\0" * 10_000)
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RecordError, match="not a file beside it"):
        format.inspect(folder / "model.onnx")


@pytest.mark.parametrize("build", [_resnet, _mobilenet, _Residual])
def test_two_probes_tell_the_widths_apart(build: Callable[[], nn.Module]) -> None:
    """Every probe is an export. Classes and other groups that no probe moves ask for no more of them."""
    graph = trace_graph(build().eval(), (torch.zeros(1, 3, 32, 32),))
    assert any(group not in graph.prunable for group in graph.groups)
    space = UnitSpace(graph)
    kept = [space.kept(keep) for keep in space.probes(np.random.default_rng(0))]
    assert len(kept) == 2
    forms = [form for form in space.forms if any(form[~mask].any() for mask in kept)]
    assert len({tuple(int(form[~mask].sum()) for mask in kept) for form in forms}) == len(forms) > 2
