"""Statistics of calibration examples that criteria read: `NEEDS = "gram"` loads `statistics/gram.py`.

A member is a module with four names:

    LABELS: whether it needs a label per example.
    CLASSIFIER: whether it takes a classifier's loss, by labels or by ones that it draws: outputs are (n, classes).
    BATCH: examples per batch.
    collect(model, graph, batches) -> an iterator of `Fill`.

What can be scored batch by batch (gradients) comes with every batch; what has to be summed over all
of them first (second moments) comes once at the end. A member of which much is summed has one name more:

    split(model, graph) -> graphs with a part of the groups each, in order, that are collected one after the other;
        the graph itself where all fits into memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from edgeprune.core.records import Graph, Member

Batch = tuple[tuple[Tensor, ...], Tensor | None]
"""Inputs of the model, and a label per example where there are any."""

Fill = Callable[[Member], Mapping[str, Any]]
"""From a group's member to fields of its `GroupView`; empty where nothing was collected."""


class Statistic(Protocol):
    """What a member module is."""

    LABELS: bool
    CLASSIFIER: bool
    BATCH: int

    def collect(self, model: nn.Module, graph: Graph, batches: Iterable[Batch]) -> Iterator[Fill]:
        """Run the model, in evaluation mode, over the batches; the weights stay as they are.

        raises: DataError for labels or a loss that cannot be used.
        """
        ...
