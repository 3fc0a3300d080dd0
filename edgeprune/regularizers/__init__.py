"""Regularizers: training that drives whole units to zero, so that removing them loses nothing.

`edgeprune recover --regularizer increg:ratio=0.6` loads `regularizers/increg.py`. A member is a module with

    make(groups, steps, *, options) -> Regularizer

for the prunable groups of the model and a training of so many steps. A unit is zero when every
parameter that goes with it is: its filters, its norms and the weights that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from edgeprune.core.family import configure, load_member
from edgeprune.core.records import Graph
from edgeprune.regularizers._units import UnitGroup, unit_groups


class Regularizer:
    """What changes a training step. A member overrides the hooks that it needs.

    held: all of its state, by name, for checkpoints; changed in place only.
    """

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        self.groups = groups
        self.held: dict[str, Tensor] = {}

    def before_forward(self) -> None:
        """At the start of a step."""

    def penalty(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """What is added to the loss of the model's outputs, (n, classes), if anything."""

    def after_backward(self) -> None:
        """When the gradients of the loss are there."""

    def after_step(self, rate: float) -> None:
        """When the optimiser has moved the parameters, at this learning rate."""

    def finish(self) -> None:
        """At the end, also of an earlier state that was put back."""

    def zeroed(self) -> dict[str, int]:
        """Units that are zero now, per group that has any."""
        counts = {group.name: int((group.norms() == 0).sum()) for group in self.groups}
        return {name: count for name, count in counts.items() if count}

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Go on from the state of a checkpoint. raises: KeyError when a part of it is missing."""
        for name, value in self.held.items():
            value.copy_(held[name])


def load_regularizer(chosen: str, module: nn.Module, graph: Graph, steps: int) -> Regularizer:
    """The member of `name:option=value,...`, for the prunable groups of a model that is about to be trained.

    raises: UsageError; RecordError when the graph is of another model.
    """
    name, _, options = chosen.partition(":")
    made: Regularizer = configure(load_member("regularizers", name).make, options)(unit_groups(module, graph), steps)
    return made
