"""First-order Taylor importance (Molchanov et al., CVPR 2019, arXiv:1906.10771)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView

NEEDS: str | None = "gradient"


def score(views: Sequence[GroupView], *, absolute: bool = False) -> Tensor:
    """First-order change in loss when a unit is removed from every member, squared or absolute.

    views:    one per coupled parameter; grad of one batch's mean loss.
    absolute: |change| in place of change², less swayed by single batches.
    returns:  (units,), >= 0, loss² (or loss); score.py averages over batches.
    raises:   DataError, from GroupView.grad, when there is no gradient.
    source:   the paper's joint (group) criterion, equation 8 summed over coupled parameters.
    """
    change = torch.stack([(view.weight * view.grad).sum(dim=1) for view in views]).sum(dim=0)
    return change.abs() if absolute else change.square()
