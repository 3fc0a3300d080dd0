"""Other widths of one ONNX model, by rewriting initialisers and constants instead of exporting.

*Differential export.* Where a width enters a file cannot be read off the file: the exporter folds
batch norms into unnamed biases and shapes into unnamed integers. So the model is exported three
times, dense and as two probes with known units removed, and the files are compared number by
number. An axis follows the layout of units that turns the dense tensor into both probes; an integer
is the linear form of widths that has the right value in all three. What fits no layout and no form
is refused, so a resized model is equal to an export of the sliced module or does not exist.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from torch import Tensor, fx, nn

from edgeprune.core.branches import dropped_branches
from edgeprune.core.records import Graph, IntArray, KernelTime, Widths
from edgeprune.core.store import sha256_bytes, write_atomic
from edgeprune.core.tensors import Array
from edgeprune.formats._onnx_kernels import OnnxKernelMap, expected_kernels
from edgeprune.formats._onnx_quantize import Quantized
from edgeprune.formats._units import Evidence, Mask, UnitSpace, Unresizable, positions, same, take
from edgeprune.graphs.capture import capture
from edgeprune.graphs.slice import dropped_by, slice_captured

ToProto = Callable[[nn.Module, tuple[Tensor, ...]], ModelProto]
Rewrite = Callable[[ModelProto], Quantized]
"""Makes a quantised model of a float one."""

SHARED_BYTES = 1024
"""Float tensors above this lie in the shared weight file; smaller ones may be constants of the graph."""
ALIGNMENT = 4096
"""Offsets that every operating system can map."""


@dataclass(frozen=True)
class _Exporter:
    """True exports of a model that keeps some of its units, in float32 or as rewritten."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    graph: Graph
    to_proto: ToProto
    rewrite: Rewrite | None

    @cached_property
    def captured(self) -> fx.GraphModule:
        """The module's own capture, which takes as long as the export behind it."""
        return capture(self.module, self.inputs)

    def float_model(self, keep: Mapping[str, IntArray]) -> ModelProto:
        return self.to_proto(slice_captured(copy.deepcopy(self.captured), self.graph, keep), self.inputs)

    def __call__(self, keep: Mapping[str, IntArray]) -> ModelProto:
        model = self.float_model(keep)
        return model if self.rewrite is None else self.rewrite(model).model


class OnnxResizer(ABC):
    """What both ways of resizing share: the weight file, the kernel map."""

    def __init__(self, exported: ModelProto, graph: Graph) -> None:
        data = exported.SerializeToString()
        self.dense_sha256 = sha256_bytes(data)
        self.dense_bytes = len(data)
        self.base = _normalise(exported)
        self.graph = graph
        self._float_base = self.base

    @abstractmethod
    def resize(self, keep: Mapping[str, IntArray]) -> ModelProto:
        """The model with only the kept units of each group, self-contained."""

    @abstractmethod
    def write_weights(self, path: Path) -> None:
        """Write the dense float weights once, for the files of `write_structure`."""

    @abstractmethod
    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:
        """Write a model for timing; `weights` is the name of the shared file beside it."""

    def write_model(self, keep: Mapping[str, IntArray], path: Path) -> None:
        """Write the self-contained model of the kept units."""
        write_atomic(path, self.resize(keep).SerializeToString())

    def map_kernels(self, times: Sequence[KernelTime] | None) -> OnnxKernelMap:
        """Kernels of the dense artifact from the runtime's own names; None: as the file's structure says."""
        expected = expected_kernels(self._float_base) if times is None else times
        return OnnxKernelMap(self._float_base, self.graph, expected)

    def _first_units(self, widths: Widths) -> dict[str, IntArray]:
        return {name: np.arange(width, dtype=np.int64) for name, width in widths.items()}


