"""ONNX through `torch.onnx.export(dynamo=True)`: one file, static shapes, state-dict names kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto

from edgeprune.core.errors import ModelError, RecordError, first_line
from edgeprune.core.records import FLOAT32, Artifact, Graph, Precision, TensorInfo
from edgeprune.core.store import compressed_bytes, sha256_file, write_atomic
from edgeprune.core.tensors import Array, Calibration, check_calibration, run_in_batches
from edgeprune.formats._onnx_choices import sink_choices
from edgeprune.formats._onnx_import import import_model as import_model
from edgeprune.formats._onnx_kernels import FX_NODE, SCOPES, all_nodes
from edgeprune.formats._onnx_metadata import embed_metadata as embed_metadata
from edgeprune.formats._onnx_opset import OLDEST, TooNew, lower_opset, standard_opset
from edgeprune.formats._onnx_quantize import (
    Quantized,
    find_ranges,
    float_operations,
    precision_of,
    quantize,
    random_calibration,
)
from edgeprune.formats._onnx_registry import tables_kept
from edgeprune.formats._onnx_resize import ExactResizer, ExportingResizer, OnnxResizer
from edgeprune.formats._units import Unresizable
from edgeprune.graphs.ports import Ports, get_ports

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = ".onnx"
PRECISIONS = (
    FLOAT32,
    Precision(dtype="float16"),
    Precision(dtype="dynamic"),
    Precision(dtype="int8", activations="uint8"),
    Precision(dtype="int8", activations="int8"),
    Precision(dtype="int8", activations="symmetric"),
)
NEWEST, EXPORTED = 20, 18
"""Opset that files have where no older one does, and the oldest that PyTorch writes by itself."""
OPSETS = range(OLDEST, NEWEST + 1)
MAX_BYTES = 2**31 - 1
"""A protobuf message cannot be larger."""
EXPORT_ERRORS = (
    torch.onnx.OnnxExporterError,  # PyTorch's own account: what it cannot capture, or an operator without an ONNX form
    RuntimeError,  # the model's code, run once with stand-ins for tensors, or a shape that depends on values
    TypeError,  # an operator's arguments, or an output, of a kind that cannot be written
    ValueError,  # inputs that do not fit the model's signature, or an attribute out of range
    NotImplementedError,  # an operator without a rule for shapes
    AssertionError,  # what the exporter or the model's own code takes for granted
)
"""What goes through from a model's code and PyTorch's exporter; all are told as one `ModelError`."""


def export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    precision: Precision = FLOAT32,
    calibration: Calibration | None = None,
    graph: Graph | None = None,
    opset: int | None = None,
) -> Artifact:
    """Write a module as one ONNX file with the static shapes of its example inputs.

    module: run in evaluation mode; left in the mode it came in. opset: 17 or newer; None: 17 where the operators allow
        it, since more boards read that, else 20.
    calibration: what int8 takes its ranges from. graph: to find `precision.float_nodes` in.
    raises: ModelError when it cannot be expressed or the opset cannot be had; DataError for calibration data that
        are missing, constant or not finite; UsageError when the file cannot be written.
    """
    if precision.dtype == "int8":
        calibration = check_calibration(calibration)
    model = to_proto(module, inputs, opset=opset)
    _rename(model, get_ports(module))
    if precision.dtype != "float32":
        exclude = float_operations(model, precision, graph)
        ranges = find_ranges(model, calibration) if precision.dtype == "int8" and calibration else {}
        model = quantize(model, precision, ranges, exclude).model
    if gates := get_ports(module).gates:
        made = sink_choices(model)
        if made < len(gates):
            raise ModelError(
                f"{len(gates) - made} of {len(gates)} gates cannot become branches, which decide for one input at a "
                "time; export with example inputs of batch 1 (--input 1x...)"
            )
    write_proto(model, path)
    return replace(_describe(path)[0], graph_sha256=None if graph is None else graph.model_sha256)


def inspect(path: Path) -> Artifact:
    """Check a file and say what it holds.

    External data must lie beside the file. raises: RecordError when it is missing, too large,
    truncated, invalid, or points outside its folder.
    """
    artifact, data_files = _describe(path)
    return replace(artifact, compressed_bytes=sum(compressed_bytes(file) for file in (path, *data_files)))


def _describe(path: Path) -> tuple[Artifact, list[Path]]:
    """As `inspect`, but for the compressed size, which takes long; and the files of external data."""
    model = _read_proto(path)
    found = {_external_location(tensor, path) for tensor in model.graph.initializer}
    data_files = [file for file in found if file is not None]
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path} is not a valid ONNX model: {first_line(error)}; export it again") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_tensor_info(value) for value in model.graph.input if value.name not in weights)
    tools = {"onnx": onnx.__version__, "torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__}
    artifact = Artifact(
        path=str(path),
        format="onnx",
        dtype=precision_of(model),
        sha256=sha256_file(path),
        bytes=sum(file.stat().st_size for file in (path, *data_files)),
        inputs=inputs,
        outputs=tuple(_tensor_info(value) for value in model.graph.output),
        tools=tools
        | {"producer": f"{model.producer_name} {model.producer_version}", "opset": str(standard_opset(model).version)},
    )
    return artifact, data_files


def run(path: Path, inputs: Sequence[Array]) -> list[Array]:
    """The file's outputs on this machine, in its order. raises: ModelError when it does not run."""
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        batch = next(iter(session.get_inputs()[0].shape), 0)

        def run_batch(arrays: list[Array]) -> list[Array]:
            return list(session.run(None, dict(zip(names, arrays, strict=True))))

        return run_in_batches(run_batch, inputs, batch if isinstance(batch, int) else 0)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelError(f"ONNX Runtime cannot run {path.name}: {first_line(error)}") from error


