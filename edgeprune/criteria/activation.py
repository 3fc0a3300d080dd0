"""How much a unit is active: the norm of its outputs, or how often they are not zero (APoZ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import UsageError
from edgeprune.criteria import GroupView
from edgeprune.criteria._views import missing

NEEDS: str | None = "activation"


def score(views: Sequence[GroupView], *, p: float = 2.0, apoz: bool = False) -> Tensor:
    """Mean over the examples of a unit's output norm, where it is read (behind norm and activation function).

    views:   one per coupled parameter; activation of those that read the units.
    p:       norm, > 0, of the mean over places: (mean |a|^p)^(1/p).
    apoz:    score the share of places that are not zero instead; says little where nothing is ever zero (SiLU).
    returns: (units,), >= 0; score.py averages over batches.
    raises:  UsageError when p is not positive; DataError when no layer that reads the group was watched.
    source:  APoZ is 1 - this share (Hu et al., 2016, arXiv:1607.03250). The sum over all readers is ours.
    """
    if p <= 0:
        raise UsageError(f"activation: p={p} is not a norm; use p=1 or p=2")
    read = [view.activation for view in views if view.activation is not None]
    if not read:
        raise missing(views, "activations")
    if apoz:
        return torch.stack([(a != 0).to(a.dtype).mean(dim=(1, 2)) for a in read]).sum(dim=0)
    return torch.stack([a.abs().pow(p).mean(dim=2).pow(1 / p).mean(dim=1) for a in read]).sum(dim=0)
