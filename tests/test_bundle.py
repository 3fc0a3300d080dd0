"""The bundle: deterministic, tamper-evident, and its examples run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from evidence import Evidence, make_evidence
from onnx import TensorProto, helper, numpy_helper

from edgeprune import bundle as bundle_stage
from edgeprune.bundle import MANIFEST, verify_bundle, write_bundle
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Artifact, Bundle, TensorInfo
from edgeprune.core.store import sha256_file

LABELS = ["zero", "one", "two", "drei", "vier"]
PREPROCESSING = {"scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A classifier with a free batch axis: mean over space, then linear."""
    path = tmp_path_factory.mktemp("artifact") / "pruned.onnx"
    weight = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["scores"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return Artifact(
        path=str(path), format="onnx", dtype="float32", sha256=sha256_file(path), bytes=path.stat().st_size,
        inputs=(TensorInfo(name="image", shape=(-1, 3, 4, 4), dtype="float32"),),
        outputs=(TensorInfo(name="scores", shape=(-1, 5), dtype="float32"),), tools={"onnx": onnx.__version__},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(artifact: Artifact, evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(artifact, evidence, tmp_path_factory.mktemp("bundle") / "bundle.zip")


@pytest.fixture
def unpacked(bundle: Bundle, tmp_path: Path) -> Path:
    with zipfile.ZipFile(bundle.path) as archive:
        archive.extractall(tmp_path / "app")
    return tmp_path / "app"


def make(artifact: Artifact, evidence: Evidence, path: Path) -> Bundle:
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    return write_bundle(
        Path(artifact.path), artifact, evidence.plan, report, path, labels=LABELS, preprocessing=PREPROCESSING
    )


def scores(artifact: Artifact, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "example.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def printed_top1(output: str) -> tuple[int, str, float]:
    match = re.search(r"top-1: (\d+) (\S*) \(output (\S+)\)", output)
    assert match and re.search(r"latency: \d+(\.\d+)?(e-\d+)? ms", output), output
    return int(match[1]), match[2], float(match[3])


def test_round_trip(bundle: Bundle) -> None:
    assert verify_bundle(Path(bundle.path)) == bundle
    assert set(bundle.files) == {
        "CMakeLists.txt", "README.md", "example.cpp", "example.py", "labels.txt", "manifest.json", "model.onnx"
    }  # fmt: skip


def test_same_inputs_give_the_same_bytes(
    bundle: Bundle, artifact: Artifact, evidence: Evidence, tmp_path: Path
) -> None:
    again = make(artifact, evidence, tmp_path / "again.zip")
    assert Path(again.path).read_bytes() == Path(bundle.path).read_bytes()


def test_manifest_holds_what_was_measured(bundle: Bundle, artifact: Artifact, evidence: Evidence) -> None:
    manifest = bundle.manifest
    assert manifest["inputs"] == [{"name": "image", "shape": [-1, 3, 4, 4], "dtype": "float32", "layout": "NCHW"}]
    assert manifest["files"]["model.onnx"] == {"sha256": artifact.sha256, "bytes": artifact.bytes}
    assert evidence.report.compact.latency_s is not None
    assert manifest["measured"]["compact"]["latency_s"]["median"] == evidence.report.compact.latency_s.median
    assert manifest["measured"]["passed"] is True
    assert manifest["plan"]["widths"] == evidence.plan.widths


def test_every_manifest_key_is_documented(bundle: Bundle, unpacked: Path) -> None:
    documented = set(re.findall(r"`(\w+)`", (unpacked / "README.md").read_text()))
    assert set(bundle.manifest) <= documented
    assert set(bundle.manifest["measured"]) <= documented
    assert set(bundle.manifest["plan"]) <= documented
    assert not [name for name in bundle.files if b"@VERSION@" in (unpacked / name).read_bytes()]


def test_python_example_equals_onnxruntime(artifact: Artifact, unpacked: Path) -> None:
    image = np.random.default_rng(1).standard_normal((1, 3, 4, 4)).astype(np.float32)
    np.save(unpacked / "image.npy", image)
    done = run_example(unpacked, "image.npy")
    assert done.returncode == 0, done.stderr
    expected = scores(artifact, image)[0]
    best, label, value = printed_top1(done.stdout)
    assert (best, label) == (expected.argmax(), LABELS[expected.argmax()])
    assert value == pytest.approx(expected.max(), rel=1e-5)


def test_python_example_normalises_raw_integers(artifact: Artifact, unpacked: Path) -> None:
    image = np.random.default_rng(2).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)
    np.save(unpacked / "image.npy", image)
    mean, std = (np.reshape(PREPROCESSING[key], (1, 3, 1, 1)) for key in ("mean", "std"))
    expected = scores(artifact, ((image / 255 - mean) / std).astype(np.float32))[0]
    best, _, value = printed_top1(run_example(unpacked, "image.npy").stdout)
    assert best == expected.argmax()
    assert value == pytest.approx(expected.max(), rel=1e-4)


def test_python_example_refuses_an_altered_file(unpacked: Path) -> None:
    assert run_example(unpacked).returncode == 0
    with (unpacked / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = run_example(unpacked)
    assert done.returncode != 0
    assert "model.onnx was altered" in done.stderr


def test_python_example_is_short_and_needs_little(unpacked: Path) -> None:
    text = (unpacked / "example.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    assert len(text.splitlines()) < 60


def test_any_altered_byte_is_seen(bundle: Bundle, tmp_path: Path) -> None:
    data = Path(bundle.path).read_bytes()
    path = tmp_path / "bundle.zip"
    ends = [*range(200), *range(len(data) - 700, len(data))]
    for position in [*ends, *range(200, len(data) - 700, 97)]:
        altered = bytearray(data)
        altered[position] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(RecordError, match=r"bundle\.zip"):
            verify_bundle(path)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -30])
def test_truncated(bundle: Bundle, tmp_path: Path, size: int) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(Path(bundle.path).read_bytes()[:size])
    with pytest.raises(RecordError):
        verify_bundle(path)


def repacked(bundle: Bundle, changes: dict[str, bytes | None], **options: int) -> bytes:
    with zipfile.ZipFile(bundle.path) as archive:
        contents: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in (contents | changes).items():
            if content is not None:
                archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"../evil.py": b"x"}, {}, "leads out"),
        ({"/etc/evil": b"x"}, {}, "leads out"),
        ({"folder/evil.py": b"x"}, {}, "leads out"),
        ({"..\\evil.py": b"x"}, {}, "leads out"),
        ({"extra.txt": b"x"}, {}, "does not name"),
        ({"labels.txt": None}, {}, "missing"),
        ({"labels.txt": b"one\n"}, {}, "labels.txt was altered"),
        ({MANIFEST: None}, {}, "not a bundle"),
        ({MANIFEST: b"[]"}, {}, "altered"),
        ({MANIFEST: b'{"schema": "other/1"}'}, {}, "expected"),
        ({}, {}, "packed again"),
        ({}, {"compression": zipfile.ZIP_DEFLATED}, "never use"),
    ],
)
def test_foreign_bundles(
    bundle: Bundle, tmp_path: Path, changes: dict[str, bytes | None], options: dict[str, int], reason: str
) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(repacked(bundle, changes, **options))
    with pytest.raises(RecordError, match=reason):
        verify_bundle(path)


