"""Metadata inside an ONNX file: `metadata_props`, where ONNX Runtime and viewers show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from edgeprune.core.store import write_atomic


def embed_metadata(
    path: Path,
    values: Mapping[str, str],
    *,
    labels: Sequence[str] | None = None,
    normalisation: Mapping[str, Any] | None = None,
) -> None:
    """Write metadata into a file, which changes its sha256: before it is measured, never after.

    values: any. labels: names of the classes. normalisation: `scale`, `mean`, `std` of raw data.
    raises: UsageError when the file cannot be written.
    """
    model = onnx.load_model(str(path), load_external_data=False)
    given = dict(values)
    if labels is not None:
        given["labels"] = json.dumps(list(labels), ensure_ascii=False)
    if normalisation is not None:
        given["normalisation"] = json.dumps(dict(normalisation), sort_keys=True)
    onnx.helper.set_model_props(model, {**_properties(model), **given})
    write_atomic(path, model.SerializeToString(deterministic=True))


def read_metadata(path: Path) -> dict[str, str]:
    """The file's metadata."""
    return _properties(onnx.load_model(str(path), load_external_data=False))


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
