"""Group magnitude: the norm of everything that goes with a unit (L1: Li et al., ICLR 2017, arXiv:1608.08710)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import UsageError
from edgeprune.criteria import GroupView

NEEDS: str | None = None


def score(views: Sequence[GroupView], *, p: float = 2.0, normalise: bool = True) -> Tensor:
    """Sum over the coupled parameters of each unit's p-norm.

    views:     one per coupled parameter.
    p:         norm, > 0; 1 and 2 are the usual ones.
    normalise: divide each parameter's norms by their mean over the units, so that no parameter
               counts more for being larger (ours; the paper ranks filters of one layer only).
    returns:   (units,), >= 0.
    raises:    UsageError when p is not positive.
    """
    if p <= 0:
        raise UsageError(f"magnitude: p={p} is not a norm; use p=1 or p=2")
    norms = torch.stack([view.weight.norm(p=p, dim=1) for view in views])
    if normalise:
        norms = norms / norms.mean(dim=1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    return norms.sum(dim=0)
