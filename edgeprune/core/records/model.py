"""What is pruned: parameters, nodes, and the groups of channels that go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from edgeprune.core.records.arrays import IntArray, Widths


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a model comes from.

    factory: `path.py:fn` or `pkg.mod:fn`, called without arguments; or None when `file` is given.
    file: a `.pt2` written by torch.export, or an `.onnx`.
    weights: a `.safetensors` file or a state dict that loads with `weights_only=True`.
    inputs: shapes of the example inputs, batch first.
    """

    factory: str | None = None
    file: str | None = None
    weights: str | None = None
    inputs: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How an artifact's numbers are stored and computed.

    dtype: `float32`; `float16`: weights are stored so, computed in float32; `dynamic`: weights of 8 bits, activations
        quantised as they come; `int8`: both, with ranges from calibration data.
    activations: type of the activations of int8: `int8` or `uint8`, or `symmetric`: int8 whose zero is 0, as TensorRT
        wants it.
    float_nodes: nodes of the graph that stay in float32 all the same.
    """

    dtype: str = "float32"
    activations: str = "int8"
    float_nodes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For tables, messages and file names."""
        kind = f"{self.dtype}-{self.activations}" if self.dtype == "int8" and self.activations != "int8" else self.dtype
        return f"{kind}-mixed" if self.float_nodes else kind


FLOAT32 = Precision()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The size of one tensor axis as a function of the widths: fixed + sum of count x width."""

    fixed: int = 0
    groups: tuple[tuple[str, int], ...] = ()

    def size(self, widths: Widths, units: Widths) -> int:
        """Size of the axis for `widths`; `units` gives the full width of groups not in `widths`."""
        return self.fixed + sum(count * widths.get(name, units[name]) for name, count in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter or buffer of the model: its state-dict key, dense shape and size per axis."""

    name: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    element_bytes: int = 4
    trainable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation of the exported graph.

    name: unique in the graph. path: the module it stands in ("" for the root).
    op: the ATen name without overload (`conv2d`, `add`, `flatten`; `input` for a model input).
    inputs: the nodes whose outputs it reads, in order (no parameters).
    parameters: the state-dict keys it reads, weight before bias.
    attributes: plain values (stride, padding, dilation, groups ...).
    out_shape: dense shape for the example input, batch included; () for a tuple of tensors.
    out_extents: one per axis of out_shape.
    view: True where the output shares the input's memory (flatten, view, dropout in evaluation).
    """

    name: str
    path: str
    op: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    out_shape: tuple[int, ...] = ()
    out_extents: tuple[Extent, ...] = ()
    view: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Where a group's units lie in one axis of one parameter.

    index: (units, k) positions along `axis`; row i goes when unit i is removed.
    role: "out" where the axis produces the channel, "in" where it consumes it.
    """

    parameter: str
    axis: int
    index: IntArray
    role: Literal["out", "in"] = "out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number in the graph that falls when units are removed (view sizes, split sizes, pads, groups).

    node, argument: the place, as a path into the node's arguments: (1, 2) is `args[1][2]`. An empty path: the count
        that the node's mean divides by, or its statistics are over, which is to stay as it was.
    count: (units,) by how much it falls for each removed unit.
    """

    node: str
    argument: tuple[int, ...]
    count: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that can only be removed together.

    units: how many there are. step: a width must be a multiple of it (or all units). least: fewest to keep.
    frozen_because: why it keeps every unit, or None when it may be pruned.
    inexact_because: why removing units changes more than the removed channels, or None.
    tie: groups of one tie keep as many units each, which ones is up to each.
    """

    name: str
    units: int
    step: int = 1
    least: int = 1
    members: tuple[Member, ...] = ()
    constants: tuple[Constant, ...] = ()
    frozen_because: str | None = None
    inexact_because: str | None = None
    tie: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual branch f of a sum rest + f, which may be left out whole: the sum is then its other side.

    name: no group's; as a width, 1 keeps the branch and 0 drops it. nodes: what nothing but the sum reads, in order.
    total: the sum. rest: its other side. parameters: the state-dict keys that nothing but the branch reads.
    """

    name: str
    nodes: tuple[str, ...]
    total: str
    rest: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthRules:
    """What a user says about widths.

    freeze: shell patterns of groups or modules that keep all channels. only: of those that may lose some; empty: all.
    step: channels of a layer fall by multiples of it. least: channels that are left of a layer. tie: patterns of
    groups that have one width.
    """

    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    step: int = 1
    least: int = 1
    tie: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """What a transform made of a model before it was traced.

    layers: paths of the layers that have the new form. skipped: of others, by path, why they have not.
    """

    transform: str
    layers: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What can be pruned and what everything costs in channels.

    model_sha256: digest of the model's structure (graph, shapes; not the weights' values).
    unsupported: (op, node) pairs that no rule covers; what touches them is frozen.
    branches: what may be dropped whole.
    """

    model_sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    unsupported: tuple[tuple[str, str], ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def units(self) -> dict[str, int]:
        """Full width of every group."""
        return {group.name: group.units for group in self.groups}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may lose units."""
        return tuple(group for group in self.groups if group.frozen_because is None)
