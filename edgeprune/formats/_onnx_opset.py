"""Say the same in an older opset, which more boards read: TensorRT 8.5 and 8.6 know operators up to opset 17."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    defs,
    helper,
    numpy_helper,
)

from edgeprune.formats._onnx_kernels import all_nodes

OLDEST = 17
"""The first with LayerNormalization. Its files are of IR version 8, as ONNX Runtime 1.12 reads."""


class TooNew(Exception):
    """An operator, or a setting of it, that the older opset has not."""


def standard_opset(model: ModelProto) -> OperatorSetIdProto:
    """Of the standard operators: an entry that can be changed. raises: StopIteration for a model that has none."""
    found: OperatorSetIdProto = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return found


def lower_opset(model: ModelProto, opset: int = OLDEST) -> None:
    """Rewrite a model for an older opset of the standard operators, in place; it computes the same.

    opset: 17 or newer. raises: TooNew, naming the operator; then nothing has changed.
    """
    own = standard_opset(model)
    if own.version <= opset:
        return
    if model.functions:
        raise TooNew("a function of its own")
    values = _Values(model.graph)
    changes = [change for node in all_nodes(model.graph) for change in _changes(node, own.version, opset, values)]
    for change in changes:
        change()
    own.version = opset
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    _drop_unread(model.graph)


def _changes(node: NodeProto, newer: int, older: int, values: _Values) -> Iterator[Callable[[], Any]]:
    """What turns a node into what it was in the older opset. raises: TooNew."""
    if node.domain not in ("", "ai.onnx"):
        return
    new = defs.get_schema(node.op_type, newer, "")
    if new.since_version <= older:
        return
    try:
        old = defs.get_schema(node.op_type, older, "")
    except defs.SchemaError:
        raise TooNew(f"{node.op_type} ({node.name})") from None
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if value in VALUES_OF_LATER.get((node.op_type, attribute.name), ()):
            said = value.decode() if isinstance(value, bytes) else value
            raise TooNew(f"{node.op_type} ({node.name}) with {attribute.name} = {said}")
        if attribute.name in old.attributes:
            continue
        if not (_is_default(new, attribute, value) or _means_nothing(node, attribute.name, value, values)):
            raise TooNew(f"{node.op_type} ({node.name}) with {attribute.name}")
        yield partial(node.attribute.remove, attribute)
    for position in range(len(old.inputs), len(node.input)):
        name = node.input[position]
        if not name:
            continue
        axes = values.constant(name)
        if new.inputs[position].name != "axes" or "axes" not in old.attributes or axes is None:
            raise TooNew(f"{node.op_type} ({node.name}) with {new.inputs[position].name}")
        # No axes, as an input, mean all of them; as an attribute that is said by leaving it out.
        if axes:
            yield partial(node.attribute.append, helper.make_attribute("axes", axes))
    if len(node.input) > len(old.inputs):
        yield partial(node.input.__delitem__, slice(len(old.inputs), None))
    if node.op_type in ("ReduceMax", "ReduceMin") and values.kinds.get(node.input[0]) == TensorProto.BOOL:
        raise TooNew(f"{node.op_type} ({node.name}) of truth values")
    if node.op_type == "GridSample":
        yield from _sampling(node, values)


VALUES_OF_LATER: dict[tuple[str, str], tuple[bytes | int, ...]] = {
    ("AveragePool", "ceil_mode"): (1,),
    ("Pad", "mode"): (b"wrap",),
    ("Resize", "coordinate_transformation_mode"): (b"half_pixel_symmetric",),
    ("ScatterElements", "reduction"): (b"min", b"max"),
    ("ScatterND", "reduction"): (b"min", b"max"),
}
"""Of attributes that both opsets have, where they are new or mean something else."""


def _is_default(schema: Any, attribute: AttributeProto, value: Any) -> bool:
    default = schema.attributes[attribute.name].default_value
    return bool(default.type and helper.get_attribute_value(default) == value)


def _means_nothing(node: NodeProto, name: str, value: Any, values: _Values) -> bool:
    """Whether an attribute says what holds without it, there."""
    if name == "dilations":
        return all(step == 1 for step in value)
    if name == "noop_with_empty_axes":  # where there are axes
        return len(node.input) > 1 and bool(values.constant(node.input[1]))
    if node.op_type == "Split" and name == "num_outputs":  # equal parts, but for the last where it does not divide
        shapes = {values.shapes.get(output) for output in node.output}
        return len(shapes) == 1 and None not in shapes
    return False


MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}


def _sampling(node: NodeProto, values: _Values) -> Iterator[Callable[[], Any]]:
    """Of images only, and under the names of two dimensions."""
    if len(values.shapes.get(node.input[0], ())) != 4:
        raise TooNew(f"{node.op_type} ({node.name}) of what are no images")
    given = {attribute.name: attribute for attribute in node.attribute}
    if "mode" in given and given["mode"].s in MODES:
        yield partial(setattr, given["mode"], "s", MODES[given["mode"].s])


class _Values:
    """What a graph says of its values: constants, shapes, kinds."""

    def __init__(self, graph: GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in all_nodes(graph):
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        known = (*graph.value_info, *graph.input, *graph.output)
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in known}
        self.shapes = {
            value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
            for value in known
            if all(size.HasField("dim_value") for size in value.type.tensor_type.shape.dim)
        }

    def constant(self, name: str) -> list[int] | None:
        """A list of whole numbers, or None where it is no constant."""
        tensor = self._constants.get(name)
        return None if tensor is None else [int(number) for number in numpy_helper.to_array(tensor).reshape(-1)]


def _drop_unread(graph: GraphProto) -> None:
    """Constants that were read as axes alone."""
    read = {name for node in all_nodes(graph) for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    for node in [n for n in graph.node if n.op_type == "Constant" and not read & set(n.output)]:
        graph.node.remove(node)
