"""A layer's Fisher as inputs ⊗ outputs (K-FAC, Martens and Grosse, 2015, arXiv:1503.05671), cut into units.

Removing rows or columns U of a weight W changes the loss by ½ vec(W_U)ᵀ F_UU vec(W_U), which is half the
sum over U x U of

    outputs ⊙ (W inputs Wᵀ)   for rows,      inputs ⊙ (Wᵀ outputs W)   for columns.

The first factor is `own`: it lies along the units' axis; the second is `across`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.core.errors import DataError, UsageError
from edgeprune.criteria import GroupView, LayerView
from edgeprune.criteria._views import missing


def factors(view: GroupView, layer: LayerView) -> tuple[Tensor, Tensor]:
    """own, across: both (B, n, n); B = 1 for rows, G for columns."""
    if layer.outputs is None:
        raise missing([view], "gradients at a layer's outputs")
    if view.role == "out":
        across = layer.weight @ layer.inputs @ layer.weight.transpose(1, 2)
        return torch.block_diag(*layer.outputs)[None], torch.block_diag(*across)[None]
    return layer.inputs, layer.weight.transpose(1, 2) @ layer.outputs @ layer.weight


def sum_units(each: Tensor, view: GroupView, layer: LayerView) -> Tensor:
    """(units,) from one value per weight, (G, o, d)."""
    along = each.sum(dim=2).flatten() if view.role == "out" else each.sum(dim=(0, 1))
    return along[layer.positions].sum(dim=1)


def blocks(matrix: Tensor, positions: Tensor) -> Tensor:
    """(B, n, n) and (units, r) -> (B, units, r, r)."""
    return matrix[:, positions[:, :, None], positions[:, None, :]]


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """Inverse of (B, n, n) with `damping` times each mean diagonal element added to the diagonal.

    raises: DataError when it is not finite; UsageError when it has no inverse even so.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("second moments of a layer are not finite; check weights and calibration data")
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    strength = damping * diagonal.mean(dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(strength)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped  # these are the largest tensors there are
    if bool(failed.any()):
        raise UsageError(f"a layer's second moments are singular with damping={damping}; use a larger one")
    return torch.cholesky_inverse(factor)
