"""Channel-wise optimal brain surgeon: single weights' scores summed (C-OBS of Wang et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._kronecker import damped_inverse, sum_units
from edgeprune.criteria._views import layers_of, missing

NEEDS: str | None = "kfac"


def score(views: Sequence[GroupView], *, damping: float = 1e-3) -> Tensor:
    """Half the sum over a unit's weights of w² / [F⁻¹]_ww, F = inputs ⊗ outputs.

    As if each weight were removed alone; kron_obs removes a unit's weights together.

    views:   one per coupled parameter; layer, with outputs.
    damping: > 0, share of the mean diagonal element added to the diagonal of either factor.
    returns: (units,), >= 0, loss.
    raises:  DataError when no layer of the group was watched; UsageError when damping is too small.
    source:  the paper (arXiv:1905.05934) and Hassibi and Stork, NIPS 1992. Ours: also columns
             of the layers that read the units, and the sum over layers.
    """
    rises = []
    for view, layer in layers_of(views):
        if layer.outputs is None:
            raise missing([view], "gradients at a layer's outputs")
        of_outputs, of_inputs = (damped_inverse(m, damping).diagonal(dim1=1, dim2=2)
                                 for m in (layer.outputs, layer.inputs))  # fmt: skip
        each = layer.weight.square() / (of_outputs[:, :, None] * of_inputs[:, None, :])
        rises.append(sum_units(each, view, layer))
    return 0.5 * torch.stack(rises).sum(dim=0)
