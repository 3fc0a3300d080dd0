"""An ONNX file as a module: its graph in torch calls, its weights under the names they had.

The file is walked once, with an example flowing through it. Whatever is known without the input (shapes, folded
weights, masks) is computed and becomes a number; the rest becomes a call, by one function per operator in one of the
tables here. A second example beside the first shows which axes are the batch, so that the module takes any number of
examples although the file may not. ONNX Runtime's outputs for both examples say whether the module is right.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, numpy_helper
from onnx.inliner import inline_local_functions
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgeprune.core.errors import ModelError, first_line
from edgeprune.core.tensors import Array
from edgeprune.formats._onnx_import.build import Builder, identifier
from edgeprune.formats._onnx_import.operation import Flow
from edgeprune.formats._onnx_kernels import all_nodes
from edgeprune.graphs.capture import capture
from edgeprune.graphs.lift import lift
from edgeprune.graphs.ports import Ports, dtype_names, example, set_ports

TOLERANCE = 1e-3
"""Largest difference to ONNX Runtime, relative to the largest output; a wrong operator is off by far more."""
OLDEST_OPSET = 7
"""Older files broadcast by attributes; they are converted first."""
CONVERTED_OPSET = 13
QUANTISED = re.compile(r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear\w+|\w+Integer|QAttention|QGemm")
KINDS: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
"""Of inputs."""
Run = Callable[[list[Array]], list[Array]]


@dataclass(frozen=True, slots=True)
class Imported:
    """module: takes the file's inputs in its order. fixed_because: why it takes as many examples as the file, or "".

    expected: ONNX Runtime's outputs for the first example.
    """

    module: fx.GraphModule
    fixed_because: str
    expected: list[Array]


def import_model(path: Path, shapes: Sequence[Sequence[int]] = ()) -> fx.GraphModule:
    """A trainable module that computes what an ONNX file does, for any number of examples where that can be.

    shapes: of the inputs, batch first; where none are given, those of the file, a free batch being one example.
    returns: real layers under the names of the file's weights; its ports are those of the file.
    raises: ModelError when the file is damaged, is quantised, has an operator that is not known (named, with its node),
        or a free size that the shapes do not settle; or when the module computes something else than ONNX Runtime.
    """
    model = _prepare(_read(path), path)
    inputs = _given(model)
    wanted = _shapes(inputs, shapes, path)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in inputs]
        imported = build_module(model, wanted, lambda given: session.run(None, dict(zip(names, given, strict=True))))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error
    if imported.fixed_because:
        logging.getLogger(__name__).warning(
            "%s takes %d examples at a time and no others: %s", path, wanted[0][0], imported.fixed_because
        )
    shown = tuple(_examples(inputs, wanted, seed=0))
    lifted = lift(capture(imported.module, shown)).eval()
    with torch.no_grad():
        _check(pytree.tree_leaves(lifted(*shown)), imported.expected)
    outputs = tuple(value.name for value in model.graph.output)
    set_ports(lifted, Ports(inputs=tuple(names), outputs=outputs, shapes=wanted, dtypes=dtype_names(shown)))
    return lifted


def build_module(model: ModelProto, shapes: Sequence[Sequence[int]], run: Run) -> Imported:
    """The file in torch calls.

    shapes: of the inputs, nothing free. run: the file in its own runtime, which the module is held against.
    raises: ModelError naming the node that cannot be expressed, or when the module computes something else.
    """
    given = _given(model)
    examples = _examples(given, shapes, seed=0), _examples(given, shapes, seed=1)
    first, second = (run([tensor.numpy() for tensor in inputs]) for inputs in examples)
    builder, outputs = _walk(model, examples, "")
    _check([flow.now for flow in outputs], first)
    if reason := builder.fixed_because or _differs_for_two(outputs, second):
        builder, outputs = _walk(model, examples, reason)
        _check([flow.now for flow in outputs], first)
    builder.graph.output(outputs[0].node if len(outputs) == 1 else tuple(flow.node for flow in outputs))
    builder.graph.lint()
    return Imported(fx.GraphModule(builder.root, builder.graph, class_name="Imported").eval(), reason, first)


def _walk(
    model: ModelProto, examples: tuple[list[Tensor], list[Tensor]], fixed_because: str
) -> tuple[Builder, list[Flow]]:
    builder = Builder(model, _opset(model), fixed_because=fixed_because)
    builder.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    given = [value.name for value in model.graph.input if value.name not in builder.constants]
    for name, now, other in zip(given, *examples, strict=True):
        two = None if fixed_because else torch.cat([now, other])
        builder.flows[name] = Flow(builder.graph.placeholder(identifier(name)), now, two)
    outputs = [value.name for value in model.graph.output]
    with torch.no_grad():
        builder.run(list(model.graph.node), [*outputs, *given])
    if constant := [name for name in outputs if name not in builder.flows]:
        raise ModelError(f"the output '{constant[0]}' does not depend on the input")
    return builder, [builder.flows[name] for name in outputs]


def _check(outputs: list[Tensor], expected: list[Array]) -> None:
    for mine, theirs in zip(outputs, expected, strict=True):
        if (error := _apart(mine.numpy(), theirs)) > TOLERANCE:
            raise ModelError(
                f"as a module the model computes something else than ONNX Runtime (relative error {error:.1g}): one of "
                "its operators is read wrongly; please report the model"
            )


def _differs_for_two(outputs: list[Flow], second: list[Array]) -> str:
    """What is wrong with the second of two examples, or ""."""
    for flow, expected in zip(outputs, second, strict=True):
        axis = next((axis for axis, (a, b) in enumerate(zip(flow.shape, flow.two.shape, strict=True)) if a != b), None)
        if axis is None:
            return "an output does not grow with the number of examples"
        if _apart(flow.two.narrow(axis, flow.shape[axis], flow.shape[axis]).numpy(), expected) > TOLERANCE:
            return "two examples at once give other outputs than one by one"
    return ""


def _apart(mine: Array, theirs: Array) -> float:
    """Relative to the largest value; infinite for other shapes."""
    if mine.shape != theirs.shape:
        return float("inf")
    mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
    error = float(np.abs(mine - theirs).max(initial=0.0) / max(float(np.abs(theirs).max(initial=0.0)), 1e-12))
    return error if np.isfinite(error) else float("inf")


def _given(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that have no value of their own."""
    known = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in known]


