"""Batch-norm scale (network slimming: Liu et al., ICCV 2017, arXiv:1708.06519)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import ModelError
from edgeprune.criteria import GroupView

NEEDS: str | None = None


def score(views: Sequence[GroupView]) -> Tensor:
    """Sum of |gamma| over the batch norms that a unit passes through.

    What a removed unit's shift (beta) contributes is not counted; where it matters, compensation makes up for it.

    views:   one per coupled parameter; those of a `batch_norm` are read.
    returns: (units,), >= 0.
    raises:  ModelError for a group without a batch norm that has a scale.
    source:  the paper, for one norm; the sum over several (residual sums) is ours.
    """
    scales = [view.weight for view in views if view.op == "batch_norm" and view.parameter.endswith("weight")]
    if not scales:
        raise ModelError(
            f"bn_scale cannot rank the group of '{views[0].parameter}': no batch norm with a scale is in it; "
            "use another criterion, such as magnitude"
        )
    return torch.stack([scale.abs().sum(dim=1) for scale in scales]).sum(dim=0)
