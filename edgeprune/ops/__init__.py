"""Operator rules: how channels pass through one ATen operator. One file per operator family.

A member holds `RULES`, a dict from the ATen name (without overload and in-place underscore) to a
`Rule`. A rule reads the call's arguments, says which channels can only be removed together, and
returns the channels of the output's axes. An *axis* is None (fixed: batch, space, tokens) or an array
of channel ids, one per position; an id that stands at several positions takes them all along.

What every rule guarantees: when the entries of a removed unit are zero in every parameter, what is
left computes the same with those positions cut out. Where a rule cannot, it freezes the channels or
raises `NoRule`, which freezes all that the call touches: an operator may cost pruning, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.core.family import list_members, load_member
from edgeprune.core.records import IntArray
from edgeprune.core.units import Units

Axis = IntArray | None
Axes = tuple[Axis, ...]
Rule = Callable[["Call"], "Axes | list[Axes]"]


class NoRule(Exception):
    """The rule does not cover this call; says why."""


class Symbolic:
    """Stands for an argument that is computed while the model runs, such as the batch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor in the graph.

    axes: channel ids per axis. parameter: its state-dict key, or None.
    masked: True where a removed unit's entries are zero in the masked model, along every axis with ids:
        parameters, and what a rule says keeps their zeros. zeros: where not, ids whose removed entries are zero all
        the same. fixed_because: why the axes without ids are fixed.
    """

    shape: tuple[int, ...]
    axes: Axes
    parameter: str | None = None
    masked: bool = False
    zeros: Axis = None
    fixed_because: str = "meets an axis of fixed size"


@dataclass(slots=True, kw_only=True)
class Call:
    """One operator call as a rule sees it.

    arguments: by schema name; tensors as `Value`, run-time integers as `Symbolic`. places: schema
    name -> position in the node's arguments. out_shapes: one per output tensor.
    option: which of several axes that could keep a unit each is to, counted from the most likely one.
    choices: set by the rule where there are several: the ids, and how many axes.
    """

    node: str
    op: str
    arguments: Mapping[str, Any]
    places: Mapping[str, int]
    out_shapes: Sequence[tuple[int, ...]]
    units: Units
    option: int = 0
    choices: tuple[IntArray, int] | None = None
    lowered: list[tuple[tuple[int, ...], IntArray]] = field(default_factory=list)
    consumed: list[tuple[str, int]] = field(default_factory=list)
    consumed_ids: list[IntArray] = field(default_factory=list)
    masked: bool = False
    """Set by a rule: removed entries of the output are zero too."""
    zeros: Axis = None
    """Set by a rule where not: ids whose removed entries are."""

    def value(self, name: str) -> Value:
        """A tensor argument. raises: NoRule where it is absent or no tensor."""
        found = self.arguments.get(name)
        if not isinstance(found, Value):
            raise NoRule(f"argument '{name}' is not a tensor")
        return found

    def optional(self, name: str) -> Value | None:
        """A tensor argument that may be None."""
        return None if self.arguments.get(name) is None else self.value(name)

    def plain(self, name: str, default: Any = None) -> Any:
        """An argument that is no tensor; the default where the schema lacks it."""
        return self.arguments.get(name, default)

    def values(self) -> list[Value]:
        """Every tensor argument in order, those in lists included."""
        found: list[Value] = []
        for argument in self.arguments.values():
            found += [v for v in (argument if isinstance(argument, list) else [argument]) if isinstance(v, Value)]
        return found

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the only output."""
        return self.out_shapes[0]

    def tie(self, left: Axis, right: Axis, because: str = "meets an axis of fixed size") -> Axis:
        """Say that two axes of one size go together position by position; a fixed one freezes the other."""
        if left is None or right is None:
            present = right if left is None else left
            self.freeze(present, because)
            return present
        if left.shape != right.shape:
            raise NoRule(f"axes of {len(left)} and {len(right)} positions meet")
        self.units.union(left, right)
        return left

    def freeze(self, axis: Axis, because: str) -> None:
        """Keep all units of an axis."""
        if axis is not None:
            self.units.freeze(axis, f"{because} at '{self.node}'")

    def mark_inexact(self, axis: Axis, because: str) -> None:
        """Say that the operator mixes an axis' channels in its statistics."""
        if axis is not None:
            self.units.mark_inexact(axis, f"{because} at '{self.node}'")

    def lower(self, argument: str, ids: Axis, *item: int) -> None:
        """Say that an integer argument (or `item` of a list) counts the positions of `ids`.

        -1 counts by itself; a number computed at run time cannot be lowered, so it freezes.
        """
        if ids is None or not len(ids):
            return
        number = self.arguments.get(argument)
        for index in item:
            number = number[index] if isinstance(number, list) else None
        if number == -1:
            return
        if argument not in self.places or isinstance(number, bool) or not isinstance(number, int):
            self.freeze(ids, f"the size '{argument}' is computed at run time")
            return
        self.lowered.append(((self.places[argument], *item), ids))

    def rescale(self, ids: Axis) -> None:
        """Say that the output is a mean over `ids`, whose removed positions count as zeros."""
        if ids is not None:
            self.lowered.append(((), ids))

    def pad_statistics(self, ids: Axis) -> None:
        """Say that the operator normalises over its last axis, `ids`, whose removed positions count as zeros."""
        self.rescale(ids)

    def consume(self, ids: Axis) -> None:
        """Say that a parameter's axis takes channels in, where the parameter is not summed as it stands."""
        if ids is not None:
            self.consumed_ids.append(ids)

    def zero_along(self, value: Value, axis: int) -> bool:
        """Whether the entries of every removed unit of an axis are known to be zero."""
        ids = value.axes[axis]
        if value.masked or ids is None or value.zeros is None:
            return value.masked
        return bool(np.isin(self.units.find(ids), self.units.find(value.zeros)).all())

    def contract(self, axis: Axis, because: str, weight: Value, weight_axis: int, *, masked: bool = False) -> None:
        """Say that an axis is summed against an axis of a weight, one of which has zeros where a unit is removed.

        masked: whether the first has; parameters and what is zero as they are have anyway.
        """
        if not (masked or self.zero_along(weight, weight_axis)):
            self.freeze(axis, "is multiplied and summed")
            self.freeze(weight.axes[weight_axis], "is multiplied and summed")
        self.tie(axis, weight.axes[weight_axis], because)
        if weight.parameter is not None:
            self.consumed.append((weight.parameter, weight_axis))

    def contract_any(self, left: Value, left_axis: int, right: Value, right_axis: int) -> None:
        """Say that two axes are summed against each other, where either tensor may be the one with zeros."""
        if self.zero_along(right, right_axis) or not self.zero_along(left, left_axis):
            self.contract(left.axes[left_axis], left.fixed_because, right, right_axis)
        else:
            self.contract(right.axes[right_axis], right.fixed_because, left, left_axis)

    def product_masked(self, axes: Axes, *factors: tuple[Value, Axes]) -> bool:
        """Whether a product is zero where a unit is removed: along every axis with ids some factor is.

        factors: each with its axes in the order of the product's, aligned at the last.
        """
        return all(
            any(value.masked and len(own) >= back and own[-back] is not None for value, own in factors)
            for back in range(1, len(axes) + 1)
            if axes[-back] is not None
        )

    def tie_parts(self, ids: Axis, parts: int) -> Axis:
        """Tie the same positions of `parts` equal parts, and return the ids of the first part."""
        if ids is None:
            return None
        columns = ids.reshape(parts, -1)
        self.units.union(columns[1:], columns[:1])
        first: IntArray = columns[0]
        return first

    def tie_blocks(self, ids: Axis, blocks: int) -> Axis:
        """Tie all positions within each of `blocks` equal blocks, and return one id per block."""
        if ids is None:
            return None
        rows = ids.reshape(blocks, -1)
        self.units.union(rows[:, 1:], rows[:, :1])
        first: IntArray = rows[:, 0]
        return first


def load_rules() -> dict[str, Rule]:
    """The rules of every member by ATen name. raises: ValueError where two members claim a name."""
    rules: dict[str, Rule] = {}
    for member in list_members("ops"):
        for name, rule in load_member("ops", member).RULES.items():
            if name in rules:
                raise ValueError(f"two rules for '{name}', one of them in ops/{member}.py")
            rules[name] = rule
    return rules


def repeated(axis: Axis, times: int) -> Axis:
    """Each position `times` times in place (a b -> a a b b)."""
    return None if axis is None else np.repeat(axis, times)
