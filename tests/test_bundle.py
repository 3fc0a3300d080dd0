"""The bundle: deterministic, tamper-evident, and its examples run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from evidence import Evidence, make_evidence
from onnx import TensorProto, helper, numpy_helper
from tflite_files import write_classifier

from edgeprune import bundle as bundle_stage
from edgeprune.bundle import KINDS, MANIFEST, try_bundle, verify_bundle, write_bundle
from edgeprune.cli import run_command
from edgeprune.core.archive import pack, unpack
from edgeprune.core.errors import AgentError, RecordError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.records import Artifact, Bundle, Target, TensorInfo
from edgeprune.core.store import digest, sha256_bytes, sha256_file, write_record
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session

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


def make(artifact: Artifact, evidence: Evidence, path: Path, **more: Any) -> Bundle:
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    return write_bundle(
        Path(artifact.path), artifact, evidence.plan, report, path, labels=LABELS, preprocessing=PREPROCESSING, **more
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
        "CMakeLists.txt", "README.md", "SHA256SUMS", "example.cpp", "example.py", "example/input-0.bin",
        "example/output-0.bin", "labels.txt", "manifest.json", "manifest.schema.json", "model.onnx", "runtime.hpp",
        "runtime.py", "tensor.hpp",
    }  # fmt: skip


def test_same_inputs_give_the_same_bytes(
    bundle: Bundle, artifact: Artifact, evidence: Evidence, tmp_path: Path
) -> None:
    again = make(artifact, evidence, tmp_path / "again.zip")
    assert Path(again.path).read_bytes() == Path(bundle.path).read_bytes()


def test_manifest_holds_what_was_measured(bundle: Bundle, artifact: Artifact, evidence: Evidence) -> None:
    manifest = bundle.manifest
    assert manifest["inputs"] == [{
        "name": "image", "shape": [-1, 3, 4, 4], "dtype": "float32", "layout": "NCHW", "scale": None,
        "zero_point": None, "normalisation": PREPROCESSING,
    }]  # fmt: skip
    assert manifest["files"]["model.onnx"] == {"sha256": artifact.sha256, "bytes": artifact.bytes}
    assert evidence.report.compact.latency_s is not None
    assert manifest["measured"]["compact"]["latency_s"]["median"] == evidence.report.compact.latency_s.median
    assert manifest["measured"]["passed"] is True
    assert manifest["plan"]["widths"] == evidence.plan.widths
    assert manifest["provenance"]["plan_sha256"] == digest(evidence.plan)
    assert manifest["accuracy"]["data_sha256"] is None


def test_manifest_keeps_to_its_schema(bundle: Bundle, artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle.path) as archive:
        schema = json.loads(archive.read("manifest.schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(bundle.manifest)
    report = replace(evidence.report, artifact_sha256=artifact.sha256, provenance={"test_sha256": "d" * 64})
    least = write_bundle(Path(artifact.path), artifact, None, report, tmp_path / "least.zip", license="MIT")
    validator.validate(least.manifest)
    assert least.manifest["accuracy"]["data_sha256"] == "d" * 64
    assert least.manifest["license"] == "MIT"
    for key in bundle.manifest:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({k: v for k, v in bundle.manifest.items() if k != key})
    wrong = {"format": "pickle", "license": 3, "signer": "mine", "accuracy": {}, "inputs": [{"name": "x"}], "more": 1}
    for key, value in wrong.items():
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(bundle.manifest | {key: value})


def test_no_mark_of_a_template_is_left(artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=list(KINDS))
    with zipfile.ZipFile(made.path) as archive:
        assert not [name for name in archive.namelist() if re.search(rb"@[A-Z]+@", archive.read(name))]


def test_sha256sum_checks_the_unpacked_files(artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=["android"])
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "app")
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "app", capture_output=True).returncode == 0
    (tmp_path / "app" / "labels.txt").write_text("one\n")
    assert subprocess.run(command, cwd=tmp_path / "app", capture_output=True).returncode == 1
    sums = (tmp_path / "app" / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in sums} == set(made.files) - {"SHA256SUMS"}


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
    imported |= set(re.findall(r"^(?:import|from) (\w+)", (unpacked / "runtime.py").read_text(), re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "runtime"}
    assert len(text.splitlines()) < 90


def test_python_example_sees_other_outputs_than_were_recorded(unpacked: Path, tmp_path: Path) -> None:
    done = run_example(unpacked, "--save", "outputs.npz")
    assert done.returncode == 0, done.stderr
    assert "recorded outputs: 0 off" in done.stdout
    recorded = np.fromfile(unpacked / "example" / "output-0.bin", "<f4")
    with np.load(unpacked / "outputs.npz", allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["arr_0"].reshape(-1), recorded)
    (recorded * 1.5).tofile(unpacked / "example" / "output-0.bin")
    manifest = json.loads((unpacked / "manifest.json").read_text())
    manifest["files"].pop("example/output-0.bin")  # or it would be refused as altered
    (unpacked / "manifest.json").write_text(json.dumps(manifest))
    assert run_example(unpacked).returncode == 1


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
        ({"folder/evil.py": b"x"}, {}, "does not name"),
        ({"folder/../../evil.py": b"x"}, {}, "leads out"),
        ({"./evil.py": b"x"}, {}, "leads out"),
        ({"C:evil.py": b"x"}, {}, "leads out"),
        ({"evil\n.py": b"x"}, {}, "leads out"),
        ({"SHA256SUMS": None}, {}, "SHA256SUMS is missing"),
        ({"SHA256SUMS": b""}, {}, "SHA256SUMS is missing or was altered"),
        ({"SHA256SUMS.sig": b"x" * 64}, {}, "signature"),
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


@pytest.mark.parametrize(
    "more",
    [
        {"labels": ["a\nb"]},
        {"preprocessing": {"mean": float("nan")}},
        {"kinds": ["ios"]},
        {"license": "all mine\n"},
        {"key": Path("absent.pem")},
        {"examples": []},
    ],
)
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


# --- signatures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of key.pem, public.pem, other.pem and rsa.pem, as OpenSSL makes them."""
    folder = tmp_path_factory.mktemp("keys")
    for name, algorithm in (("key", "ed25519"), ("other-key", "ed25519"), ("rsa", "rsa")):
        command = ["openssl", "genpkey", "-algorithm", algorithm, "-out", f"{name}.pem"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    for name, public in (("key", "public"), ("other-key", "other")):
        command = ["openssl", "pkey", "-in", f"{name}.pem", "-pubout", "-out", f"{public}.pem"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def signed(artifact: Artifact, evidence: Evidence, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(artifact, evidence, tmp_path_factory.mktemp("signed") / "bundle.zip", key=keys / "key.pem")


def test_signed_with_the_key_that_is_asked_for(
    signed: Bundle, artifact: Artifact, evidence: Evidence, keys: Path, tmp_path: Path
) -> None:
    assert verify_bundle(Path(signed.path), key=keys / "public.pem") == signed
    assert verify_bundle(Path(signed.path)) == signed
    again = make(artifact, evidence, tmp_path / "again.zip", key=keys / "key.pem")
    assert Path(again.path).read_bytes() == Path(signed.path).read_bytes()


def test_openssl_verifies_the_signature(signed: Bundle, keys: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed.path) as archive:
        archive.extractall(tmp_path)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys / "public.pem"), "-rawin"]
    command += ["-in", "SHA256SUMS", "-sigfile", "SHA256SUMS.sig"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_wrong_key_and_no_signature(bundle: Bundle, signed: Bundle, keys: Path) -> None:
    with pytest.raises(RecordError, match="not with yours"):
        verify_bundle(Path(signed.path), key=keys / "other.pem")
    with pytest.raises(RecordError, match="not signed"):
        verify_bundle(Path(bundle.path), key=keys / "public.pem")


def test_a_signature_moved_to_another_bundle_is_refused(signed: Bundle, artifact: Artifact, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed.path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents[MANIFEST]) | {"license": "MIT"}
    contents[MANIFEST] = bundle_stage._json(manifest)
    contents["SHA256SUMS"] = bundle_stage._sums(contents)
    (tmp_path / "bundle.zip").write_bytes(pack(contents, "test"))
    with pytest.raises(RecordError, match="does not fit"):
        verify_bundle(tmp_path / "bundle.zip")


@pytest.mark.parametrize(
    ("name", "reason"), [("rsa.pem", "RSA"), ("public.pem", "private key"), ("no.pem", "cannot read")]
)
def test_keys_that_cannot_sign(
    artifact: Artifact, evidence: Evidence, keys: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        make(artifact, evidence, tmp_path / "bundle.zip", key=keys / name)


def test_every_altered_byte_of_a_signed_bundle_is_refused(signed: Bundle, tmp_path: Path) -> None:
    data, path = Path(signed.path).read_bytes(), tmp_path / "bundle.zip"
    rng = np.random.default_rng(0)
    start = data.index(b"SHA256SUMS.sig") + len(b"SHA256SUMS.sig")
    for position in [*range(start, start + 64, 5), *rng.integers(0, len(data), 300)]:
        altered = bytearray(data)
        altered[position] ^= 1 << rng.integers(8)
        path.write_bytes(altered)
        with pytest.raises(RecordError, match=r"bundle\.zip"):
            verify_bundle(path)


# --- on a board ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["local", "embedded"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    workdir = tmp_path_factory.mktemp("board") / "it's a $(board)"
    with contextlib.ExitStack() as stack:
        local = Target(name="host", board="linux", transport="local", python=sys.executable)
        target = local if request.param == "local" else stack.enter_context(EmbeddedBoard())
        yield stack.enter_context(open_session(replace(target, workdir=str(workdir))))


def test_a_board_gives_the_recorded_outputs(bundle: Bundle, session: Session) -> None:
    check = try_bundle(Path(bundle.path), session)
    assert check.passed
    assert check.measured == pytest.approx(0, abs=1e-5)
    assert "top-1:" in check.note
    assert not list(Path(session.target.workdir).rglob("try-*"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_board_gives_the_recorded_outputs_of_tflite(dtype: str, evidence: Evidence, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.tflite", dtype)
    artifact = load_member("formats", "tflite").inspect(tmp_path / "model.tflite")
    made = make(artifact, evidence, tmp_path / "bundle.zip")
    target = Target(name="host", board="linux", transport="local", python=sys.executable, workdir=str(tmp_path / "w"))
    with open_session(replace(target, runtime="tflite")) as session:
        check = try_bundle(Path(made.path), session)
    assert (check.passed, check.measured) == (True, 0)


def test_other_outputs_on_a_board(artifact: Artifact, evidence: Evidence, session: Session, tmp_path: Path) -> None:
    """The recorded outputs are of other weights, as if the board computed something else."""
    made = make(artifact, evidence, tmp_path / "bundle.zip")
    contents = unpack(Path(made.path).read_bytes(), "test")
    contents["example/output-0.bin"] = (np.frombuffer(contents["example/output-0.bin"], "<f4") * 2).tobytes()
    (tmp_path / "wrong.zip").write_bytes(remade(contents))
    check = try_bundle(tmp_path / "wrong.zip", session)
    assert (check.passed, check.measured) == (False, pytest.approx(0.5, abs=1e-3))
    contents["runtime.py"] = b"raise SystemExit('no such runtime')"
    (tmp_path / "broken.zip").write_bytes(remade(contents))
    with pytest.raises(AgentError, match="no such runtime"):
        try_bundle(tmp_path / "broken.zip", session)
    assert not list(Path(session.target.workdir).rglob("try-*"))


def remade(contents: dict[str, bytes]) -> bytes:
    """A bundle of altered files whose sums all fit, as an author with other files would make it."""
    manifest = json.loads(contents[MANIFEST])
    for name, entry in manifest["files"].items():
        entry |= {"sha256": sha256_bytes(contents[name]), "bytes": len(contents[name])}
    contents[MANIFEST] = bundle_stage._json(manifest)
    contents["SHA256SUMS"] = bundle_stage._sums(contents)
    return pack(contents, "test")


def test_bundles_that_a_board_cannot_run(
    artifact: Artifact, evidence: Evidence, session: Session, tmp_path: Path
) -> None:
    made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=["cpp"])
    with pytest.raises(UsageError, match="no Python example"):
        try_bundle(Path(made.path), session)
    contents = unpack(Path(made.path).read_bytes(), "test")
    contents[MANIFEST] = bundle_stage._json(json.loads(contents[MANIFEST]) | {"format": "tflite"})
    (tmp_path / "tflite.zip").write_bytes(remade(contents))
    with pytest.raises(UsageError, match="does not run"):
        try_bundle(tmp_path / "tflite.zip", session)


def test_the_command_line(
    artifact: Artifact, evidence: Evidence, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`bundle MODEL`, options before or after it, and `bundle verify FILE`."""
    monkeypatch.chdir(tmp_path)
    write_record(Path("plan.json"), evidence.plan)
    write_record(Path("report.json"), replace(evidence.report, artifact_sha256=artifact.sha256))

    def edgeprune(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["edgeprune", *arguments])
        assert run_command() == 0
        return capsys.readouterr().out

    options = ["--plan", "plan.json", "--report", "report.json", "--sign", str(keys / "key.pem")]
    edgeprune("bundle", artifact.path, *options, "-o", "a.zip", "--for", "python,cpp")
    edgeprune("bundle", *options, "-o", "b.zip", "--for", "all", artifact.path)
    assert "example.py" in verify_bundle(Path("a.zip")).files
    assert "android/README.md" in verify_bundle(Path("b.zip")).files
    said = edgeprune("bundle", "verify", "a.zip", "--key", str(keys / "public.pem"), "--on", "embedded")
    assert "outputs as recorded" in said
    assert "3x4x4" in edgeprune("inspect", "a.zip").replace("?x", "")
    with pytest.raises(RecordError, match="not with yours"):
        edgeprune("bundle", "verify", "a.zip", "--key", str(keys / "other.pem"))


# --- examples that are compiled --------------------------------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures"


def build(folder: Path, *options: str) -> None:
    quick = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-Wall -Wextra"]
    for command in (["cmake", "-B", "build", *quick, *options], ["cmake", "--build", "build"]):
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
        assert built.returncode == 0, built.stdout + built.stderr
        assert "warning" not in built.stderr, built.stderr


def run_built(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["build/example", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def onnxruntime_headers() -> Path:
    """ONNX Runtime's headers: ONNXRUNTIME_INCLUDE, where a package puts them, or our own of the few calls we make."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    found = (Path(place) for place in places if place and (Path(place) / "onnxruntime_c_api.h").is_file())
    return next(found, FIXTURES / "onnxruntime")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake: apt-get install cmake")
def test_cpp_example_equals_onnxruntime(artifact: Artifact, unpacked: Path) -> None:
    """Built with CMake, and run on the library inside the Python wheel."""
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1*"))
    root = unpacked / "onnxruntime"
    (root / "lib").mkdir(parents=True)
    (root / "include").symlink_to(onnxruntime_headers())
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    build(unpacked, f"-DONNXRUNTIME_ROOT={root}")
    recorded = run_built(unpacked)
    assert recorded.returncode == 0, recorded.stderr
    assert "recorded outputs: 0 off" in recorded.stdout
    image = np.random.default_rng(3).standard_normal((1, 3, 4, 4)).astype(np.float32)
    image.tofile(unpacked / "image.f32")
    done = run_built(unpacked, "image.f32")
    assert done.returncode == 0, done.stderr
    expected = scores(artifact, image)[0]
    best, label, value = printed_top1(done.stdout)
    assert (best, label) == (expected.argmax(), LABELS[expected.argmax()])
    assert value == pytest.approx(expected.max(), rel=1e-4)
    wrong = run_built(unpacked, "labels.txt")
    assert (wrong.returncode, wrong.stderr) == (1, "labels.txt does not hold 48 float32 values\n")
    (np.fromfile(unpacked / "example" / "output-0.bin", "<f4") + 1).tofile(unpacked / "example" / "output-0.bin")
    assert run_built(unpacked).returncode == 1


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.long), "int8"])
def tflite_app(request: pytest.FixtureRequest, evidence: Evidence, tmp_path: Path) -> Path:
    """An unpacked bundle of a TFLite model in NHWC."""
    write_classifier(tmp_path / "model.tflite", request.param)
    artifact = load_member("formats", "tflite").inspect(tmp_path / "model.tflite")
    made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=list(KINDS))
    assert verify_bundle(Path(made.path)) == made
    with zipfile.ZipFile(made.path) as archive:
        jsonschema.Draft202012Validator(json.loads(archive.read("manifest.schema.json"))).validate(made.manifest)
        archive.extractall(tmp_path / "app")
    return tmp_path / "app"


def test_python_example_runs_tflite(tflite_app: Path) -> None:
    done = run_example(tflite_app)
    assert done.returncode == 0, done.stderr
    assert "recorded outputs: 0 off" in done.stdout
    info = json.loads((tflite_app / "manifest.json").read_text())["inputs"][0]
    raw = np.random.default_rng(4).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    np.save(tflite_app / "raw.npy", raw)
    ready = (raw * PREPROCESSING["scale"] - PREPROCESSING["mean"]) / np.array(PREPROCESSING["std"])
    if info["scale"] is not None:
        ready = np.clip(np.rint(ready / info["scale"]) + info["zero_point"], -128, 127)
    np.save(tflite_app / "ready.npy", ready.astype(info["dtype"]))
    for name in ("raw", "ready"):
        done = run_example(tflite_app, f"{name}.npy", "--save", f"{name}.npz")
        assert done.returncode == 0, done.stderr
    with np.load(tflite_app / "raw.npz") as mine, np.load(tflite_app / "ready.npz") as theirs:
        np.testing.assert_allclose(mine["arr_0"], theirs["arr_0"], rtol=1e-5)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake: apt-get install cmake")
def test_cpp_example_runs_litert(tflite_app: Path) -> None:
    import ai_edge_litert

    build(tflite_app, f"-DLITERT_ROOT={Path(ai_edge_litert.__file__).parent}")
    done = run_built(tflite_app)
    assert done.returncode == 0, done.stderr
    python = printed_top1(run_example(tflite_app).stdout)
    assert printed_top1(done.stdout) == (*python[:2], pytest.approx(python[2], rel=1e-4))
    (tflite_app / "image.bin").write_bytes(b"\0" * 7)
    assert run_built(tflite_app, "image.bin").returncode == 1


def test_android_folder_is_complete(artifact: Artifact, evidence: Evidence, tmp_path: Path) -> None:
    made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=["android"])
    contents = unpack(Path(made.path).read_bytes(), "test")
    assert "example.py" not in contents
    for name in (MANIFEST, "model.onnx", "labels.txt", "example/input-0.bin", "example/output-0.bin"):
        assert contents[bundle_stage.ASSETS + name] == contents[name]
    kotlin = "".join(data.decode() for name, data in contents.items() if name.endswith(".kt"))
    found = re.findall(r'(?:get|opt|is)\w+\("(\w+)"|objects\(\w+, "(\w+)"', kotlin)
    keys = {key for pair in found for key in pair if key}

    def known(value: Any) -> set[str]:
        below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set(value if isinstance(value, dict) else ()).union(*map(known, below))

    assert keys <= known(made.manifest)
    assert {"inputs", "outputs", "example", "dtype", "zero_point", "tolerance", "threads"} <= keys


@pytest.mark.long
@pytest.mark.skipif(shutil.which("kotlinc") is None, reason="needs kotlinc: npm install -g kotlin-compiler, and Java")
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_kotlin_compiles_and_prepares_inputs(
    format: str, artifact: Artifact, evidence: Evidence, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Against stand-ins for Android and the runtimes: what goes in and comes out is ours, only the run is not."""
    if format == "onnx":
        made = make(artifact, evidence, tmp_path / "bundle.zip", kinds=["android"])
    else:
        write_classifier(tmp_path / "model.tflite", "int8")
        small = load_member("formats", "tflite").inspect(tmp_path / "model.tflite")
        made = make(small, evidence, tmp_path / "bundle.zip", kinds=["android"])
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path)
    stand_ins = FIXTURES / "kotlin"
    sources = [*stand_ins.glob("*.kt"), *(stand_ins / format).glob("*.kt"), *(tmp_path / "android").rglob("*.kt")]
    command = ["kotlinc", "-nowarn", "-include-runtime", "-d", "app.jar", *map(str, sources)]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr
    shutil.copy(tmp_path / "example" / "output-0.bin", tmp_path / "answer.bin")
    raw, info = np.arange(48, dtype=np.float64), made.manifest["inputs"][0]
    command = ["java", "-cp", "app.jar", "MainKt", "android/src/main/assets", ",".join(map(str, raw))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    matches, _, sent = done.stdout.splitlines()
    assert matches == "true"
    shape = (1, 3, 1, 1) if info["layout"] == "NCHW" else (1, 1, 1, 3)
    mean, std = (np.reshape(PREPROCESSING[key], shape) for key in ("mean", "std"))
    image = raw.reshape((1, 3, 4, 4) if info["layout"] == "NCHW" else (1, 4, 4, 3))
    wanted = (image * PREPROCESSING["scale"] - mean) / std
    got = np.array(sent.split(","), dtype=np.int8)
    if info["scale"] is None:
        np.testing.assert_allclose(got.view(np.float32), wanted.reshape(-1), rtol=1e-5)
    else:
        np.testing.assert_allclose(got, np.rint(wanted.reshape(-1) / info["scale"]), atol=1)
