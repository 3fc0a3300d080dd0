"""What an app embeds: one zip with the model, its manifest, examples that run it, and a recorded run.

The zip is a pure function of its files (`core/archive.py`), so that verifying is packing again and
comparing: no altered byte, extra file or odd path goes unseen. What the manifest's keys mean is in
`templates/bundle/manifest.schema.json`, which every bundle carries.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.core.archive import MAX_BYTES, pack, unpack
from edgeprune.core.errors import AgentError, RecordError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.records import Artifact, Bundle, Check, Plan, Report, TensorInfo
from edgeprune.core.signing import Signer, read_public_key, signature_fits
from edgeprune.core.store import digest, sha256_bytes, sha256_file, to_builtins, write_atomic
from edgeprune.core.tensors import Array, encode
from edgeprune.device.targets import runtime_format

if TYPE_CHECKING:
    from edgeprune.device.session import Session

SCHEMA = "edgeprune.bundle/2"
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
LAYOUTS = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
NORMALISATION = ("scale", "mean", "std")
TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
"""Of a recorded output's largest value; numbers of 8 bits round otherwise on another processor."""
TOLERANCE_8_BITS = 5e-2
RUN_TIMEOUT_S = 600.0
KINDS: dict[str, dict[str, str]] = {
    "python": {"example.py": "example.py", "runtime.py": "{format}.py"},
    "cpp": {
        "example.cpp": "example.cpp",
        "tensor.hpp": "tensor.hpp",
        "runtime.hpp": "{format}.hpp",
        "CMakeLists.txt": "{format}.cmake",
    },
    "android": {
        "android/README.md": "android.{format}.md",
        "android/src/main/java/edgeprune/EdgepruneModel.kt": "EdgepruneModel.kt",
        "android/src/main/java/edgeprune/Runtime.kt": "{format}.kt",
    },
}
"""What is written for each kind of app: name in the bundle -> template."""
ASSETS = "android/src/main/assets/edgeprune/"
"""Where an Android app finds the model: copies, so that the folder `android` can be taken as it is."""
USAGE = {
    "python": "    python example.py [INPUT.npy]                             # numpy and {runtime}",
    "cpp": "    cmake -B build && cmake --build build && ./build/example  # {library}",
    "android": "    android/README.md                                         # an asset folder and Kotlin",
}
LIBRARIES = {"onnx": ("onnxruntime", "ONNX Runtime's C library"), "tflite": ("ai_edge_litert", "LiteRT's C library")}


