"""Filters near the geometric median of their layer can be spared (He et al., CVPR 2019, arXiv:1811.00250)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import UsageError
from edgeprune.criteria import GroupView
from edgeprune.criteria._views import relative

NEEDS: str | None = None
PRODUCERS = ("conv", "linear", "addmm", "mm", "matmul", "embedding")


def score(views: Sequence[GroupView], *, p: float = 2.0) -> Tensor:
    """Summed distance of a unit's filter to all others of its layer; small: the others can replace it.

    views:   one per coupled parameter. Weights of the layers that compute the units are read; all
             parameters where there are none.
    p:       norm of the distance, >= 1.
    returns: (units,), >= 0; each layer's distances are divided by their mean, so that layers count alike.
    raises:  UsageError when p is below 1.
    source:  the paper, for one layer; the sum over the layers of a residual sum is ours.
    """
    if p < 1:
        raise UsageError(f"fpgm: p={p} is not a norm; use p=1 or p=2")
    filters = [v.weight for v in views if v.role == "out" and v.op.startswith(PRODUCERS) and v.weight.shape[1] > 1]
    filters = filters or [view.weight for view in views]
    return torch.stack([relative(torch.cdist(w, w, p=p).sum(dim=1)) for w in filters]).sum(dim=0)
