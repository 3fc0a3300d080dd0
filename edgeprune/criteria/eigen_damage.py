"""Second-order damage in the Kronecker-factored eigenbasis (EigenDamage: Wang et al., ICML 2019, arXiv:1905.05934)."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._kronecker import sum_units
from edgeprune.criteria._views import layers_of, missing

NEEDS: str | None = "kfac"
PARTS = IN, CORE, OUT = "rotate_in", "core", "rotate_out"
"""The three layers that the transform kfe makes of one."""


def score(views: Sequence[GroupView]) -> Tensor:
    """Half the sum of w² x λ_g x λ_a over a unit's weights, the λ being the diagonals of F = inputs ⊗ outputs.

    For models that the transform kfe rewrote: there F is about diagonal, and the λ are its eigenvalues. Of a
    group between the three layers only the middle one counts, since the outer ones say the same once more.

    views:   one per coupled parameter; layer, with outputs.
    returns: (units,), >= 0, loss.
    raises:  DataError when no layer of the group was watched.
    source:  the paper: row and column sums of W*² ⊙ λ_g λ_aᵀ. Ours: λ_a for each tap of a window; groups of
             layers that are as they were, summed over their layers like c_obs.
    """
    found = layers_of(views)
    parameters = {view.parameter for view in views}
    cores = [(view, layer) for view, layer in found if _is_core(view.parameter, parameters)]
    rises = []
    for view, layer in cores or found:
        if layer.outputs is None:
            raise missing([view], "gradients at a layer's outputs")
        of_outputs, of_inputs = (m.diagonal(dim1=1, dim2=2) for m in (layer.outputs, layer.inputs))
        each = layer.weight.square() * of_outputs[:, :, None] * of_inputs[:, None, :]
        rises.append(sum_units(each, view, layer))
    return 0.5 * torch.stack(rises).sum(dim=0)


def _is_core(parameter: str, group: Set[str]) -> bool:
    """Whether it is the middle one's weight, with that of the layer before or behind it in the same group."""
    path, found, _ = parameter.rpartition(f".{CORE}.weight")
    return bool(found) and any(f"{path}.{part}.weight" in group for part in (IN, OUT))
