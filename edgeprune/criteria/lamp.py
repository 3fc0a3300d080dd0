"""Layer-adaptive magnitude (LAMP: Lee et al., ICLR 2021, arXiv:2010.07611)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._views import relative

NEEDS: str | None = None


def score(views: Sequence[GroupView]) -> Tensor:
    """Squared norm of a unit over that of all units that are at least as large.

    The order within a group is that of the magnitude; the values compare across groups, since every
    group's largest unit scores 1 (or less, if several are largest).

    views:   one per coupled parameter.
    returns: (units,), in [0, 1].
    source:  the paper, for single weights. Ours: units in place of weights, each
             parameter's squared norms divided by their mean, equal units share one score.
    """
    squares = torch.stack([relative(view.weight.square().sum(dim=1)) for view in views]).sum(dim=0)
    at_least = torch.where(squares[None, :] >= squares[:, None], squares[None, :], 0.0).sum(dim=1)
    return squares / at_least.clamp_min(torch.finfo(squares.dtype).tiny)
