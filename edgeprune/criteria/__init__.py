"""Criteria: how much a unit matters. `--criterion taylor` loads `criteria/taylor.py`.

A member is a module with two names:

    NEEDS: frozenset of what it reads beside the weights: {"grad"} or nothing.
    score(views, *, options) -> Tensor (units,): finite, larger = keep.

`score.py` builds the views. A criterion that needs gradients is called once per batch of
calibration examples and its scores are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from edgeprune.core.errors import DataError
from edgeprune.core.records import Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One parameter that a group is coupled through: row i is what goes with unit i.

    parameter: state-dict key. axis, role, extents: as in the graph's Member and Parameter.
    weight: (units, k). gradient: (units, k) of one batch's mean loss, or None when not computed.
    """

    parameter: str
    axis: int
    role: Literal["out", "in"]
    extents: tuple[Extent, ...]
    weight: Tensor
    gradient: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """The gradient. raises: DataError when there is none."""
        if self.gradient is None:
            raise DataError(f"no gradient for '{self.parameter}'; this criterion needs calibration data with labels")
        return self.gradient


class Criterion(Protocol):
    """What a member module is."""

    NEEDS: frozenset[str]

    def score(self, views: Sequence[GroupView]) -> Tensor:
        """One score per unit, (units,), larger = keep."""
        ...
