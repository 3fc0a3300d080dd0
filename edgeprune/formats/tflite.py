"""TFLite through litert-torch: channels last, static shapes, tensors named after the graph's nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.core.errors import ModelError, UsageError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import Artifact, CrossCheck, Graph, Precision, TensorInfo
from edgeprune.core.store import compressed_bytes, sha256_bytes, write_atomic
from edgeprune.core.tensors import Array, Calibration, check_calibration, decode, encode, run_in_batches
from edgeprune.formats._tflite_convert import convert
from edgeprune.formats._tflite_metadata import embed_metadata as embed_metadata
from edgeprune.formats._tflite_model import DTYPES, name_of, operator_names, precision_of, read, shape_of, unpack
from edgeprune.formats._tflite_quantize import calibrate, quantize
from edgeprune.formats._tflite_resize import ExactResizer, ExportingResizer, TfliteResizer
from edgeprune.formats._tflite_sparse import encode_sparse as encode_sparse
from edgeprune.formats._units import Unresizable
from edgeprune.graphs.ports import get_ports

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = ".tflite"
RANDOM_BATCHES = 2
PRECISIONS = (Precision(), Precision(dtype="float16"), Precision(dtype="dynamic"), Precision(dtype="int8"))


def export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    precision: Precision = PRECISIONS[0],
    calibration: Calibration | None = None,
    graph: Graph | None = None,
) -> Artifact:
    """Write a module as one .tflite file with the static shapes of its example inputs, images channels last.

    module: run in evaluation mode; left in the mode it came in. calibration: for int8, batches as the module has them.
    graph: the module's, to find `precision.float_nodes` in.
    raises: ModelError naming the operation and its module when it cannot be expressed, or the converter
        crashes or hangs; DataError for calibration data that are missing, constant or not finite; MissingLibrary.
    """
    if get_ports(module).gates:
        raise UsageError("the model has gates, and .tflite files no branches: nothing would be skipped; use .onnx")
    _check_precision(precision, graph)
    given = check_calibration(calibration) if precision.dtype == "int8" else ()
    (data,) = convert([module], inputs)
    _check_static(data)
    ranges = calibrate(data, precision, given) if precision.dtype == "int8" else None
    write_atomic(path, quantize(data, precision, ranges))
    return replace(_describe(path), graph_sha256=None if graph is None else graph.model_sha256)


def inspect(path: Path) -> Artifact:
    """Check a file and say what it holds; `tools` counts its operations and the transposes among them.

    Tensors of rank 4 have their channels last, as everywhere in TFLite.
    raises: RecordError when it is missing, over 2 GiB, truncated or invalid.
    """
    return replace(_describe(path), compressed_bytes=compressed_bytes(path))


def _describe(path: Path) -> Artifact:
    """As `inspect`, but for the compressed size, which takes long."""
    model, data = read(path)
    graph, operators = model.subgraphs[0], operator_names(model)
    return Artifact(
        path=str(path),
        format="tflite",
        dtype=precision_of(model),
        sha256=sha256_bytes(data),
        bytes=len(data),
        inputs=tuple(_tensor_info(graph.tensors[index]) for index in graph.inputs),
        outputs=tuple(_tensor_info(graph.tensors[index]) for index in graph.outputs),
        tools={
            **{
                name: found
                for name in ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")
                if (found := _version(name))
            },
            "producer": _text(model.description),
            "operators": str(len(operators)),
            "transposes": str(operators.count("TRANSPOSE")),
        },
    )


def run(path: Path, inputs: Sequence[Array]) -> list[Array]:
    """The file's outputs on this machine, in its order, in the module's terms. raises: ModelError; MissingLibrary."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as error:
        raise MissingLibrary(f"running a TFLite file needs {error.name}: pip install 'edgeprune[tflite]'") from error
    artifact = _describe(path)
    if len(inputs) != len(artifact.inputs):
        raise ModelError(f"{path.name} takes {len(artifact.inputs)} inputs, not {len(inputs)}")
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
        given, asked = interpreter.get_input_details(), interpreter.get_output_details()

        def run_batch(arrays: list[Array]) -> list[Array]:
            for info, place, array in zip(artifact.inputs, given, arrays, strict=True):
                interpreter.set_tensor(place["index"], encode(np.asarray(array), info))
            interpreter.invoke()
            return [
                decode(interpreter.get_tensor(place["index"]), info)
                for info, place in zip(artifact.outputs, asked, strict=True)
            ]

        return run_in_batches(run_batch, inputs, artifact.inputs[0].shape[0] if artifact.inputs[0].shape else 0)
    except (ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"LiteRT cannot run {path.name}: {reason}") from error


