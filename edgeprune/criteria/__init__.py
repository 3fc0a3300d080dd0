"""Criteria: how much a unit matters. `--criterion taylor` loads `criteria/taylor.py`.

A member is a module with two names:

    NEEDS: the statistic that it reads beside the weights (a member of `statistics`), or None.
    score(views, *, options) -> Tensor (units,): finite, larger = keep.

`score.py` builds the views. A statistic that comes batch by batch is scored each time, and the scores
are averaged; one that is summed over all batches is scored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from edgeprune.core.errors import DataError
from edgeprune.core.records import Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """A convolution or linear layer as G matrix products (G = 1 but in grouped convolutions), in float64.

    weight: (G, o, d); a bias is the last of the d columns, where the inputs have a column of ones.
    inputs: (G, d, d) second moments of what the weight multiplies. outputs: (G, o, o) those of the loss
    gradient per example at the layer's output, or None when not computed.
    positions: (units, r), where a unit lies: rows 0..G·o for "out" members, columns 0..d of each of the
    G for "in" members.
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor | None
    positions: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One parameter that a group is coupled through: row i is what goes with unit i.

    parameter: state-dict key. axis, role, extents: as in the graph's Member and Parameter.
    op: the ATen name of the operation that reads it. weight: (units, k).

    The rest is None where the criterion does not need it, or where it cannot be had:
    gradient: (units, k) of a batch's mean loss, or of one example's.
    curvature: (units, k), diagonal of the loss' Hessian by relative changes of the weights.
    activation, activation_gradient: (units, examples, places), of what the layer that holds an "in"
    parameter reads; gradient of each example's own loss.
    layer: of convolutions and linear layers.
    """

    parameter: str
    axis: int
    role: Literal["out", "in"]
    extents: tuple[Extent, ...]
    weight: Tensor
    op: str = ""
    gradient: Tensor | None = None
    curvature: Tensor | None = None
    activation: Tensor | None = None
    activation_gradient: Tensor | None = None
    layer: LayerView | None = None

    @property
    def grad(self) -> Tensor:
        """The gradient. raises: DataError when there is none."""
        if self.gradient is None:
            raise DataError(f"no gradient for '{self.parameter}'; this criterion needs calibration data with labels")
        return self.gradient


class Criterion(Protocol):
    """What a member module is."""

    NEEDS: str | None

    def score(self, views: Sequence[GroupView]) -> Tensor:
        """One score per unit, (units,), larger = keep."""
        ...
