"""What a model file or a bundle holds, without running it."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.core import records
from edgeprune.core.archive import MAX_BYTES, unpack
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Inspection, Report
from edgeprune.core.store import read_bytes, read_record, sha256_file, to_builtins

FORMATS = {".onnx": "onnx", ".tflite": "tflite"}
MEASURED = ("target", "conditions", "dense", "compact", "accuracy", "numeric_error")


def inspect_file(path: Path) -> Inspection:
    """A model file's or a bundle's operations, shapes, types, sizes and MACs.

    returns: with what was measured, from the bundle's manifest or from a report.json beside the file that is of it.
    raises: RecordError when the file is damaged; UsageError for one of another kind; MissingLibrary.
    """
    if path.suffix == ".zip":
        return _inspect_bundle(path)
    if path.suffix not in FORMATS:
        raise UsageError(
            f"cannot inspect {path}: expected a model ({', '.join(FORMATS)}), a bundle (.zip) or a record (.json); "
            "for a .pt2 file: edgeprune trace"
        )
    if not path.is_file():
        raise RecordError(f"no file {path}")
    member = importlib.import_module(f"edgeprune.formats._{FORMATS[path.suffix]}_describe")
    found: Inspection = member.describe(path)
    return replace(found, measured=_measured_beside(path))


def read_any_record(path: Path) -> Any:
    """A record of whatever kind its file says. raises: RecordError."""
    try:
        name = json.loads(read_bytes(path))["schema"].removeprefix("edgeprune.").partition("/")[0]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is not an edgeprune record") from error
    kind = getattr(records, name, None)
    if not isinstance(kind, type):
        raise RecordError(f"{path} holds {name}, a record that this version does not know")
    return read_record(kind, path)


def _inspect_bundle(path: Path) -> Inspection:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than {MAX_BYTES} bytes; it is not a bundle of ours")
        contents = unpack(path.read_bytes(), str(path))
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    try:
        manifest = json.loads(contents["manifest.json"])
        name = str(manifest["model"])
        model = contents[name]
        measured = _known({"target": manifest["target"], "accuracy": manifest["accuracy"], **manifest["measured"]})
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} has no manifest.json that can be read; it is not a bundle of ours") from error
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        file = Path(folder) / PurePosixPath(name).name
        file.write_bytes(model)
        return replace(inspect_file(file), path=f"{path}:{name}", measured=measured)


def _measured_beside(path: Path) -> dict[str, Any]:
    """From the report of a run's folder, if it is of this file."""
    with suppress(RecordError):
        report = read_record(Report, path.parent / "report.json")
        if report.artifact_sha256 == sha256_file(path):
            return _known(to_builtins(report))
    return {}


def _known(evidence: Mapping[str, Any]) -> dict[str, Any]:
    return {key: evidence[key] for key in MEASURED if evidence.get(key) is not None}
