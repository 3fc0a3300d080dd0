"""The walk over an ONNX graph that makes a module of it."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import fx, nn

from edgeprune.core.errors import ModelError, first_line
from edgeprune.core.tensors import Array
from edgeprune.formats._onnx_import import axes, contrib, elementwise, layers, recurrent, resample, shapes
from edgeprune.formats._onnx_import.batch import FixedBatch
from edgeprune.formats._onnx_import.operation import Flow, Operation, Operator, Unsupported
from edgeprune.formats._onnx_kernels import SCOPES

OPERATORS: dict[tuple[str, str], Operator] = {
    (domain, name): operator
    for domain, members in {
        "": (axes, elementwise, layers, recurrent, resample, shapes),
        "com.microsoft": (contrib,),
    }.items()
    for member in members
    for name, operator in member.OPERATORS.items()
}
"""By domain and name."""
WHY = {
    "If": ": which branch runs is computed from the input; export the branch that is wanted",
    **dict.fromkeys(
        ("Loop", "Scan"), ": how often it runs is computed; export the model with a fixed number of steps, written out"
    ),
}
WRITTEN_BY_TORCH = re.compile(r"\w+(\.\w+)+")


@dataclass
class Builder:
    """The module so far.

    constants: what is known before the model runs, by name in the file. flows: what is computed.
    fixed_because: why the module takes no other number of examples than the file, or "".
    """

    model: ModelProto
    opset: int
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Array] = field(default_factory=dict)
    flows: dict[str, Flow] = field(default_factory=dict)
    fixed_because: str = ""

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, ...], Flow] = {}
        self._layers: dict[int, str] = {}
        self._names: set[str] = set()
        self._original = {tensor.name for tensor in self.model.graph.initializer}
        self._origin: dict[str, str] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        self._done: set[int] = set()
        self._absorbed: dict[str, str] = {}

    # --- the walk ---

    def run(self, nodes: Sequence[NodeProto], kept: Iterable[str]) -> None:
        """Append the calls of nodes, in the order of execution; `kept`: what is read afterwards."""
        for node in nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        own = {name for node in nodes for name in node.output} - set(kept)
        last = {name: position for position, node in enumerate(nodes) for name in _read_by(node)}
        for position, node in enumerate(nodes):
            if id(node) not in self._done:
                self._run(node)
            for name in _read_by(node):
                if name in own and last[name] == position:
                    self.flows.pop(name, None)  # values take memory

    def _run(self, node: NodeProto) -> None:
        operation = Operation(self, node, self.opset)
        if node.op_type == "If" and operation.is_constant(0):
            self._choose(operation)
        elif all(name in self.constants for name in _read_by(node)):
            self._fold(node)
        elif node.op_type in ("Shape", "Size"):
            self._measure(operation)
        else:
            self._append(operation)

    def _append(self, operation: Operation) -> None:
        node = operation.node
        build = OPERATORS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
        if build is None:
            why = WHY.get(node.op_type, "")
            raise ModelError(f"the operator {_kind(node)} of {_label(node)} is not supported{why}")
        try:
            made = build(operation)
        except Unsupported as reason:
            raise ModelError(f"{_kind(node)} of {_label(node)} is not supported: {reason}") from reason
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ModelError(f"{_kind(node)} of {_label(node)} cannot be computed: {first_line(error)}") from error
        made = made if isinstance(made, tuple) else (made,)
        for name, flow in zip(node.output, made, strict=False):
            self.flows[name] = self.flows[self._absorbed.get(name, name)] = flow

    def _fold(self, node: NodeProto) -> None:
        """Compute a node whose inputs are all known."""
        given = {name: self.constants[name] for name in node.input if name}
        try:
            if node.op_type == "Constant":
                values: Any = [_constant(node)]
            else:
                values = ReferenceEvaluator(_alone(node, given, self.opset)).run(None, given)
        except Exception as error:  # whatever the reference implementation raises
            raise ModelError(f"{_kind(node)} of {_label(node)} cannot be computed: {first_line(error)}") from error
        for name, value in zip((name for name in node.output if name), values, strict=False):
            self.constants[name] = np.asarray(value)
            sources = [source for source in given if source in self._original or source in self._origin]
            if len(sources) >= 1 and np.asarray(value).dtype.kind == "f":
                self._origin[name] = self._origin.get(sources[0], sources[0])

    def _measure(self, operation: Operation) -> None:
        shape = np.array(operation.flow(0).shape, np.int64)
        if operation.kind == "Size":
            value = np.array(shape.prod(), np.int64)
        else:
            start, end = operation.attribute("start", 0), operation.attribute("end", None)
            value = shape[start:end]
        self.constants[operation.node.output[0]] = value

    def _choose(self, operation: Operation) -> None:
        """The branch of a condition that is known."""
        branch = operation.attribute("then_branch" if operation.constant(0).item() else "else_branch")
        self.constants |= {tensor.name: numpy_helper.to_array(tensor) for tensor in branch.initializer}
        self.run(branch.node, [value.name for value in branch.output])
        for name, value in zip(operation.node.output, branch.output, strict=True):
            if value.name in self.constants:
                self.constants[name] = self.constants[value.name]
            else:
                self.flows[name] = self.flows[value.name]

    # --- calls and tensors ---

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Flow:
        """Append a call and run it on the examples."""

        def picked(value: Any, which: Callable[[Flow], Any]) -> Any:
            if isinstance(value, Flow):
                return which(value)
            if isinstance(value, list | tuple):
                return type(value)(picked(item, which) for item in value)
            return value

        nodes = picked(args, lambda flow: flow.node), {k: picked(v, lambda flow: flow.node) for k, v in kwargs.items()}
        now = function(*picked(args, lambda flow: flow.now), **kwargs)
        two = None
        if not self.fixed_because:
            try:
                two = function(*picked(args, lambda flow: flow.two), **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError, FixedBatch) as error:
                self.fixed_because = first_line(error)
        return Flow(self.graph.call_function(function, nodes[0], nodes[1]), now, two)

    def weight(self, name: str) -> Flow:
        """A constant of the file as a tensor of the module."""
        if (name,) not in self._held:
            value, source = self.constants[name], self._origin.get(name, name)
            # A word of one part could be what an exporter calls the output of an operator.
            key = source if WRITTEN_BY_TORCH.fullmatch(source) else "weights." + re.sub(r"\W+", "_", source).strip("_")
            trained = value.dtype.kind == "f" and source in self._original and bool(np.isfinite(value).all())
            self._held[(name,)] = self.hold(self.free_name(key), value, trained=trained)
        return self._held[(name,)]

    def layer_weight(self, operation: Operation, source: str, name: str, value: Array) -> Flow:
        """A parameter of the layer that a node stands for."""
        key = (source, name, operation.kind, str(value.shape))
        if key not in self._held:
            # A weight that two calls share keeps its place; what else the second call has gets one of its own.
            if id(operation.node) not in self._layers:
                self._layers[id(operation.node)] = self._layer_path(operation, source)
            path = self._layers[id(operation.node)]
            self._held[key] = self.hold(f"{path}.{name}", value, trained=not name.startswith("running_"))
        return self._held[key]

    def following_bias(self, operation: Operation, size: int) -> Flow | None:
        """A bias that the next node adds."""
        (output,) = operation.node.output
        readers = self._readers.get(output, [])
        if len(readers) != 1 or readers[0].op_type != "Add" or output in {v.name for v in self.model.graph.output}:
            return None
        (added,) = [name for name in readers[0].input if name != output] or [""]
        value = self.constants.get(added)
        if value is None or value.size != size or value.shape[-1:] != (size,):
            return None
        self._done.add(id(readers[0]))
        bias = self.layer_weight(operation, added, "bias", value.reshape(-1))
        self._absorbed[output] = readers[0].output[0]
        return bias

    def hold(self, key: str, value: Array, *, trained: bool) -> Flow:
        """Register a tensor under a state-dict key."""
        path, _, leaf = key.rpartition(".")
        place = self.root
        for part in path.split(".") if path else ():
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        tensor = torch.from_numpy(np.array(value))
        if trained:
            place.register_parameter(leaf, nn.Parameter(tensor))
        else:
            # The state dict is for what is learnt; masks may hold infinities besides.
            place.register_buffer(leaf, tensor, persistent=leaf.startswith("running_"))
        self._names.add(key)
        return Flow(self.graph.get_attr(key), tensor, tensor)

    def free_name(self, name: str) -> str:
        """The name, or with a number behind it where it is taken."""
        parts = (name or "layer").split(".")
        name = ".".join(f"{part}_" if hasattr(nn.Module, part) else part for part in parts)
        if any(name.startswith(f"{key}.") for key in self._names):  # nothing can be inside of a tensor
            name = name.replace(".", "_")
        candidate, number = name, 1
        while any(f"{key}.".startswith(f"{candidate}.") for key in self._names):
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def _layer_path(self, operation: Operation, source: str) -> str:
        """Where a layer belongs: where its weight was, or its node."""
        origin = self._origin.get(source, source)
        if WRITTEN_BY_TORCH.fullmatch(origin):
            path = origin.rpartition(".")[0]
        else:
            path = _scope(operation.node) or re.sub(r"\W+", "_", operation.node.name or operation.kind).strip("_")
        return self.free_name(path)


def identifier(name: str) -> str:
    """A name that Python takes as an argument's."""
    plain = re.sub(r"\W", "_", name)
    return f"x{plain}" if not plain.isidentifier() or keyword.iskeyword(plain) else plain


def _alone(node: NodeProto, given: dict[str, Array], opset: int) -> ModelProto:
    """A model of one node."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in given.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in given.items()]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _constant(node: NodeProto) -> Array:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    if attribute.name in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    if attribute.name in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    raise ModelError(f"the constant of {_label(node)} is of a kind that is not supported: {attribute.name}")


def _read_by(node: NodeProto) -> set[str]:
    """Names that a node reads, in its branches too."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found |= _read_by(inner)
    return found


def _scope(node: NodeProto) -> str:
    """Path of the module that a node was written from, as torch's exporters note it, or ""."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    if SCOPES in notes:
        scopes = ast.literal_eval(notes[SCOPES])
        return str(scopes[-2]) if len(scopes) > 1 else ""
    parts, before = [], ""
    for part in node.name.strip("/").split("/")[:-1]:
        # A module in a list says its list again: /layer1/layer1.0/conv1/Conv
        parts.append(re.sub(r"\W+", "_", part.removeprefix(f"{before}.")))
        before = part
    return ".".join(parts)


def _kind(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def _label(node: NodeProto) -> str:
    return f"node '{node.name}'" if node.name else f"the node that makes '{node.output[0]}'"