def write_bundle(
    artifact_path: Path,
    artifact: Artifact,
    plan: Plan | None,
    report: Report,
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    kinds: Collection[str] = ("python", "cpp"),
    license: str | None = None,
    key: Path | None = None,
    examples: Sequence[Array] | None = None,
) -> Bundle:
    """Zip the model with its manifest, labels, a recorded run, and an example for each kind of app.

    labels: name of class i at place i, one line each.
    preprocessing: plain values that turn raw data into the first input: `scale`, `mean`, `std`
        (`(x * scale - mean) / std`, per channel), and whatever else the app has to know.
    kinds: of `KINDS`. license: SPDX identifier or expression. key: PEM file of an Ed25519 private key to sign with.
    examples: one array an input, as the module has them; their outputs on this machine are recorded. Noise of a
        fixed seed where not given.
    returns: the bundle; the same arguments give the same bytes.
    raises: RecordError when the artifact is not the one in `artifact` and `report`; UsageError for
        labels, preprocessing, kinds, a license or a key that cannot be, or a folder that cannot be written.
    """
    model = _read_artifact(artifact_path, artifact, report)
    if plan is not None and artifact.graph_sha256 not in (None, plan.graph_sha256):
        raise RecordError(f"{artifact_path} was pruned from another graph than the plan's; export it again")
    if unknown := sorted(set(kinds) - KINDS.keys()):
        raise UsageError(f"no bundle is made for {', '.join(unknown)}; known: {', '.join(KINDS)}")
    if license is not None and not re.fullmatch(r"\(*[A-Za-z0-9.+-]+([ ()]+[A-Za-z0-9.+-]+)*\)*", license):
        raise UsageError(f"{license!r} is no SPDX license expression, such as MIT or Apache-2.0")
    signer = None if key is None else Signer(key)
    contents = {f"model{artifact_path.suffix}": model}
    if labels is not None:
        if any("\n" in label or "\r" in label for label in labels):
            raise UsageError("a label is one line of text; take the line breaks out of the labels")
        contents["labels.txt"] = "".join(f"{label}\n" for label in labels).encode()
    example, recorded = _record_example(artifact_path, artifact, examples)
    contents |= recorded
    contents["manifest.schema.json"] = _template("manifest.schema.json", {})
    known = _substitutions(artifact, report, example, kinds, f"model{artifact_path.suffix}")
    templates = {"README.md": "README.md"}
    for kind in kinds:
        templates |= KINDS[kind]
    for name, template in templates.items():
        contents[name] = _template(template.format(format=artifact.format), known)
    if "android" in kinds:
        copied = [f"model{artifact_path.suffix}", *({"labels.txt"} & contents.keys()), *recorded]
        contents |= {ASSETS + name: contents[name] for name in copied}
    manifest = _manifest(artifact, plan, report, contents, preprocessing or {}) | {
        "example": example,
        "license": license,
        "signer": signer and signer.public,
    }
    contents[MANIFEST] = _json(manifest)
    if "android" in kinds:
        contents[ASSETS + MANIFEST] = contents[MANIFEST]
    contents[SUMS] = _sums(contents)
    if signer is not None:
        contents[SIGNATURE] = signer.sign(contents[SUMS])
    write_atomic(path, pack(contents, str(path)))
    return _bundle(path, contents, json.loads(contents[MANIFEST]))


