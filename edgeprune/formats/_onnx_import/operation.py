"""One node of an ONNX file, as its operator reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper
from torch import fx

from edgeprune.core.tensors import Array
from edgeprune.formats._onnx_import.batch import with_batch

if TYPE_CHECKING:
    from edgeprune.formats._onnx_import.build import Builder


class Unsupported(Exception):
    """This use of an operator is not covered; says what of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """A tensor that depends on the input, or a weight that it meets.

    node: what computes it. now: its value for the example; two: for that and another one, None once the batch is fixed.
    """

    node: fx.Node
    now: Any
    two: Any

    @property
    def shape(self) -> list[int]:
        """For the example."""
        return list(self.now.shape)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return int(self.now.ndim)

    @property
    def carries_batch(self) -> bool:
        """Whether it grows with the number of examples."""
        return self.two is not None and self.now.shape != self.two.shape


@dataclass
class Operation:
    """One node of the file, as its operator reads it."""

    builder: Builder
    node: NodeProto
    opset: int

    def __post_init__(self) -> None:
        self.kind = self.node.op_type
        self.inputs = [name for name in self.node.input if name] if self._variadic else list(self.node.input)
        self.outputs = sum(bool(name) for name in self.node.output)
        self._attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    @property
    def _variadic(self) -> bool:
        return self.kind in ("Concat", "Sum", "Max", "Min", "Mean", "Einsum")

    def attribute(self, name: str, *default: Any) -> Any:
        """An attribute, text decoded. raises: Unsupported where it is absent and has no default."""
        if name not in self._attributes:
            if not default:
                raise Unsupported(f"it lacks the attribute '{name}'")
            return default[0]
        value = self._attributes[name]
        return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, Sequence) else value

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def is_constant(self, index: int) -> bool:
        """Whether an input is known before the model runs."""
        return self.has(index) and self.inputs[index] in self.builder.constants

    def constant(self, index: int) -> Array:
        """An input that has to be known. raises: Unsupported where it is computed."""
        if not self.is_constant(index):
            raise Unsupported(f"its input {index} is computed while the model runs")
        return self.builder.constants[self.inputs[index]]

    def is_float(self, index: int) -> bool:
        """Whether an input holds floating-point numbers."""
        if self.is_constant(index):
            return bool(np.issubdtype(self.constant(index).dtype, np.floating))
        return bool(self.flow(index).now.is_floating_point())

    def integers(self, index: int, name: str) -> list[int] | None:
        """Whole numbers that are an input, or in older opsets an attribute; None where there are none."""
        if self.has(index):
            return [int(number) for number in self.constant(index).reshape(-1)]
        found = self.attribute(name, None)
        return None if found is None else [int(number) for number in found]

    def number(self, index: int, name: str) -> float | None:
        """One number that is an input or an attribute, or None."""
        if self.has(index):
            value = self.constant(index)
            return value.item() if value.size else None
        return self.attribute(name, None)  # type: ignore[no-any-return]

    def flow(self, index: int) -> Flow:
        """An input that the model computes. raises: Unsupported for a constant."""
        if not self.has(index) or self.inputs[index] not in self.builder.flows:
            raise Unsupported(f"its input {index} is a constant")
        return self.builder.flows[self.inputs[index]]

    def tensor(self, index: int) -> Flow:
        """An input as a tensor: computed, or a weight under the name that it has in the file."""
        return self.builder.weight(self.inputs[index]) if self.is_constant(index) else self.flow(index)

    def beside(self, index: int, other: Flow) -> Flow:
        """As `tensor`; a constant for one example is repeated for as many as the other tensor has."""
        tensor = self.tensor(index)
        alone = other.carries_batch and not tensor.carries_batch and other.shape[0] == tensor.shape[0] == 1
        return self.call(with_batch, tensor, other) if alone else tensor

    def operand(self, index: int) -> Flow | float:
        """As `tensor`; a single number is no tensor."""
        if self.is_constant(index) and self.constant(index).size == 1 and self.constant(index).ndim <= self._rank():
            return self.constant(index).item()  # type: ignore[no-any-return]
        return self.tensor(index)

    def _rank(self) -> int:
        return max((self.builder.flows[name].rank for name in self.inputs if name in self.builder.flows), default=0)

    def layer_weight(self, index: int, name: str, value: Array | None = None) -> Flow | None:
        """An input as a layer's parameter (`conv1` + `weight`); None where it is not given.

        value: instead of the input's own, computed from it. Computed weights are used as they are.
        """
        if not self.has(index):
            return None
        if not self.is_constant(index):
            return self.flow(index)
        return self.builder.layer_weight(
            self, self.inputs[index], name, self.constant(index) if value is None else value
        )

    def following_bias(self, size: int) -> Flow | None:
        """The constant that is added to this node's output and to nothing else, whose node then is done."""
        return self.builder.following_bias(self, size)

    def buffer(self, value: Array) -> Flow:
        """A constant that is no weight."""
        return self.builder.hold(self.builder.free_name(f"constants.{self.kind.lower()}"), value, trained=False)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Flow:
        """Append a call; it runs on the examples at once."""
        return self.builder.call(function, args, kwargs)


Result = Flow | tuple[Flow, ...]
"""Of an operator: a tuple where its node has several outputs."""
Operator = Callable[[Operation], Result]
