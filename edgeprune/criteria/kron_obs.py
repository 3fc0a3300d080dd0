"""Optimal brain surgeon of whole units with K-FAC (Kron-OBS of Wang et al., ICML 2019, arXiv:1905.05934)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._kronecker import blocks, damped_inverse, factors
from edgeprune.criteria._views import layers_of

NEEDS: str | None = "kfac"


def score(views: Sequence[GroupView], *, damping: float = 1e-3) -> Tensor:
    """Half of wᵀ ([F⁻¹]_uu)⁻¹ w for everything of a unit in a layer, F = inputs ⊗ outputs, summed over the layers.

    Like kron_obd, but the layer's other weights make up for the loss as well as they can.

    views:   one per coupled parameter; layer, with outputs.
    damping: > 0, share of the mean diagonal element added to the diagonal of the inverted factor.
    returns: (units,), >= 0, loss.
    raises:  DataError when no layer of the group was watched; UsageError when damping is too small.
    source:  the paper: ½ w_iᵀ A w_i / [S⁻¹]_ii for filter i of one layer. Ours: damping in place of cut
             eigenvalues, also columns of the layers that read the units, and the sum over layers.
    """
    rises = []
    for view, layer in layers_of(views):
        own, across = factors(view, layer)
        stiffness = torch.linalg.inv(blocks(damped_inverse(own, damping), layer.positions))
        rises.append((stiffness * blocks(across, layer.positions)).sum(dim=(0, 2, 3)))
    return 0.5 * torch.stack(rises).sum(dim=0).clamp_min(0.0)
