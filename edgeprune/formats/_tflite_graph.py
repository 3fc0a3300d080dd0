"""The operations of a TFLite file, and the order in which an interpreter executes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgeprune.core.errors import RecordError
from edgeprune.core.family import MissingLibrary

WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "CONV_3D"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of the file; tensors are numbers of its main graph."""

    kind: str
    activation: str
    stride: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weight: tuple[int, ...] | None
    """Shape as (out, in, *window), without a window of one position."""


@dataclass(frozen=True, kw_only=True)
class TfliteGraph:
    """What of a file's main graph the kernels depend on."""

    operations: tuple[Operation, ...]
    names: tuple[str, ...]
    """Of the tensors."""
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]

    @cached_property
    def producer(self) -> dict[int, int]:
        """Tensor -> operation."""
        return {tensor: place for place, operation in enumerate(self.operations) for tensor in operation.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Tensor -> operations."""
        found: dict[int, list[int]] = {}
        for place, operation in enumerate(self.operations):
            for tensor in operation.inputs:
                found.setdefault(tensor, []).append(place)
        return found

    def before(self, place: int) -> list[int]:
        """Operations whose outputs an operation reads."""
        return [self.producer[tensor] for tensor in self.operations[place].inputs if tensor in self.producer]

    def behind(self, place: int) -> list[int]:
        """Operations that read an operation's outputs."""
        return [reader for tensor in self.operations[place].outputs for reader in self.consumers.get(tensor, ())]


def read_tflite_graph(model: bytes) -> TfliteGraph:
    """The main graph of a file. raises: RecordError; MissingLibrary."""
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ModuleNotFoundError as error:
        raise MissingLibrary("TFLite files need ai-edge-litert: pip install 'edgeprune[tflite]'") from error
    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    activations = {
        value: name for name, value in vars(schema.ActivationFunctionType).items() if not name.startswith("_")
    }
    if model[4:8] != b"TFL3":
        raise RecordError("this is no TFLite model: it does not say TFL3")
    parsed = schema.ModelT.InitFromPackedBuf(model, 0)
    graph = parsed.subgraphs[0]
    shapes = tuple(tuple(map(int, _given(tensor.shape))) for tensor in graph.tensors)

    def read(operator: Any) -> Operation:
        code = parsed.operatorCodes[operator.opcodeIndex]
        kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        options = operator.builtinOptions
        inputs = tuple(map(int, _given(operator.inputs)))
        # A transposed convolution's first input is the size of its output.
        shape = shapes[inputs[1]] if kind in WEIGHTED else None
        return Operation(
            kind=kind,
            activation=activations.get(getattr(options, "fusedActivationFunction", 0), "NONE"),
            stride=tuple(int(getattr(options, name)) for name in ("strideH", "strideW") if hasattr(options, name)),
            inputs=tuple(tensor for tensor in inputs if tensor >= 0),
            outputs=tuple(map(int, _given(operator.outputs))),
            weight=None if shape is None else _weight_shape(kind, shape),
        )

    return TfliteGraph(
        operations=tuple(map(read, _given(graph.operators))),
        names=tuple((tensor.name or b"").decode("utf-8", "replace") for tensor in graph.tensors),
        shapes=shapes,
        inputs=tuple(map(int, _given(graph.inputs))),
    )


def execution_order(file: TfliteGraph, alone: set[int]) -> list[int]:
    """Operations in the order in which an interpreter executes them that delegates all but `alone`.

    It takes what is ready of one sort as long as there is some, then of the other.
    source: TFLite's partitioning (graph_info.cc), as what runs shows it.
    """
    operations = file.operations
    order: list[int] = []
    done: set[int] = set()
    while len(order) < len(operations):
        sort: bool | None = None
        grew = True
        while grew:
            grew = False
            for place in range(len(operations)):
                if place in done or any(before not in done for before in file.before(place)):
                    continue
                sort = place in alone if sort is None else sort
                if (place in alone) == sort:
                    done.add(place)
                    order.append(place)
                    grew = True
        if sort is None:  # a cycle: no valid file has one
            order += [place for place in range(len(operations)) if place not in done]
    return order


def _weight_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "FULLY_CONNECTED":
        return shape
    if kind == "CONV_3D":
        window, into, out = shape[:3], shape[3], shape[4]
    elif kind == "DEPTHWISE_CONV_2D":
        window, into, out = shape[1:3], 1, shape[3]
    else:
        window, into, out = shape[1:-1], shape[-1], shape[0]
    return (out, into, *(length for length in window if length > 1))


def _given(values: Any) -> Any:
    return () if values is None else values