def verify_bundle(path: Path, *, key: Path | None = None) -> Bundle:
    """Check every byte of a bundle.

    key: PEM file of the public key that it must be signed with. Without one, a signature is only held against the
        key that the bundle names itself.
    raises: RecordError when a file is missing, added or altered, a path leads elsewhere, the zip is damaged, too
        large or was packed by another tool, or the signature is missing, of another key or does not fit.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than {MAX_BYTES} bytes; it is not a bundle of ours")
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    contents = unpack(data, str(path))
    manifest = _read_manifest(contents, path)
    for name, entry in manifest["files"].items():
        if name not in contents:
            raise RecordError(f"{path}: {name} is missing; make the bundle again")
        if sha256_bytes(contents[name]) != entry["sha256"] or len(contents[name]) != entry["bytes"]:
            raise RecordError(f"{path}: {name} was altered after the bundle was made; make it again")
    if contents.get(ASSETS + MANIFEST, contents[MANIFEST]) != contents[MANIFEST]:
        raise RecordError(f"{path}: {ASSETS}{MANIFEST} was altered after the bundle was made; make it again")
    unnamed = {MANIFEST, ASSETS + MANIFEST, SUMS, SIGNATURE}
    if extra := contents.keys() - manifest["files"].keys() - unnamed:
        raise RecordError(f"{path} holds files that its manifest does not name: {', '.join(sorted(extra))}")
    if contents.get(SUMS) != _sums(contents):
        raise RecordError(f"{path}: {SUMS} is missing or was altered; make the bundle again")
    _check_signature(manifest.get("signer"), contents, path, None if key is None else read_public_key(key))
    if contents[MANIFEST] != _json(manifest) or pack(contents, str(path)) != data:
        raise RecordError(f"{path} was altered or packed again after it was made; make the bundle again")
    return _bundle(path, contents, manifest)


def try_bundle(path: Path, session: Session, *, key: Path | None = None) -> Check:
    """Unpack a bundle on a board in a temporary folder, run its own example there, and compare the outputs.

    returns: largest difference from the recorded outputs, relative to their largest value, against the limit that the
        bundle states; what the example printed is the note.
    raises: as `verify_bundle`; UsageError when the bundle has no Python example, or the session's runtime
        does not run its model; AgentError when the example fails there.
    """
    bundle = verify_bundle(path, key=key)
    manifest, target = bundle.manifest, session.target
    if runtime_format(target.runtime) != manifest["format"]:
        raise UsageError(f"{path} holds {manifest['format']}, which {target.runtime} on {target.name} does not run")
    if "example.py" not in bundle.files:
        raise UsageError(f"{path} has no Python example to run on {target.name}; make it --for python as well")
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        folder, outputs = Path(scratch) / "bundle", Path(scratch) / "outputs.npz"
        for name, data in unpack(path.read_bytes(), str(path)).items():
            if not name.startswith("android/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        done = session.try_program(folder, ["example.py", "--save", outputs.name], outputs, timeout=RUN_TIMEOUT_S)
        said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        if not outputs.exists():
            raise AgentError(f"target {target.name}: the bundle's example failed there: {said[-500:]}")
        with np.load(outputs, allow_pickle=False) as arrays:
            got = [arrays[f"arr_{place}"] for place in range(len(arrays.files))]
        recorded = [
            np.fromfile(folder / entry["file"], dtype=entry["dtype"]).reshape(entry["shape"])
            for entry in manifest["example"]["outputs"]
        ]
    if [(a.shape, a.dtype) for a in got] != [(a.shape, a.dtype) for a in recorded]:
        raise AgentError(f"target {target.name}: the example gave other shapes or types than were recorded: {said}")
    error = max(_difference(mine, theirs) for mine, theirs in zip(got, recorded, strict=True))
    limit = manifest["example"]["tolerance"]
    return Check(
        name=f"recorded example on {target.name}", predicted=None, measured=error, limit=limit, unit="relative",
        passed=error <= limit, note=said,
    )  # fmt: skip


def _difference(got: Array, recorded: Array) -> float:
    mine, theirs = got.astype(np.float64), recorded.astype(np.float64)
    difference = np.abs(mine - theirs).max(initial=0.0)
    return float(difference / max(np.abs(theirs).max(initial=0.0), 1e-12)) if np.isfinite(mine).all() else float("inf")


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


def _record_example(
    path: Path, artifact: Artifact, examples: Sequence[Array] | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Inputs and what the model makes of them on this machine: entries of the manifest, and raw little-endian files."""
    given = _noise(artifact.inputs) if examples is None else list(examples)
    if len(given) != len(artifact.inputs):
        raise UsageError(f"{len(given)} example inputs for a model that takes {len(artifact.inputs)}")
    outputs = load_member("formats", artifact.format).run(path, given)
    entries: dict[str, Any] = {"tolerance": TOLERANCE.get(artifact.dtype, TOLERANCE_8_BITS)}
    recorded: dict[str, bytes] = {}
    for kind, infos, arrays in (("input", artifact.inputs, given), ("output", artifact.outputs, outputs)):
        entries[f"{kind}s"] = []
        for place, (info, array) in enumerate(zip(infos, arrays, strict=True)):
            stored, name = encode(array, info), f"example/{kind}-{place}.bin"
            recorded[name] = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
            entry = {"file": name, "name": info.name, "shape": list(stored.shape), "dtype": info.dtype}
            entries[f"{kind}s"].append(entry)
    return entries, recorded


def _noise(infos: Sequence[TensorInfo]) -> list[Array]:
    """Normal noise, zeros for whole numbers (which may be indices), in the layout of the module."""
    generator = np.random.default_rng(0)
    made: list[Array] = []
    for info in infos:
        shape = [max(size, 1) for size in info.shape]
        if info.layout.endswith("C") and len(shape) > 2:
            shape.insert(1, shape.pop())
        whole = np.dtype(info.dtype).kind != "f" and info.scale is None
        made.append(np.zeros(shape, info.dtype) if whole else generator.standard_normal(shape).astype(np.float32))
    return made