def cross_check(path: Path, inputs: Sequence[Array]) -> CrossCheck:
    """A file's outputs, and every operation's, in TensorFlow's interpreter held against LiteRT's.

    inputs: as the module has them; the first batch of them counts.
    raises: ModelError when the outputs differ, or one of the two cannot run it; MissingLibrary.
    """
    from edgeprune.formats._tflite_tf import (
        LIMIT,
        LIMIT_8_BITS,
        check_agreement,
        compare,
        open_litert,
        open_tensorflow,
    )

    artifact = _describe(path)
    arrays = [
        encode(np.asarray(array)[: info.shape[0]] if info.shape else np.asarray(array), info)
        for info, array in zip(artifact.inputs, inputs, strict=True)
    ]
    found = compare(path, arrays, open_litert(), open_tensorflow())
    check_agreement(found, path, LIMIT_8_BITS if artifact.dtype in ("int8", "dynamic") else LIMIT)
    return found


def quantize_randomly(path: Path, out: Path, precision: Precision) -> None:
    """Write a twin of a float32 file, of int8 with ranges from random inputs. raises: ModelError; MissingLibrary."""
    rng = np.random.default_rng(0)

    def noise(info: TensorInfo) -> Array:
        # Zeros where numbers are indices: any other could lie outside the table they index.
        values = rng.standard_normal(info.shape) if info.dtype == "float32" else np.zeros(info.shape)
        return decode(values.astype(info.dtype), info)

    needed, data = _describe(path).inputs, path.read_bytes()
    calibration = [tuple(noise(info) for info in needed) for _ in range(RANDOM_BATCHES)]
    ranges = calibrate(data, precision, calibration) if precision.dtype == "int8" else None
    write_atomic(out, quantize(data, precision, ranges))


def make_resizer(
    module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, *, precision: Precision = PRECISIONS[0], seed: int = 0
) -> TfliteResizer:
    """Other widths of a module from one round of conversions; exact, or made by a conversion each.

    For int8, ranges come from random inputs and are those of the dense model.
    raises: ModelError when the module cannot be converted at all; MissingLibrary.
    """
    _check_precision(precision, graph)
    try:
        return ExactResizer(module, inputs, graph, precision, seed=seed)
    except Unresizable as reason:
        logging.getLogger(__name__).warning("every width is converted on its own (half a minute each): %s", reason)
        return ExportingResizer(module, inputs, graph, precision)


def _check_precision(precision: Precision, graph: Graph | None) -> None:
    if precision.dtype not in {known.dtype for known in PRECISIONS} or precision.activations != "int8":
        raise UsageError(f"TFLite cannot store {precision.name}; choose float32, float16, dynamic or int8")
    if precision.float_nodes and graph is not None:
        known = {node.name for node in graph.nodes}
        if unknown := [name for name in precision.float_nodes if name not in known]:
            raise ModelError(f"the graph has no node {', '.join(unknown)} that could stay in float32")


def _check_static(data: bytes) -> None:
    for graph in unpack(data).subgraphs:
        for tensor in graph.tensors:
            if tensor.shapeSignature is not None and any(size < 0 for size in tensor.shapeSignature):
                raise ModelError(
                    f"the shape of {name_of(tensor)} depends on values, and TFLite runtimes want fixed shapes; "
                    "rewrite the operation that makes it"
                )


def _tensor_info(tensor: Any) -> TensorInfo:
    shape = shape_of(tensor)
    if tensor.shapeSignature is not None and len(tensor.shapeSignature) == len(shape):
        shape = tuple(int(size) for size in tensor.shapeSignature)
    quantized = tensor.quantization
    scaled = quantized is not None and quantized.scale is not None and len(quantized.scale) > 0
    return TensorInfo(
        name=name_of(tensor),
        shape=shape,
        dtype=DTYPES.get(tensor.type, f"type {tensor.type}"),
        layout="NHWC" if len(shape) == 4 else "",
        scale=float(quantized.scale[0]) if scaled else None,
        zero_point=int(quantized.zeroPoint[0]) if scaled else None,
    )


def _text(text: bytes | str | None) -> str:
    return (text.decode(errors="replace") if isinstance(text, bytes) else text) or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
