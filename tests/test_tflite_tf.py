"""A TFLite file in two interpreters: where they differ, and that TensorFlow's and LiteRT's do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeprune.core.describe import describe_cross_check
from edgeprune.core.errors import ModelError
from edgeprune.core.family import MissingLibrary

pytest.importorskip("ai_edge_litert", reason="pip install 'edgeprune[tflite]'")

from edgeprune.formats import tflite as format
from edgeprune.formats._tflite_model import operator_names, pack, read
from edgeprune.formats._tflite_tf import (
    LIMIT,
    Interpreters,
    check_agreement,
    compare,
    open_litert,
    open_tensorflow,
    relative_error,
)

FILES = sorted((Path(__file__).parent / "fixtures" / "tflite").glob("*.tflite"))
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="pip install 'edgeprune[tf]'"
)


def _inputs(path: Path, module: bool = True) -> list[np.ndarray]:
    """Random ones, as the module has them or as the file wants them."""
    rng = np.random.default_rng(0)
    shapes = [info.shape for info in format.inspect(path).inputs]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [np.moveaxis(array, -1, 1) if module and array.ndim == 4 else array for array in arrays]


class OtherFile(Interpreters):
    """LiteRT again, on another file: a library that computes something else."""

    def __init__(self, path: Path) -> None:
        litert = open_litert()
        super().__init__("Other", "1", litert._library, litert._library)
        self.path = path

    def _run(self, path: Path, inputs: list[np.ndarray], **options: object) -> object:
        return super()._run(self.path, inputs, **options)


@pytest.fixture(scope="module")
def plain() -> Path:
    return next(path for path in FILES if path.stem == "mobilenet_v2-1")


def test_the_first_operation_that_differs_is_named(plain: Path, tmp_path: Path) -> None:
    """One weight of the second depthwise convolution is another one in the other file."""
    model, _ = read(plain)
    graph, kinds = model.subgraphs[0], operator_names(model)
    place = [number for number, kind in enumerate(kinds) if kind == "DEPTHWISE_CONV_2D"][1]
    buffer = model.buffers[graph.tensors[graph.operators[place].inputs[1]].buffer]
    weights = np.frombuffer(bytes(buffer.data), np.float32).copy()
    weights[: len(weights) // 2] += 1.0
    buffer.data = weights.view(np.uint8)
    (altered := tmp_path / "altered.tflite").write_bytes(pack(model))
    found = compare(plain, _inputs(plain, module=False), open_litert(), OtherFile(altered))
    assert [operation.op for operation in found.operations] == kinds
    assert {operation.error for operation in found.operations[:place]} == {0.0}
    assert found.operations[place].error > LIMIT and found.output_error > LIMIT
    with pytest.raises(ModelError, match=f"first in DEPTHWISE_CONV_2D .*{found.operations[place].error:.2g}"):
        check_agreement(found, plain, LIMIT)
    text = describe_cross_check(found)
    assert "Other 1" in text and "DEPTHWISE_CONV_2D" in text


def test_a_library_agrees_with_itself(plain: Path) -> None:
    found = compare(plain, _inputs(plain, module=False), open_litert(), open_litert())
    assert found.output_error == 0.0 and not any(operation.error for operation in found.operations)
    check_agreement(found, plain, 0.0)
    count = len(found.operations)
    assert f"{count} of {count} operations give the same numbers" in describe_cross_check(found)


def test_differences() -> None:
    one = np.array([1.0, -4.0], np.float32)
    assert relative_error(one, np.array([2.0, -4.0], np.float32)) == 0.25
    assert relative_error(one, one) == 0.0
    assert relative_error(np.array([-128, 127], np.int8), np.array([127, 127], np.int8)) == 255 / 127
    same = np.array([np.nan, np.inf, 1.0], np.float32)
    assert relative_error(same, same.copy()) == 0.0
    assert relative_error(same, np.array([np.nan, 5.0, 1.0], np.float32)) == float("inf")
    assert relative_error(one, one[:1]) == float("inf")
    assert relative_error(one[:0], one[:0]) == 0.0


def test_what_cannot_be_run(plain: Path) -> None:
    with pytest.raises(ModelError, match=r"LiteRT .* cannot run mobilenet_v2-1\.tflite"):
        open_litert().outputs(plain, [np.zeros((1, 1), np.float32)])


def test_without_tensorflow(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingLibrary, match=r"edgeprune\[tf\]"):
        format.cross_check(plain, _inputs(plain))


@needs_tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tensorflow_agrees(path: Path) -> None:
    """Files of every kind that we write: no operation differs by more than rounding."""
    found = format.cross_check(path, _inputs(path))
    assert [name for name, _ in found.runtimes] == ["LiteRT", "TensorFlow"]
    assert found.runtimes[1][1] == open_tensorflow().version
    assert len(found.operations) == int(format.inspect(path).tools["operators"])
    assert max(operation.error for operation in found.operations) < 1e-5