def test_size_limit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_stage, "MAX_BYTES", Path(bundle.path).stat().st_size - 1)
    with pytest.raises(RecordError, match="larger"):
        verify_bundle(Path(bundle.path))


def test_artifact_must_be_the_validated_one(artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    with pytest.raises(RecordError, match="another artifact"):
        write_bundle(Path(artifact.path), artifact, None, evidence.report, out)
    altered = tmp_path / "altered.onnx"
    altered.write_bytes(Path(artifact.path).read_bytes() + b"\0")
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    with pytest.raises(RecordError, match="altered"):
        write_bundle(altered, artifact, None, report, out)
    with pytest.raises(RecordError, match="another graph"):
        write_bundle(Path(artifact.path), replace(artifact, graph_sha256="0"), evidence.plan, report, out)
    assert not out.exists()


@pytest.mark.parametrize("more", [{"labels": ["a\nb"]}, {"preprocessing": {"mean": float("nan")}}])
def test_what_cannot_be_written(
    artifact: Artifact, evidence: Evidence, tmp_path: Path, more: dict[str, object]
) -> None:
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    with pytest.raises(UsageError):
        write_bundle(Path(artifact.path), artifact, None, report, tmp_path / "b.zip", **more)
    assert list(tmp_path.iterdir()) == []


def test_without_plan_labels_and_preprocessing(artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    made = write_bundle(Path(artifact.path), artifact, None, report, tmp_path / "bundle.zip")
    assert verify_bundle(Path(made.path)) == made
    assert json.loads(json.dumps(made.manifest))["plan"] is None
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "app")
    assert run_example(tmp_path / "app").returncode == 0


def onnxruntime_headers() -> Path | None:
    """Folder of ONNX Runtime's C++ headers: ONNXRUNTIME_INCLUDE, or where a package puts them."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    found = (Path(place) for place in places if place and (Path(place) / "onnxruntime_cxx_api.h").is_file())
    return next(found, None)


def test_cpp_example_equals_onnxruntime(artifact: Artifact, unpacked: Path) -> None:
    """Built with CMake against the installed headers and the library inside the Python wheel."""
    headers, cmake = onnxruntime_headers(), shutil.which("cmake")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1*"))
    if headers is None or cmake is None or not libraries:
        pytest.skip("needs cmake and ONNX Runtime's C++ headers (libonnxruntime-dev, or set ONNXRUNTIME_INCLUDE)")
    root = unpacked / "onnxruntime"
    (root / "lib").mkdir(parents=True)
    (root / "include").symlink_to(headers)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(libraries[0])
    for command in ([cmake, "-B", "build", f"-DONNXRUNTIME_ROOT={root}"], [cmake, "--build", "build"]):
        built = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=200)
        assert built.returncode == 0, built.stdout + built.stderr
    image = np.random.default_rng(3).standard_normal((1, 3, 4, 4)).astype(np.float32)
    image.tofile(unpacked / "image.f32")
    done = subprocess.run(["build/example", "image.f32"], cwd=unpacked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = scores(artifact, image)[0]
    best, label, value = printed_top1(done.stdout)
    assert (best, label) == (expected.argmax(), LABELS[expected.argmax()])
    assert value == pytest.approx(expected.max(), rel=1e-4)
    wrong = subprocess.run(["build/example", "labels.txt"], cwd=unpacked, capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr) == (1, "labels.txt does not hold 48 float32 values\n")