def _substitutions(
    artifact: Artifact, report: Report, example: Mapping[str, Any], kinds: Collection[str], model: str
) -> dict[str, str]:
    """What the marks in the templates stand for."""
    runtime, library = LIBRARIES[artifact.format]

    def tensors(infos: Sequence[TensorInfo], entries: Sequence[Mapping[str, Any]]) -> str:
        rows = []
        for info, entry in zip(infos, entries, strict=True):
            shape = ", ".join(map(str, entry["shape"]))
            scale, zero_point = 1.0 if info.scale is None else info.scale, info.zero_point or 0
            name, file = json.dumps(info.name), json.dumps(entry["file"])
            rows.append(f'{{{name}, "{info.dtype}", {{{shape}}}, {scale!r}, {zero_point}, {file}}},')
        return "\n    ".join(rows)

    return {
        "@VERSION@": version("edgeprune"),
        "@MODEL@": model,
        "@THREADS@": str(report.conditions.threads),
        "@TOLERANCE@": repr(example["tolerance"]),
        "@USAGE@": "\n".join(USAGE[kind].format(runtime=runtime, library=library) for kind in KINDS if kind in kinds),
        "@INPUTS@": tensors(artifact.inputs, example["inputs"]),
        "@OUTPUTS@": tensors(artifact.outputs, example["outputs"]),
    }


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
        known = {key: getattr(info, key) for key in ("name", "dtype", "scale", "zero_point")}
        return known | {"shape": list(info.shape), "layout": info.layout or None}

    steps = to_builtins(dict(preprocessing))
    normalisation = {key: steps.pop(key) for key in NORMALISATION if key in steps}
    inputs = [
        tensor(info) | {"layout": info.layout or LAYOUTS.get(len(info.shape)), "normalisation": None}
        for info in artifact.inputs
    ]
    if inputs and normalisation:
        inputs[0]["normalisation"] = normalisation
    evidence = to_builtins(report)
    chosen = None if plan is None else to_builtins(plan)
    measured = {key: evidence[key] for key in ("conditions", "dense", "compact", "numeric_error", "checks")}
    return {
        "$schema": "manifest.schema.json",
        "schema": SCHEMA,
        "model": next(iter(contents)),
        "format": artifact.format,
        "dtype": artifact.dtype,
        "inputs": inputs,
        "outputs": [tensor(info) for info in artifact.outputs],
        "preprocessing": steps,
        "labels": "labels.txt" if "labels.txt" in contents else None,
        "target": report.target,
        "measured": measured | {"passed": report.passed},
        "accuracy": evidence["accuracy"] | {"data_sha256": report.provenance.get("test_sha256")},
        "plan": chosen and {key: chosen[key] for key in ("budget", "widths", "solver", "status", "gap")},
        "provenance": {
            "artifact_sha256": artifact.sha256,
            "graph_sha256": artifact.graph_sha256,
            "plan_sha256": None if plan is None else digest(plan),
            "report_sha256": digest(report),
            "tools": {**artifact.tools, **report.provenance},
        },
        "files": {name: {"sha256": sha256_bytes(data), "bytes": len(data)} for name, data in sorted(contents.items())},
    }


def _json(manifest: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"the manifest holds something that JSON cannot ({error}); give plain values") from error


def _sums(contents: Mapping[str, bytes]) -> bytes:
    """As `sha256sum` writes them, so that `sha256sum -c SHA256SUMS` checks the unpacked bundle."""
    named = sorted(contents.keys() - {SUMS, SIGNATURE})
    return "".join(f"{sha256_bytes(contents[name])}  {name}\n" for name in named).encode()


def _check_signature(signer: Any, contents: Mapping[str, bytes], path: Path, wanted: str | None) -> None:
    signature = contents.get(SIGNATURE)
    if signer is None and signature is None:
        if wanted is not None:
            raise RecordError(f"{path} is not signed, and a key was given; sign it (bundle --sign) or do not trust it")
        return
    if wanted is not None and signer != wanted:
        raise RecordError(f"{path} is signed with the key {signer}, not with yours, {wanted}; do not trust it")
    if signature is None or not isinstance(signer, str) or not signature_fits(signer, signature, contents[SUMS]):
        raise RecordError(f"{path}: the signature is missing or does not fit the files; do not trust it")


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
