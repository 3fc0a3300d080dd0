"""Other widths of one .tflite model, by rewriting its tensors instead of converting.

As for ONNX (`_onnx_resize.py`): the model is converted dense and as probes with known units removed,
and the files are compared number by number. TFLite also stores the shape of every value, so those
follow the widths too. What fits no layout of units and no form of widths is refused.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from edgeprune.core.records import Graph, IntArray, KernelTime, Precision, Widths
from edgeprune.core.store import sha256_bytes, write_atomic
from edgeprune.core.tensors import Array
from edgeprune.formats._tflite_convert import convert
from edgeprune.formats._tflite_model import constant, indices, name_of, operator_names, pack, shape_of, unpack
from edgeprune.formats._tflite_quantize import Ranges, calibrate, quantize
from edgeprune.formats._units import Evidence, Mask, UnitSpace, Unresizable, same, take
from edgeprune.graphs.slice import dropped_by, slice_model

if TYPE_CHECKING:
    from edgeprune.formats import KernelMap

EXAMPLES = 4
"""Random inputs that ranges are taken from; which ones they are does not matter for the speed."""
SMALL_BYTES = 1024
"""Constants up to this size may be shared by chance: two operations want the same numbers at some widths."""

Forms = list[IntArray | None]


class TfliteResizer(ABC):
    """What both ways of resizing share: precision, the files, the kernel map."""

    def __init__(self, exported: bytes, inputs: tuple[Tensor, ...], graph: Graph, precision: Precision) -> None:
        self.graph = graph
        self.precision = precision
        self._ranges: Ranges | None = None
        if precision.dtype == "int8":
            self._ranges = calibrate(exported, precision, _random_inputs(inputs))
        self.dense = quantize(exported, precision, self._ranges)
        self.dense_sha256 = sha256_bytes(self.dense)
        self.dense_bytes = len(self.dense)

    @abstractmethod
    def resize(self, keep: Mapping[str, IntArray]) -> bytes:
        """The float32 model with only the kept units of each group."""

    def write_weights(self, path: Path) -> None:
        """Nothing is shared between TFLite files; the file is empty."""
        write_atomic(path, b"")

    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:  # noqa: ARG002 (contract)
        """Write a whole model of the first units of each group; nothing lies in `weights`."""
        self.write_model({name: np.arange(width, dtype=np.int64) for name, width in widths.items()}, path)

    def write_model(self, keep: Mapping[str, IntArray], path: Path) -> None:
        """Write the model of the kept units; for int8 with the dense model's ranges."""
        write_atomic(path, quantize(self.resize(keep), self.precision, self._ranges))

    def map_kernels(self, times: Sequence[KernelTime] | None) -> KernelMap:
        """Kernels of the dense artifact from the runtime's own names; None: as the file's structure says."""
        from edgeprune.formats._tflite_kernels import TfliteKernelMap

        mapped: KernelMap = TfliteKernelMap(self.dense, self.graph, times)
        return mapped