def _examples(inputs: Sequence[onnx.ValueInfoProto], shapes: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = [KINDS[value.type.tensor_type.elem_type] for value in inputs]
    return [example(shape, kind, generator) for shape, kind in zip(shapes, kinds, strict=True)]


# --- the file ------------------------------------------------------------------------------------


def _read(path: Path) -> ModelProto:
    """The file with its weights, also those beside it."""
    if not path.is_file():
        raise ModelError(f"no model at {path}")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
        _check_external(model.graph, path)
        onnx.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, ValueError, onnx.checker.ValidationError, OSError) as error:
        raise ModelError(f"{path} is truncated or not an ONNX file ({first_line(error)}); export it again") from error
    if not model.graph.node:
        raise ModelError(f"{path} is truncated or not an ONNX file: it holds no operation; export it again")
    return model


def _check_external(graph: GraphProto, path: Path) -> None:
    """Refuse values that lie elsewhere than in a file beside the model."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            file = (path.parent / entry.value).resolve()
            if entry.key == "location" and not (file.is_relative_to(path.parent.resolve()) and file.is_file()):
                raise ModelError(
                    f"{path}: the values of '{tensor.name}' are in {entry.value}, which is not a file beside it; "
                    "put both into one folder"
                )


def _prepare(model: ModelProto, path: Path) -> ModelProto:
    """The model without functions of its own, in an opset that is understood."""
    if found := next((node for node in all_nodes(model.graph) if QUANTISED.fullmatch(node.op_type)), None):
        raise ModelError(
            f"{path} is quantised (it holds {found.op_type}); give the float32 model, and quantise what is pruned: "
            "--dtype int8 of `edgeprune export`"
        )
    try:
        model = inline_local_functions(model) if model.functions else model
        if _opset(model) < OLDEST_OPSET:
            model = onnx.version_converter.convert_version(model, CONVERTED_OPSET)
    except Exception as error:  # onnx raises RuntimeError, ConvertError and more of its own
        raise ModelError(
            f"{path} is of opset {_opset(model)} and cannot be converted to {CONVERTED_OPSET}: {first_line(error)}; "
            "export it again at a newer opset"
        ) from error
    return model


def _opset(model: ModelProto) -> int:
    version: int = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    return version


def _shapes(
    inputs: Sequence[onnx.ValueInfoProto], given: Sequence[Sequence[int]], path: Path
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the examples. raises: ModelError where the file is not satisfied, or says too little."""
    if given and len(given) != len(inputs):
        names = ", ".join(value.name for value in inputs)
        raise ModelError(f"{path} takes {len(inputs)} inputs ({names}), not {len(given)}; give --input for each")
    shapes = []
    for place, value in enumerate(inputs):
        tensor = value.type.tensor_type
        if tensor.elem_type not in KINDS:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            raise ModelError(
                f"{path}: the input '{value.name}' is {kind}, and models are taken in float32: give that one; "
                "what is pruned is stored in other types by --dtype of `edgeprune export`"
            )
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in tensor.shape.dim]
        shown = (
            f"'{value.name}' of shape [{', '.join(str(d.dim_value or d.dim_param or '?') for d in tensor.shape.dim)}]"
        )
        if given:
            wanted = tuple(given[place])
            fixed = [size or other for size, other in zip(sizes, wanted, strict=False)]
            free_batch = len(sizes) == len(wanted) and bool(sizes)
            if sizes and (not free_batch or [*wanted[1:]] != fixed[1:]):
                raise ModelError(f"{path}: the input {shown} cannot be {'x'.join(map(str, wanted))}")
            shapes.append((sizes[0] or 1, *wanted[1:]) if sizes else wanted)
        elif not sizes or not all(sizes[1:]):
            raise ModelError(f"{path}: the input {shown} has free sizes; say which: --input 1x3x224x224")
        else:
            shapes.append((sizes[0] or 1, *sizes[1:]))
    return tuple(shapes)
