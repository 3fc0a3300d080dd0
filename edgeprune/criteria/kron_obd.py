"""Optimal brain damage of whole units with K-FAC (Kron-OBD of Wang et al., ICML 2019, arXiv:1905.05934)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._kronecker import blocks, factors
from edgeprune.criteria._views import layers_of

NEEDS: str | None = "kfac"


def score(views: Sequence[GroupView]) -> Tensor:
    """Half of wᵀ F w for everything of a unit in a layer, F = inputs ⊗ outputs, summed over the layers.

    views:   one per coupled parameter; layer, with outputs.
    returns: (units,), >= 0, loss.
    raises:  DataError when no layer of the group was watched.
    source:  the paper: ½ S_ii w_iᵀ A w_i for filter i of one layer (its public code has w² A in place of
             wᵀ A w). Ours: also columns of the layers that read the units, and the sum over layers.
    """
    rises = []
    for view, layer in layers_of(views):
        own, across = factors(view, layer)
        rises.append((blocks(own, layer.positions) * blocks(across, layer.positions)).sum(dim=(0, 2, 3)))
    return 0.5 * torch.stack(rises).sum(dim=0).clamp_min(0.0)