class ExactResizer(TfliteResizer):
    """Rewrites one file; converts it where branches are dropped.

    raises: Unresizable when the probes do not explain it.
    """

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, precision: Precision, *, seed: int = 0
    ) -> None:
        self._model = (module, inputs, graph)
        self.space = UnitSpace(graph)
        keeps = self.space.probes(np.random.default_rng(seed))
        dense, *probes = convert([slice_model(module, inputs, graph, keep) for keep in ({}, *keeps)], inputs)
        self.base = _unshare(unpack(dense))
        self._axes: dict[int, dict[int, IntArray]] = {}
        self._numbers: dict[int, Forms] = {}
        self._shapes: dict[int, Forms] = {}
        self._options: list[tuple[int, str, int, IntArray]] = []
        evidence = Evidence(self.space, [self.space.kept(keep) for keep in keeps])
        _Matcher(self, evidence, [_unshare(unpack(probe)) for probe in probes]).match()
        self._constants = {index: constant(self.base, tensor) for index, tensor in enumerate(_tensors(self.base))}
        super().__init__(dense, inputs, graph, precision)

    def resize(self, keep: Mapping[str, IntArray]) -> bytes:
        """See TfliteResizer."""
        if dropped_by(self.graph, keep):
            return _convert_sliced(*self._model, keep)
        kept = self.space.kept(keep)
        model = copy.copy(self.base)
        model.buffers = list(self.base.buffers)
        (graph,) = model.subgraphs = [copy.copy(self.base.subgraphs[0])]
        graph.tensors = [self._tensor(model, index, tensor, kept) for index, tensor in enumerate(graph.tensors)]
        graph.operators = list(graph.operators)
        for place, field, element, form in self._options:
            graph.operators[place] = operator = copy.copy(graph.operators[place])
            operator.builtinOptions = options = copy.copy(operator.builtinOptions)
            fall = int(form[~kept].sum())
            if element < 0:
                setattr(options, field, getattr(options, field) - fall)
            else:
                values = [int(value) for value in getattr(options, field)]
                values[element] -= fall
                setattr(options, field, values)
        return pack(model)

    def _tensor(self, model: Any, index: int, tensor: Any, kept: Mask) -> Any:
        shape, array = shape_of(tensor), self._constants[index]
        if index in self._shapes:
            shape = tuple(_fallen(shape, self._shapes[index], kept))
        if array is not None and (index in self._axes or index in self._numbers):
            for axis, layout in self._axes.get(index, {}).items():
                array = take(array, axis, layout, kept)
            if index in self._numbers:
                values = _fallen(array.ravel().tolist(), self._numbers[index], kept)
                array = np.array(values, array.dtype).reshape(array.shape)
            shape = array.shape
            buffer = copy.copy(model.buffers[tensor.buffer])
            buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
            model.buffers[tensor.buffer] = buffer
        if shape == shape_of(tensor):
            return tensor
        changed = copy.copy(tensor)
        changed.shape = np.array(shape, np.int32)
        return changed


class ExportingResizer(TfliteResizer):
    """Converts every width on its own: half a minute each, for models whose files cannot be rewritten."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, precision: Precision) -> None:
        self._model = (module, inputs, graph)
        super().__init__(self.resize({}), inputs, graph, precision)

    def resize(self, keep: Mapping[str, IntArray]) -> bytes:
        """See TfliteResizer."""
        return _convert_sliced(*self._model, keep)


def _convert_sliced(module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, keep: Mapping[str, IntArray]) -> bytes:
    return convert([slice_model(module, inputs, graph, keep)], inputs)[0]


class _Matcher:
    """Finds where widths enter the base by comparing it with the probes."""

    def __init__(self, resizer: ExactResizer, evidence: Evidence, probes: list[Any]) -> None:
        self.resizer = resizer
        self.evidence = evidence
        self.models = [resizer.base, *probes]
        self.same_as: list[dict[int, int]] = [{-1: -1} for _ in probes]

    def match(self) -> None:
        """Fill the resizer's axes, numbers, shapes and options. raises: Unresizable."""
        if any(len(model.subgraphs) != 1 for model in self.models):
            raise Unresizable("the model holds branches or loops")
        names = [operator_names(model) for model in self.models]
        if any(other != names[0] for other in names[1:]):
            raise Unresizable("the converter writes other operations at other widths")
        self._pair([model.subgraphs[0].inputs for model in self.models], "the model")
        operators = [model.subgraphs[0].operators for model in self.models]
        for place, (name, *same_place) in enumerate(zip(names[0], *operators, strict=True)):
            self._pair([operator.inputs for operator in same_place], name)
            self._pair([operator.outputs for operator in same_place], name)
            self._match_options(place, [operator.builtinOptions for operator in same_place], name)
            if any(operator.builtinOptions2 is not None for operator in same_place):
                raise Unresizable(f"{name} has options of a kind that is not known")
        for index, tensor in enumerate(_tensors(self.models[0])):
            if all(index in pairs for pairs in self.same_as):
                pairs = [pairs[index] for pairs in self.same_as]
                self._match_tensor(index, [index, *pairs], name_of(tensor))

    def _pair(self, lists: Sequence[Any], where: str) -> None:
        ours, *others = [indices(given) for given in lists]
        for theirs, pairs in zip(others, self.same_as, strict=True):
            if len(theirs) != len(ours):
                raise Unresizable(f"{where} reads other values at other widths")
            for mine, their in zip(ours, theirs, strict=True):
                if pairs.setdefault(mine, their) != their:
                    raise Unresizable(f"{where} reads another value at other widths")

    def _match_tensor(self, index: int, places: list[int], where: str) -> None:
        tensors = [_tensors(model)[place] for model, place in zip(self.models, places, strict=True)]
        shapes = [shape_of(tensor) for tensor in tensors]
        if len({(tensor.type, len(shape)) for tensor, shape in zip(tensors, shapes, strict=True)}) > 1:
            raise Unresizable(f"{where} has another rank or type at other widths")
        arrays = [constant(model, tensor) for model, tensor in zip(self.models, tensors, strict=True)]
        known = [array for array in arrays if array is not None]
        if not known:
            self._keep(self.resizer._shapes, index, [np.array(shape) for shape in shapes], where)
        elif len(known) < len(arrays):
            raise Unresizable(f"{where} is computed at some widths and constant at others")
        elif len(set(shapes)) > 1:
            self.resizer._axes[index] = self.evidence.axes(known[0], known[1:], where)
        elif known[0].dtype.kind in "iu":
            self._keep(self.resizer._numbers, index, known, where)
        elif not all(same(known[0], other) for other in known[1:]):
            raise Unresizable(f"the values of {where} depend on the widths")

    def _keep(self, found: dict[int, Forms], index: int, arrays: list[Array], where: str) -> None:
        forms = self.evidence.numbers(arrays, where)
        if any(form is not None for form in forms):
            found[index] = forms

    def _match_options(self, place: int, options: list[Any], where: str) -> None:
        if len({type(option) for option in options}) > 1:
            raise Unresizable(f"{where} has other options at other widths")
        for field in vars(options[0]) if options[0] is not None else ():
            values = [getattr(option, field) for option in options]
            if isinstance(values[0], int) and not isinstance(values[0], bool):
                if (form := self.evidence.number(values, where)) is not None:
                    self.resizer._options.append((place, field, -1, form))
            elif isinstance(values[0], list | np.ndarray):
                if len({len(value) for value in values}) > 1:
                    raise Unresizable(f"{field} of {where} has another length at other widths")
                forms = self.evidence.numbers([np.asarray(value) for value in values], where)
                self.resizer._options.extend(
                    (place, field, element, form) for element, form in enumerate(forms) if form is not None
                )
            elif any(vars_of(value) != vars_of(values[0]) for value in values[1:]):
                raise Unresizable(f"{field} of {where} depends on the widths")


