"""What an app embeds: one zip with the model, its manifest, and examples that run it.

The zip is a pure function of its files (stored, sorted, fixed dates), so that verifying is packing
again and comparing: no altered byte, extra file or odd path goes unseen. The manifest's keys are
documented in the bundle's own README.md (`templates/bundle/README.md`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Artifact, Bundle, Plan, Report, TensorInfo
from edgeprune.core.store import sha256_bytes, sha256_file, to_builtins, write_atomic

SCHEMA = "edgeprune.bundle/1"
MANIFEST = "manifest.json"
MAX_BYTES = 2**31
"""A bundle is held in memory while it is checked; a larger one is not ours."""
EPOCH = (1980, 1, 1, 0, 0, 0)
LAYOUTS = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
EXAMPLES = ("example.py", "example.cpp", "CMakeLists.txt", "README.md")


def write_bundle(
    artifact_path: Path,
    artifact: Artifact,
    plan: Plan | None,
    report: Report,
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Bundle:
    """Zip the model with its manifest, labels, and an example in Python and in C++.

    labels: name of class i at place i, one line each.
    preprocessing: plain values that turn raw data into the first input: `scale`, `mean`, `std`
        (`(x * scale - mean) / std`, per channel), and whatever else the app has to know.
    returns: the bundle; the same arguments give the same bytes.
    raises: RecordError when the artifact is not the one in `artifact` and `report`; UsageError for
        labels or preprocessing that cannot be written, or when the folder cannot.
    """
    model = _read_artifact(artifact_path, artifact, report)
    if plan is not None and artifact.graph_sha256 not in (None, plan.graph_sha256):
        raise RecordError(f"{artifact_path} was pruned from another graph than the plan's; export it again")
    contents = {f"model{artifact_path.suffix}": model}
    if labels is not None:
        if any("\n" in label or "\r" in label for label in labels):
            raise UsageError("a label is one line of text; take the line breaks out of the labels")
        contents["labels.txt"] = "".join(f"{label}\n" for label in labels).encode()
    known = {
        "@VERSION@": version("edgeprune"),
        "@MODEL@": f"model{artifact_path.suffix}",
        "@THREADS@": str(report.conditions.threads),
    }
    for name in EXAMPLES:
        contents[name] = _template(name, known)
    contents[MANIFEST] = _json(_manifest(artifact, plan, report, contents, preprocessing or {}))
    write_atomic(path, _pack(contents))
    return _bundle(path, contents, json.loads(contents[MANIFEST]))


def verify_bundle(path: Path) -> Bundle:
    """Check every byte of a bundle.

    raises: RecordError when a file is missing, added or altered, a path leads elsewhere, or the
        zip is damaged, too large or was packed by another tool.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than {MAX_BYTES} bytes; it is not a bundle of ours")
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    contents = _unpack(data, path)
    manifest = _read_manifest(contents, path)
    for name, entry in manifest["files"].items():
        if name not in contents:
            raise RecordError(f"{path}: {name} is missing; make the bundle again")
        if sha256_bytes(contents[name]) != entry["sha256"] or len(contents[name]) != entry["bytes"]:
            raise RecordError(f"{path}: {name} was altered after the bundle was made; make it again")
    if extra := contents.keys() - manifest["files"].keys() - {MANIFEST}:
        raise RecordError(f"{path} holds files that its manifest does not name: {', '.join(sorted(extra))}")
    if contents[MANIFEST] != _json(manifest) or _pack(contents) != data:
        raise RecordError(f"{path} was altered or packed again after it was made; make the bundle again")
    return _bundle(path, contents, manifest)


def _bundle(path: Path, contents: Mapping[str, bytes], manifest: dict[str, Any]) -> Bundle:
    return Bundle(
        path=str(path), files={name: sha256_bytes(contents[name]) for name in sorted(contents)}, manifest=manifest
    )


def _read_artifact(path: Path, artifact: Artifact, report: Report) -> bytes:
    try:
        found = sha256_file(path)
        model = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}; export it again") from error
    if found != artifact.sha256:
        raise RecordError(f"{path} was altered after it was exported (sha256 differs); export it again")
    if found != report.artifact_sha256:
        raise RecordError(f"the report is of another artifact than {path}; validate this one first")
    return model


def _template(name: str, known: Mapping[str, str]) -> bytes:
    text = package_files("edgeprune").joinpath("templates", "bundle", name).read_text(encoding="utf-8")
    for mark, value in known.items():
        text = text.replace(mark, value)
    return text.encode()


def _manifest(
    artifact: Artifact,
    plan: Plan | None,
    report: Report,
    contents: Mapping[str, bytes],
    preprocessing: Mapping[str, Any],
) -> dict[str, Any]:
    def tensor(info: TensorInfo) -> dict[str, Any]:
        return {"name": info.name, "shape": list(info.shape), "dtype": info.dtype}

    evidence = to_builtins(report)
    chosen = None if plan is None else to_builtins(plan)
    return {
        "schema": SCHEMA,
        "model": next(iter(contents)),
        "format": artifact.format,
        "inputs": [tensor(info) | {"layout": LAYOUTS.get(len(info.shape))} for info in artifact.inputs],
        "outputs": [tensor(info) for info in artifact.outputs],
        "preprocessing": to_builtins(dict(preprocessing)),
        "labels": "labels.txt" if "labels.txt" in contents else None,
        "measured": {
            key: evidence[key]
            for key in ("target", "conditions", "dense", "compact", "accuracy", "numeric_error", "checks")
        }
        | {"passed": report.passed},
        "plan": chosen and {key: chosen[key] for key in ("budget", "widths", "solver", "status", "gap")},
        "provenance": {**artifact.tools, **report.provenance},
        "files": {name: {"sha256": sha256_bytes(data), "bytes": len(data)} for name, data in sorted(contents.items())},
    }


def _json(manifest: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"the manifest holds something that JSON cannot ({error}); give plain values") from error


def _pack(contents: Mapping[str, bytes]) -> bytes:
    """The one zip these files give: stored (weights do not compress), sorted, without dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, contents[name])
    return buffer.getvalue()


def _unpack(data: bytes, path: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                parts = PurePosixPath(info.filename)
                if parts.name != info.filename or info.filename in ("", ".", "..") or "\\" in info.filename:
                    raise RecordError(f"{path}: {info.filename!r} leads out of the bundle; do not unpack it")
                # Stored entries only: what is read is never more than the file's own size.
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) or info.flag_bits & 1:
                    raise RecordError(f"{path}: {info.filename} is packed in a way that we never use; make it again")
                if info.filename in contents:
                    raise RecordError(f"{path} holds {info.filename} twice; make the bundle again")
                contents[info.filename] = archive.read(info)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, OSError) as error:
        raise RecordError(f"{path} is truncated or altered ({error}); make the bundle again") from error
    return contents


def _read_manifest(contents: Mapping[str, bytes], path: Path) -> dict[str, Any]:
    if MANIFEST not in contents:
        raise RecordError(f"{path} has no {MANIFEST}; it is not a bundle of ours")
    try:
        manifest = json.loads(contents[MANIFEST])
        if manifest["schema"] != SCHEMA:
            raise RecordError(f"{path} holds {manifest['schema']}, expected {SCHEMA}")
        if not all(
            isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for entry in manifest["files"].values()
        ):
            raise TypeError("files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: {MANIFEST} was altered ({error}); make the bundle again") from error
    return dict(manifest)
