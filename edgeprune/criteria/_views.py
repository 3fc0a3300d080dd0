"""Which of a group's parameters a criterion can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import NothingToScore
from edgeprune.criteria import GroupView, LayerView


def layers_of(views: Sequence[GroupView]) -> list[tuple[GroupView, LayerView]]:
    """The views whose layer was watched. raises: NothingToScore when none was."""
    found = [(view, view.layer) for view in views if view.layer is not None]
    if not found:
        raise missing(views, "second moments of a convolution or linear layer")
    return found


def missing(views: Sequence[GroupView], what: str) -> NothingToScore:
    """What to raise for a group of which nothing was collected."""
    return NothingToScore(
        f"there are no {what} for the group of '{views[0].parameter}': it needs calibration data, and a layer of the "
        "group that is an nn module of a kind that can be watched; use another criterion, such as taylor"
    )


def relative(values: Tensor) -> Tensor:
    """Non-negative values per unit, divided by their mean."""
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
