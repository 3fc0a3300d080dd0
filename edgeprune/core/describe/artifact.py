"""Exported files as text: in a line, against another runtime, and operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprune.core.budget import format_amount, format_bytes
from edgeprune.core.describe.text import UNKNOWN, table
from edgeprune.core.records import Artifact, CrossCheck, Inspection, TensorInfo


def describe_artifact(artifact: Artifact) -> str:
    """An exported file in one line."""
    packed = "" if artifact.compressed_bytes is None else f" ({artifact.compressed_bytes:,} compressed)"
    opset = f" opset {artifact.tools['opset']}" if "opset" in artifact.tools else ""
    return f"{artifact.format}{opset}, {artifact.bytes:,} bytes{packed}, sha256 {artifact.sha256[:12]}: {artifact.path}"


def describe_cross_check(found: CrossCheck, most: int = 5) -> str:
    """How far two runtimes are apart, and in which operations most."""
    first, second = (f"{name} {version}" for name, version in found.runtimes)
    lines = [f"{first} against {second}: outputs differ by {found.output_error:.2g} of their largest value"]
    apart = sorted((operation for operation in found.operations if operation.error), key=lambda each: -each.error)
    lines += [f"  {operation.error:.2g}  {operation.op}  {operation.name[-60:]}" for operation in apart[:most]]
    equal = len(found.operations) - len(apart)
    return "\n".join(
        [*lines, f"  plain kernels of {equal} of {len(found.operations)} operations give the same numbers"]
    )


def describe_inspection(found: Inspection, most: int = 200) -> str:
    """Operations one by one and by kind, tensors, weights, and what was measured."""
    rows = [
        (
            operation.name[-48:],
            operation.op,
            "?" if operation.shape is None else "x".join(map(str, operation.shape)),
            operation.dtype,
            "?" if operation.macs is None else f"{operation.macs:,}",
            format_bytes(operation.weight_bytes) if operation.weight_bytes else "",
        )
        for operation in found.operations[:most]
    ]
    parts = [table(("operation", "kind", "output", "type", "MACs", "weights"), rows)]
    if len(found.operations) > most:
        parts.append(f"{len(found.operations) - most} more operations")
    kinds: dict[str, list[int | None]] = {}
    for operation in found.operations:
        kinds.setdefault(operation.op, []).append(operation.macs)
    totals = [
        (kind, str(len(macs)), "?" if None in macs else f"{sum(filter(None, macs)):,}")
        for kind, macs in sorted(kinds.items(), key=lambda item: (-sum(filter(None, item[1])), item[0]))
    ]
    parts.append(table(("kind", "operations", "MACs"), totals))
    lines = [
        *(_tensor_line("input", info) for info in found.inputs),
        *(_tensor_line("output", info) for info in found.outputs),
        *(f"weights: {count:,} of {dtype}, {format_bytes(size)}" for dtype, (count, size) in found.weights.items()),
        *(f"metadata: {key} = {value}" for key, value in found.metadata.items()),
        f"{found.format}, {len(found.operations)} operations, "
        f"{UNKNOWN if found.macs is None else f'{found.macs:,}'} MACs, {format_bytes(found.bytes)}, "
        f"{UNKNOWN if found.compressed_bytes is None else format_bytes(found.compressed_bytes)} compressed, "
        f"sha256 {found.sha256}",
    ]
    return "\n\n".join([*parts, "\n".join(lines), _measured_lines(found.measured)])


def _tensor_line(kind: str, info: TensorInfo) -> str:
    shape = "x".join("?" if size < 0 else str(size) for size in info.shape)
    quantised = "" if info.scale is None else f", {info.scale:g} x (stored - {info.zero_point})"
    return f"{kind} {info.name}: {info.dtype} {shape}{' ' + info.layout if info.layout else ''}{quantised}"


def _measured_lines(measured: Mapping[str, Any]) -> str:
    """What a manifest or report tells of the model: costs against the dense model's, conditions, accuracy."""
    if not measured:
        return UNKNOWN
    rows = []
    for name in ("latency_s", "peak_memory_bytes", "artifact_bytes", "compressed_bytes", "energy_j"):
        cells = []
        for which in ("dense", "compact"):
            value = measured.get(which, {}).get(name)
            if value is None:
                cells.append(UNKNOWN)
            elif isinstance(value, dict):
                cells.append(" ".join(format_amount(name, value[key]) for key in ("median", "low", "high")))
            else:
                cells.append(format_amount(name, value))
        rows.append((name.rpartition("_")[0].replace("_", " "), *cells))
    now, accuracy = measured.get("conditions", {}), measured.get("accuracy", {})
    shown = [f"{key.replace('_', ' ')} {value:.2%}" for key, value in accuracy.items() if isinstance(value, float)]
    where = f"measured on {measured.get('target')}: {now.get('cpu') or now.get('arch')}, {now.get('runtime')} "
    where += f"{now.get('runtime_version')}, threads: {now.get('threads')}"
    lines = [table(("median, low, high", "dense", "this model"), rows), where]
    if shown:
        lines.append(f"accuracy: {', '.join(shown)}")
    return "\n".join(lines)