class ExactResizer(OnnxResizer):
    """Rewrites one file in milliseconds; exports it where branches are dropped.

    raises: Unresizable when the probes do not explain it.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        graph: Graph,
        to_proto: ToProto,
        *,
        rewrite: Rewrite | None = None,
        seed: int = 0,
    ) -> None:
        self._export = _Exporter(module, inputs, graph, to_proto, rewrite)
        super().__init__(self._export.float_model({}), graph)
        self.space = UnitSpace(graph)
        probes = []
        for keep in self.space.probes(np.random.default_rng(seed)):
            model = _normalise(self._export.float_model(keep))
            probes.append((self.space.kept(keep), model))
        self.arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.base.graph.initializer}
        self._axes: dict[str, dict[int, IntArray]] = {}
        self._numbers: dict[str, list[IntArray | None]] = {}
        self._attributes: list[tuple[int, int, int, IntArray]] = []
        _Matcher(self, probes).match()
        if rewrite is not None:
            self._restate(rewrite(self.base))
        self._offsets = self._lay_out_weights()

    def _restate(self, quantized: Quantized) -> None:
        """What was found in the float model, said of the quantised one that was made of it."""
        axes, numbers, attributes = self._axes, self._numbers, self._attributes
        names = {node.name: place for place, node in enumerate(quantized.model.graph.node)}
        old = self.base.graph.node
        if lost := [old[node].name for node, *_ in attributes if old[node].name not in names]:
            raise Unresizable(f"{lost[0]} depends on the widths and is no longer there once quantised")
        self.base = quantized.model
        data = self.base.SerializeToString()
        self.dense_sha256, self.dense_bytes = sha256_bytes(data), len(data)
        self.arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.base.graph.initializer}
        self._axes, self._numbers = {}, {name: forms for name, forms in numbers.items() if name in self.arrays}
        for name, array in self.arrays.items():
            source, own = quantized.origins.get(name, (name, tuple(range(array.ndim))))
            layouts = axes.get(source, {})
            mine = {
                place: layouts[axis]
                for place, axis in enumerate(own[: array.ndim])
                # One scale for a whole tensor has no channels.
                if axis in layouts and len(layouts[axis]) == array.shape[place]
            }
            if mine:
                self._axes[name] = mine
        self._attributes = [
            (names[old[node].name], attribute, element, form) for node, attribute, element, form in attributes
        ]

    def resize(self, keep: Mapping[str, IntArray]) -> ModelProto:
        """See OnnxResizer."""
        if dropped_by(self.graph, keep):
            return self._export(keep)
        kept = self.space.kept(keep)
        model = self._skeleton(kept)
        for tensor in self.base.graph.initializer:
            model.graph.initializer.append(numpy_helper.from_array(self._array(tensor.name, kept), tensor.name))
        return model

    def write_weights(self, path: Path) -> None:
        """See OnnxResizer."""
        data = bytearray()
        for name, offset in self._offsets.items():
            data.extend(b"\0" * (offset - len(data)))
            data.extend(self.arrays[name].tobytes())
        write_atomic(path, bytes(data))

    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:
        """See OnnxResizer."""
        if dropped_branches(self.graph, widths):
            self.write_model(self._first_units(widths), path)
            return
        kept = self.space.kept(self._first_units(widths))
        model = self._skeleton(kept)
        for tensor in self.base.graph.initializer:
            if tensor.name in self._offsets:
                model.graph.initializer.append(self._shared(tensor, kept, weights))
            else:
                model.graph.initializer.append(numpy_helper.from_array(self._array(tensor.name, kept), tensor.name))
        write_atomic(path, model.SerializeToString())

    def _skeleton(self, kept: Mask) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(self._frame())
        for node, attribute, element, form in self._attributes:
            target = model.graph.node[node].attribute[attribute]
            if element < 0:
                target.i -= int(form[~kept].sum())
            else:
                target.ints[element] -= int(form[~kept].sum())
        return model

    def _frame(self) -> ModelProto:
        """The base without its initialisers, which would be copied for nothing."""
        if not hasattr(self, "_frame_proto"):
            self._frame_proto = ModelProto()
            self._frame_proto.CopyFrom(self.base)
            del self._frame_proto.graph.initializer[:]
        return self._frame_proto

    def _array(self, name: str, kept: Mask) -> Array:
        array = self.arrays[name]
        for axis, layout in self._axes.get(name, {}).items():
            array = take(array, axis, layout, kept)
        if name in self._numbers:
            array = array.copy()
            for position, form in enumerate(self._numbers[name]):
                if form is not None:
                    array.flat[position] -= form[~kept].sum()
        return np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis

    def _shared(self, dense: TensorProto, kept: Mask, weights: str) -> TensorProto:
        shape = list(self.arrays[dense.name].shape)
        for axis, layout in self._axes.get(dense.name, {}).items():
            shape[axis] = int(positions(layout, kept).sum())
        tensor = TensorProto(name=dense.name, data_type=dense.data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        length = int(np.prod(shape)) * self.arrays[dense.name].itemsize
        for key, value in (("location", weights), ("offset", self._offsets[dense.name]), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _lay_out_weights(self) -> dict[str, int]:
        offsets: dict[str, int] = {}
        end = 0
        for name, array in self.arrays.items():
            if (array.dtype.kind == "f" or array.dtype == np.int8) and array.nbytes > SHARED_BYTES:
                offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
                end = offsets[name] + array.nbytes
        return offsets


class ExportingResizer(OnnxResizer):
    """Exports every width on its own: seconds each, for models whose files cannot be rewritten."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        graph: Graph,
        to_proto: ToProto,
        *,
        rewrite: Rewrite | None = None,
    ) -> None:
        self._export = _Exporter(module, inputs, graph, to_proto, rewrite)
        dense = self._export.float_model({})
        super().__init__(dense if rewrite is None else rewrite(dense).model, graph)
        self._float_base = _normalise(dense)

    def resize(self, keep: Mapping[str, IntArray]) -> ModelProto:
        """See OnnxResizer."""
        return self._export(keep)

    def write_weights(self, path: Path) -> None:
        """Nothing is shared; the file is empty."""
        write_atomic(path, b"")

    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:  # noqa: ARG002 (contract)
        """The whole model, weights included."""
        self.write_model(self._first_units(widths), path)


