"""TFLite files that store 1x1 convolutions without their zeros: the same outputs from fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ai_edge_litert", reason="TFLite files need edgeprune[tflite]")

from tflite_files import write_classifier

from edgeprune.core.errors import UsageError
from edgeprune.export import export_model
from edgeprune.formats import tflite
from edgeprune.formats._tflite_describe import describe
from edgeprune.formats._tflite_model import constant, operator_names, read
from edgeprune.formats._tflite_sparse import encode_sparse


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("channels", [6, 300, 40_000])  # offsets of 8, 16 and 32 bits
def test_outputs_are_the_same_to_the_last_bit(dtype: str, channels: int, tmp_path: Path) -> None:
    path, sparse = tmp_path / "dense.tflite", tmp_path / "sparse.tflite"
    for file in (path, sparse):
        write_classifier(file, dtype, kernel=1, channels=channels, zeros=0.8)
    assert encode_sparse(sparse) == 1
    x = np.random.default_rng(1).standard_normal((3, 3, 4, 4)).astype(np.float32)
    (mine,), (theirs,) = tflite.run(sparse, [x]), tflite.run(path, [x])
    assert np.array_equal(mine, theirs) and np.ptp(mine) > 0
    model, _ = read(sparse)
    assert operator_names(model)[0] == "DENSIFY"
    before, after = (tflite.inspect(file) for file in (path, sparse))
    assert (before.inputs, before.outputs, before.dtype) == (after.inputs, after.outputs, after.dtype)
    if channels == 40_000 and dtype == "float32":
        assert after.bytes < before.bytes - 4 * 3 * channels * 0.4
    assert describe(sparse).macs == describe(path).macs


def test_what_is_stored_is_what_is_not_zero(tmp_path: Path) -> None:
    path, sparse = tmp_path / "dense.tflite", tmp_path / "sparse.tflite"
    for file in (path, sparse):
        write_classifier(file, kernel=1, channels=64, zeros=0.7)
    encode_sparse(sparse)
    (dense, _), (encoded, _) = read(path), read(sparse)
    values = constant(dense, dense.subgraphs[0].tensors[dense.subgraphs[0].operators[0].inputs[1]])
    assert values is not None
    operator = encoded.subgraphs[0].operators[0]
    tensor = encoded.subgraphs[0].tensors[operator.inputs[0]]
    stored = np.frombuffer(bytes(encoded.buffers[tensor.buffer].data), np.float32)
    rows = tensor.sparsity.dimMetadata[-1]
    offsets, columns = np.asarray(rows.arraySegments.values), np.asarray(rows.arrayIndices.values)
    again = np.zeros((64, 3), np.float32)
    for row in range(64):
        span = slice(offsets[row], offsets[row + 1])
        again[row, columns[span]] = stored[span]
    assert np.array_equal(again.reshape(values.shape), values) and np.count_nonzero(stored) == stored.size
    assert constant(encoded, tensor) is None, "its bytes are not its values"


@pytest.mark.parametrize("options", [{"kernel": 1, "zeros": 0.2}, {"kernel": 3, "zeros": 0.9}])
def test_nothing_to_store_sparsely_is_refused_and_changes_nothing(options: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    write_classifier(path, channels=64, **options)  # type: ignore[arg-type]
    before = path.read_bytes()
    with pytest.raises(UsageError, match="no 1x1 convolution"):
        encode_sparse(path)
    assert path.read_bytes() == before


def test_a_second_time_there_is_nothing_left(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    write_classifier(path, kernel=1, channels=64, zeros=0.9)
    encode_sparse(path)
    with pytest.raises(UsageError):
        encode_sparse(path)


def test_a_format_without_it_says_so(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1))
    with pytest.raises(UsageError, match="onnx files store every zero"):
        export_model(net, (torch.zeros(1, 3, 4, 4),), tmp_path / "model.onnx", format="onnx", sparse=True)
    assert not list(tmp_path.iterdir())
