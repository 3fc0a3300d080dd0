"""Metadata inside a TFLite file, where apps look for them: entry `TFLITE_METADATA`, labels in a zip at the end.

source of the tables' places: TensorFlow Lite's metadata_schema.fbs, file identifier M001.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.core.archive import pack
from edgeprune.core.family import MissingLibrary
from edgeprune.core.store import write_atomic
from edgeprune.formats._tflite_model import unpack

try:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
except ModuleNotFoundError as error:
    raise MissingLibrary("TFLite files need ai_edge_litert: pip install 'edgeprune[tflite]'") from error

STANDARD, OWN, LABELS = b"TFLITE_METADATA", b"edgeprune", "labels.txt"
NORMALIZATION_OPTIONS = 1
TENSOR_AXIS_LABELS = 2


def embed_metadata(
    path: Path,
    values: Mapping[str, str],
    *,
    labels: Sequence[str] | None = None,
    normalisation: Mapping[str, Any] | None = None,
) -> None:
    """Write metadata into a file, which changes its sha256: before it is measured, never after.

    values: any; `name`, `description`, `version`, `author` and `license` have places of their own. labels: names of
        the classes. normalisation: `scale`, `mean`, `std` of raw data, for the first input.
    raises: ModelError when it is none; UsageError when it cannot be written.
    """
    model = unpack(path.read_bytes())
    graph = model.subgraphs[0]
    standard = _standard(
        values,
        [graph.tensors[place].name.decode() for place in graph.inputs],
        [graph.tensors[place].name.decode() for place in graph.outputs],
        labels is not None,
        normalisation,
    )
    model.metadata = list(model.metadata or [])
    present = {entry.name: entry for entry in model.metadata}
    for name, data in ((STANDARD, standard), (OWN, json.dumps(dict(values), sort_keys=True).encode())):
        if name not in present:
            entry = schema.MetadataT()
            entry.name, entry.buffer = name, len(model.buffers)
            model.buffers.append(schema.BufferT())
            model.metadata.append(entry)
            present[name] = entry
        model.buffers[present[name].buffer].data = np.frombuffer(data, np.uint8)
    builder = _AlignedBuilder(path.stat().st_size + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    content = bytes(builder.Output())
    if labels is not None:
        content += pack({LABELS: "".join(f"{label}\n" for label in labels).encode()}, str(path))
    write_atomic(path, content)


def read_metadata(path: Path) -> dict[str, str]:
    """The values that `embed_metadata` wrote, and the labels (`labels`, a JSON list)."""
    data = path.read_bytes()
    model = unpack(data)
    found = [model.buffers[entry.buffer].data for entry in model.metadata or [] if entry.name == OWN]
    values: dict[str, str] = json.loads(bytes(found[0])) if found else {}
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if LABELS in archive.namelist():
                values["labels"] = json.dumps(archive.read(LABELS).decode().splitlines(), ensure_ascii=False)
    return values


class _AlignedBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Tensors' bytes at multiples of 16, as the schema demands and its Python objects forget."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802
        return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)


def _standard(
    values: Mapping[str, str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    labelled: bool,
    normalisation: Mapping[str, Any] | None,
) -> bytes:
    """The flatbuffer ModelMetadata. Built from its leaves up, as flatbuffers must be."""
    builder = flatbuffers.Builder(1024)
    normalised = None
    if normalisation is not None:
        # There it is (x - mean) / std of raw values; ours scales them first.
        scale = float(normalisation.get("scale", 1.0))
        steps = (np.atleast_1d(normalisation.get(key, default)) for key, default in (("mean", 0.0), ("std", 1.0)))
        vectors = [builder.CreateNumpyVector((step / scale).astype(np.float32)) for step in steps]
        options = _table(builder, 2, {0: vectors[0], 1: vectors[1]})
        unit = _table(builder, 2, {1: options}, {0: NORMALIZATION_OPTIONS})
        normalised = _vector(builder, [unit])
    axis = None
    if labelled:
        file = _table(builder, 5, {0: builder.CreateString(LABELS)}, {2: TENSOR_AXIS_LABELS})
        axis = _vector(builder, [file])

    def tensors(names: Sequence[str], place: int, first: int | None) -> int:
        made = []
        for number, name in enumerate(names):
            own = {place: first} if number == 0 and first is not None else {}
            made.append(_table(builder, 7, {0: builder.CreateString(name), **own}))
        return _vector(builder, made)

    graph = _table(builder, 5, {2: tensors(inputs, 4, normalised), 3: tensors(outputs, 6, axis)})
    places = {"name": 0, "description": 1, "version": 2, "author": 4, "license": 5}
    texts = {place: builder.CreateString(values[key]) for key, place in places.items() if key in values}
    root = _table(builder, 8, {3: _vector(builder, [graph]), 7: builder.CreateString("1.0.0"), **texts})
    builder.Finish(root, b"M001")
    return bytes(builder.Output())


def _table(builder: Any, places: int, offsets: Mapping[int, int], codes: Mapping[int, int] | None = None) -> int:
    """A table with offsets and one-byte codes at their places."""
    builder.StartObject(places)
    for place, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(place, offset, 0)
    for place, code in (codes or {}).items():
        builder.PrependUint8Slot(place, code, 0)
    end: int = builder.EndObject()
    return end


def _vector(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    end: int = builder.EndVector()
    return end
