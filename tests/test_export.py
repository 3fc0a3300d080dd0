"""Export: what is written computes what the module computes, or nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from evidence import make_graph
from torch import Tensor, nn

from edgeprune.core.errors import ModelError, UnknownMember, UsageError
from edgeprune.core.records import Precision
from edgeprune.core.store import sha256_file
from edgeprune.export import export_model
from edgeprune.formats import _onnx_registry

torch.set_num_threads(1)
INPUTS = (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)


class Net(nn.Module):
    """Convolution, batch norm and dropout: each behaves otherwise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


class TwoOutputs(Net):
    """Gives a mapping with the features beside the scores, and takes a second input."""

    def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
        features = self.body(image).mean((2, 3)) + shift.to(image.dtype)
        return {"scores": self.head(features), "features": features}


def in_evaluation(net: nn.Module) -> nn.Module:
    for statistics in ("running_mean", "running_var"):
        getattr(net.body[1], statistics).uniform_(0.5, 1.5)
    return net.eval()


def run(path: Path, *arrays: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: array for value, array in zip(session.get_inputs(), arrays, strict=True)})


def test_artifact_equals_the_module(tmp_path: Path) -> None:
    net, path = in_evaluation(Net()), tmp_path / "deep" / "net.onnx"
    artifact = export_model(net, INPUTS, path, graph=make_graph())
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    assert (artifact.path, artifact.format, artifact.dtype) == (str(path), "onnx", "float32")
    assert (artifact.sha256, artifact.bytes) == (sha256_file(path), path.stat().st_size)
    assert artifact.graph_sha256 == make_graph().model_sha256
    assert {"edgeprune", "python", "torch", "onnx", "onnxruntime"} <= artifact.tools.keys()
    with torch.no_grad():
        np.testing.assert_allclose(run(path, INPUTS[0].numpy())[0], net(*INPUTS).numpy(), rtol=1e-4, atol=1e-5)


def test_files_say_nothing_of_the_machine_that_made_them(tmp_path: Path) -> None:
    """The exporter notes source lines and paths of every operation; what leads back to the graph stays."""
    path = tmp_path / "net.onnx"
    export_model(Net(), INPUTS, path)
    content = path.read_bytes()
    for secret in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "forward", "site-packages"):
        assert secret.encode() not in content, secret
    notes = {note.key for node in onnx.load(path).graph.node for note in node.metadata_props}
    assert notes == {"pkg.torch.onnx.fx_node", "pkg.torch.onnx.name_scopes"}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    net = in_evaluation(TwoOutputs())
    inputs = (*INPUTS, torch.arange(8).reshape(2, 4))
    artifact = export_model(net, inputs, tmp_path / "net.onnx")
    assert [info.dtype for info in artifact.inputs] == ["float32", "int64"]
    assert [info.shape[-1] for info in artifact.outputs] == [5, 4]


def test_modes_of_the_module_are_left_as_they_were(tmp_path: Path) -> None:
    net = in_evaluation(Net())
    net.body.train()
    net.body[1].eval()
    before = {name: part.training for name, part in net.named_modules()}
    export_model(net, INPUTS, tmp_path / "net.onnx")
    assert {name: part.training for name, part in net.named_modules()} == before


class Unfaithful(Net):
    """Computes something else once it runs outside the exporter."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * (1.0 if torch.compiler.is_exporting() else 1.01)


def test_an_export_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(ModelError, match="differs from the module by"):
        export_model(in_evaluation(Unfaithful()), INPUTS, path)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    net = in_evaluation(Net())
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        export_model(net, INPUTS, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


class Branching(Net):
    """Decides by a value, which cannot be exported."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) if image.sum() > 0 else image


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        export_model(in_evaluation(Branching()), INPUTS, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("asked", "written"), [(None, 17), (17, 17), (19, 19)])
def test_the_opset_is_that_asked_for(asked: int | None, written: int, tmp_path: Path) -> None:
    artifact = export_model(Net().eval(), (torch.randn(1, 3, 8, 8),), tmp_path / "net.onnx", opset=asked)
    assert onnx.load(artifact.path).opset_import[0].version == written
    assert artifact.tools["opset"] == str(written)


@pytest.mark.parametrize(("format", "opset", "said"), [("onnx", 16, "17 to 20, not 16"), ("tflite", 17, "no opset")])
def test_an_opset_that_no_file_has(format: str, opset: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export_model(Net().eval(), (torch.randn(1, 3, 8, 8),), tmp_path / "net", format=format, opset=opset)


def test_operators_are_read_once_and_again_where_torchvision_adds_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read: list[int] = []
    plain = ONNXRegistry.from_torchlib

    def counted(*_: object, opset_version: int) -> ONNXRegistry:
        read.append(opset_version)
        return plain(opset_version=opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    monkeypatch.setattr(_onnx_registry, "_TABLES", {})
    inputs = (torch.randn(1, 3, 8, 8),)
    for number in range(2):
        export_model(Net().eval(), inputs, tmp_path / f"{number}.onnx")
    assert len(read) == 1
    added = torch.library.Library("torchvision", "FRAGMENT")
    added.define("an_operator_of_later(Tensor x) -> Tensor")
    export_model(Net().eval(), inputs, tmp_path / "later.onnx")
    assert len(read) == 2
    assert ONNXRegistry.from_torchlib is counted  # whoever else exports gets PyTorch's own


def test_unknown_format_and_folder_that_cannot_be_written(tmp_path: Path) -> None:
    net = in_evaluation(Net())
    with pytest.raises(UnknownMember, match=r"known: .*onnx"):
        export_model(net, INPUTS, tmp_path / "net.xyz", format="xyz")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        export_model(net, INPUTS, tmp_path / "file" / "net.onnx")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(UsageError, match="cannot write"):
            export_model(net, INPUTS, tmp_path / "net.onnx")


CALIBRATION = [(np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32),)]


@pytest.mark.parametrize("dtype", ["float16", "dynamic", "int8"])
def test_fewer_bits(dtype: str, tmp_path: Path) -> None:
    artifact = export_model(
        in_evaluation(Net()), INPUTS, tmp_path / "net.onnx", precision=Precision(dtype=dtype), calibration=CALIBRATION
    )
    assert artifact.dtype == dtype


def test_quantisation_that_destroys_the_output_is_not_written(tmp_path: Path) -> None:
    """One channel so large that nothing is left of the others, and nothing reads it."""
    net = in_evaluation(Net())
    with torch.no_grad():
        net.body[1].weight[0] = 1e6
        net.head.weight[:, 0] = 0
        net.head.bias.zero_()
    precision = Precision(dtype="int8", activations="uint8")
    with pytest.raises(ModelError, match="destroyed by quantisation"):
        export_model(net, INPUTS, tmp_path / "net.onnx", precision=precision, calibration=CALIBRATION)
    assert list(tmp_path.iterdir()) == []