def make_resizer(
    module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, *, precision: Precision = FLOAT32, seed: int = 0
) -> OnnxResizer:
    """Other widths of a module from three exports of it; exact, or made by an export each.

    precision: a quantised model is made once, dense, with ranges from random inputs; at other widths it has prefixes
        of the same integers. raises: ModelError when the module cannot be exported at all.
    """

    def rewrite(model: ModelProto) -> Quantized:
        ranges = find_ranges(model, random_calibration(model, seed)) if precision.dtype == "int8" else {}
        return quantize(model, precision, ranges, float_operations(model, precision, graph))

    change = None if precision.dtype == "float32" else rewrite
    try:
        return ExactResizer(module, inputs, graph, to_proto, rewrite=change, seed=seed)
    except Unresizable as reason:
        logging.getLogger(__name__).warning("every width is exported on its own (seconds each): %s", reason)
        return ExportingResizer(module, inputs, graph, to_proto, rewrite=change)


def quantize_randomly(path: Path, out: Path, precision: Precision) -> None:
    """Write a twin of a float32 file, of int8 with ranges from random inputs. raises: ModelError."""
    model = _read_proto(path)
    ranges = find_ranges(model, random_calibration(model)) if precision.dtype == "int8" else {}
    write_proto(quantize(model, precision, ranges).model, out)


def to_proto(module: nn.Module, inputs: tuple[Tensor, ...], *, opset: int | None = None) -> ModelProto:
    """The module as an ONNX model in memory, of an opset as for `export`. raises: ModelError."""
    training = module.training
    written = NEWEST if opset is None else max(opset, EXPORTED)
    try:
        with _quiet(), tables_kept():
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, external_data=False, opset_version=written, verbose=False
            )
    except EXPORT_ERRORS as error:
        raise ModelError(f"torch.onnx cannot export the model: {first_line(error)}; rewrite that operation") from error
    finally:
        module.train(training)
    assert program is not None
    model: ModelProto = program.model_proto
    _forget_sources(model)
    if (found := standard_opset(model).version) != written:
        raise ModelError(f"the model cannot be exported at opset {written}, only at {found}; ask for opset {found}")
    try:
        lower_opset(model, OLDEST if opset is None else opset)
    except TooNew as reason:
        if opset is not None:
            raise ModelError(f"opset {opset} has no {reason}; ask for opset {written}") from reason
    return model


def _forget_sources(model: ModelProto) -> None:
    """Drop the exporter's notes but those that lead back to the graph: they hold source lines and paths."""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for node in all_nodes(model.graph):
        kept = {note.key: note.value for note in node.metadata_props if note.key in (FX_NODE, SCOPES)}
        if FX_NODE in kept:
            kept[FX_NODE] = kept[FX_NODE].partition(" ")[0]
        del node.metadata_props[:]
        for key, text in kept.items():
            node.metadata_props.add(key=key, value=text)


def _rename(model: ModelProto, ports: Ports) -> None:
    """Give inputs and outputs the names that they had in the file that the module came from."""
    graph = model.graph
    pairs = [*zip(graph.input, ports.inputs, strict=False), *zip(graph.output, ports.outputs, strict=False)]
    new = {value.name: name for value, name in pairs}
    taken = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    for name in set(new.values()) & taken - set(new):
        new[name] = f"{name}_inner"
    for node in all_nodes(graph):
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for value in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        value.name = new.get(value.name, value.name)


def write_proto(model: ModelProto, path: Path) -> None:
    """Write a model atomically. raises: ModelError over 2 GiB; UsageError when it cannot be written."""
    try:
        data = model.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise ModelError("the model would be larger than the 2 GiB of an ONNX file; split it") from error
    write_atomic(path, data)


def _read_proto(path: Path) -> ModelProto:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than the 2 GiB of an ONNX file")
        model = onnx.load_model(str(path), load_external_data=False)
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise RecordError(f"{path} is truncated or not an ONNX file; export it again") from error
    if not model.graph.node:
        raise RecordError(f"{path} is truncated or not an ONNX file: it holds no operation; export it again")
    return model


def _external_location(tensor: onnx.TensorProto, path: Path) -> Path | None:
    """The file a tensor's values lie in, or None when they are in the model. raises: RecordError."""
    location: str | None = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
    if location is None:
        return None
    file = (path.parent / location).resolve()
    if not file.is_relative_to(path.parent.resolve()) or not file.is_file():
        raise RecordError(f"{path}: the values of {tensor.name} are in {location}, which is not a file beside it")
    return file


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorInfo(name=value.name, shape=shape, dtype=dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its steps on stdout and by warnings; results belong there, not those."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