class _Matcher:
    """Finds where widths enter the base by comparing it with the probes."""

    def __init__(self, resizer: ExactResizer, probes: list[tuple[Mask, ModelProto]]) -> None:
        self.resizer = resizer
        self.space = resizer.space
        self.evidence = Evidence(resizer.space, [kept for kept, _ in probes])
        self.models = [model for _, model in probes]
        self.weights = [{tensor.name: tensor for tensor in model.graph.initializer} for model in self.models]
        self.names: list[dict[str, str]] = [{} for _ in probes]

    def match(self) -> None:
        """Fill the resizer's axes, numbers and attributes. raises: Unresizable."""
        base = self.resizer.base.graph
        for model, names in zip(self.models, self.names, strict=True):
            if len(model.graph.node) != len(base.node) or len(model.graph.input) != len(base.input):
                raise Unresizable("the exporter writes other operations at other widths")
            names.update((ours.name, theirs.name) for ours, theirs in zip(base.input, model.graph.input, strict=True))
        for position, node in enumerate(base.node):
            self._match_node(position, node, [model.graph.node[position] for model in self.models])

    def _match_node(self, position: int, node: NodeProto, others: list[NodeProto]) -> None:
        shape = (node.op_type, node.domain, len(node.input), len(node.output), [a.name for a in node.attribute])
        for other, names in zip(others, self.names, strict=True):
            if shape != (
                other.op_type,
                other.domain,
                len(other.input),
                len(other.output),
                [a.name for a in other.attribute],
            ):
                raise Unresizable(f"{node.name}: {node.op_type} becomes {other.op_type} at other widths")
            for ours, theirs in zip(node.input, other.input, strict=True):
                if names.setdefault(ours, theirs) != theirs:
                    raise Unresizable(f"{node.name} reads another value at other widths")
            names.update(zip(node.output, other.output, strict=True))
        for name in node.input:
            if name in self.resizer.arrays:
                self._match_array(node, name)
        for index in range(len(node.attribute)):
            self._match_attribute(position, index, node, [other.attribute[index] for other in others])

    def _match_array(self, node: NodeProto, name: str) -> None:
        dense = self.resizer.arrays[name]
        probes = []
        for weights, names in zip(self.weights, self.names, strict=True):
            if names[name] not in weights:
                raise Unresizable(f"{node.name}: {name} is computed at other widths")
            probes.append(numpy_helper.to_array(weights[names[name]]))
        if any(probe.ndim != dense.ndim for probe in probes):
            raise Unresizable(f"{node.name}: {name} has another rank at other widths")
        if all(probe.shape == dense.shape for probe in probes):
            if dense.dtype.kind in "iu":
                forms = self.evidence.numbers((dense, *probes), node.name)
                if any(form is not None for form in forms):
                    self.resizer._numbers[name] = forms
            elif not all(same(dense, probe) for probe in probes):
                raise Unresizable(f"{node.name}: the values of {name} depend on the widths")
            return
        self.resizer._axes[name] = self.evidence.axes(
            dense, probes, f"{node.name}: {name}", lambda axis: self.space.layouts.get((name, axis))
        )

    def _match_attribute(self, position: int, index: int, node: NodeProto, others: list[Any]) -> None:
        values = [helper.get_attribute_value(attribute) for attribute in (node.attribute[index], *others)]
        dense = values[0]
        if isinstance(dense, int):
            if (form := self.evidence.number(values, node.name)) is not None:
                self.resizer._attributes.append((position, index, -1, form))
        elif isinstance(dense, list) and all(isinstance(value, int) for value in dense):
            if len({len(value) for value in values}) > 1:
                raise Unresizable(f"{node.name}: {node.attribute[index].name} has another length at other widths")
            for element, numbers in enumerate(zip(*values, strict=True)):
                if (form := self.evidence.number(numbers, node.name)) is not None:
                    self.resizer._attributes.append((position, index, element, form))
        elif isinstance(dense, TensorProto):
            if not all(same(numpy_helper.to_array(dense), numpy_helper.to_array(value)) for value in values[1:]):
                raise Unresizable(f"{node.name}: {node.attribute[index].name} depends on the widths")
        elif any(value != dense for value in values[1:]):
            raise Unresizable(f"{node.name}: {node.attribute[index].name} depends on the widths")


def _normalise(model: ModelProto) -> ModelProto:
    """Write what depends on widths the same way at all widths.

    Even splits are given as a number of outputs and uneven ones as sizes; equal shape constants
    are shared. Here sizes are always given and every operation has its own constants.
    """
    graph = model.graph
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = TensorProto()
            tensor.CopyFrom(numpy_helper.from_array(_constant(node), node.output[0]))
            constants[tensor.name] = tensor
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    used: dict[str, TensorProto] = {}
    for position, node in enumerate(nodes):
        if node.op_type == "Split" and len(node.input) == 1:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            sizes = np.array([shapes[name][axis].dim_value for name in node.output], np.int64)
            name = f"{node.output[0]}_sizes"
            constants[name] = numpy_helper.from_array(sizes, name)
            node.input.append(name)
            kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        for index, name in enumerate(node.input):
            if name in constants and constants[name].ByteSize() <= SHARED_BYTES and name in used:
                copy = TensorProto()
                copy.CopyFrom(constants[name])
                copy.name = f"{name}_{position}"
                node.input[index] = copy.name
                used[copy.name] = copy
            elif name in constants:
                used[name] = constants[name]
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(used.values())
    return result


def _constant(node: NodeProto) -> Array:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