def vars_of(value: Any) -> Any:
    """An options object as something to compare."""
    return vars(value) if hasattr(value, "__dict__") else value


def _fallen(values: Sequence[int], forms: Forms, kept: Mask) -> list[int]:
    return [
        value if form is None else value - int(form[~kept].sum()) for value, form in zip(values, forms, strict=True)
    ]


def _tensors(model: Any) -> Any:
    return model.subgraphs[0].tensors


def _unshare(model: Any) -> Any:
    """Every use of a small constant becomes a tensor and a buffer of its own.

    The converter writes equal constants once, and which are equal depends on the widths.
    """
    used: set[int] = set()
    buffers: set[int] = set()
    graph = model.subgraphs[0]
    for operator in graph.operators:
        inputs = indices(operator.inputs)
        for place, index in enumerate(inputs):
            data = None if index < 0 else model.buffers[graph.tensors[index].buffer].data
            if data is None or not len(data):
                continue
            if index in used and len(data) <= SMALL_BYTES:
                tensor = copy.copy(graph.tensors[index])
                tensor.name = f"{name_of(tensor)}#{len(graph.tensors)}".encode()
                inputs[place] = len(graph.tensors)
                graph.tensors.append(tensor)
            tensor = graph.tensors[inputs[place]]
            if tensor.buffer in buffers and inputs[place] not in used:
                model.buffers.append(copy.copy(model.buffers[tensor.buffer]))
                tensor.buffer = len(model.buffers) - 1
            used.add(inputs[place])
            buffers.add(tensor.buffer)
        operator.inputs = inputs
    return model


def _random_inputs(inputs: tuple[Tensor, ...]) -> list[tuple[Array, ...]]:
    rng = np.random.default_rng(0)
    # Integers stay: others could lie outside the table that they index.
    return [
        tuple(
            rng.standard_normal(x.shape).astype(np.float32) if x.is_floating_point() else x.numpy(force=True)
            for x in inputs
        )
        for _ in range(EXAMPLES)
    ]
