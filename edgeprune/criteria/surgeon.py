"""Loss that least-squares compensation cannot repair, unit after unit: `reconstruction` weighed by what outputs matter.

Structured optimal brain surgeon with a Kronecker-factored Fisher, refitted after every removal. That curvature is
EigenDamage's (Wang et al., ICML 2019, arXiv:1905.05934) and, with updates between removals, LLM Surgeon's (van der
Ouderaa et al., ICLR 2024, arXiv:2312.17244); the greedy step is ZipLM's (arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._readers import Reader, remove_greedily
from edgeprune.criteria._views import missing

NEEDS: str | None = "kfac"


def score(views: Sequence[GroupView], *, damping: float = 1e-2, even: float = 0.3) -> Tensor:
    """Rise of the loss that each unit's removal adds when units go greedily, the cheapest first.

    The scores of the units removed so far sum up to the loss of removing them together. With F = inputs ⊗ outputs the
    refit does not depend on the outputs' factor; only the errors that are left are weighed by it.

    views:   one per coupled parameter; layer, with outputs, of those that read the units.
    damping: > 0, share of the mean diagonal element added to that of the inputs' factor.
    even:    [0, 1], share of an identity of the same trace in the outputs' factor: other inputs than the calibration's
             give other directions a weight, and few examples say nothing of most.
    returns: (units,), >= 0, loss, summed over the readers; never falling in the order of removal.
    raises:  DataError when no layer that reads the group was watched; UsageError when damping is too small.
    source:  the papers above. Ours: several readers of one group, `even`, readers alone (a unit's own layer loses
             nothing that it could make up for).
    """
    readers = [
        Reader(layer, damping, _root(layer.outputs, even))
        for view in views
        if view.role == "in" and (layer := view.layer) is not None and layer.outputs is not None
    ]
    if not readers:
        raise missing(views, "gradients at the outputs of a convolution or linear layer that reads it")
    return 0.5 * remove_greedily(readers, len(views[0].weight))


def _root(outputs: Tensor, even: float) -> Tensor:
    """(G, o, o) of which the square, transposed times itself, is the outputs' factor, part of it spread evenly."""
    mean = outputs.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    mixed = (1 - even) * outputs + even * mean * torch.eye(outputs.shape[1], dtype=outputs.dtype)
    values, vectors = torch.linalg.eigh(mixed)
    root: Tensor = values.clamp_min(0.0).sqrt()[:, :, None] * vectors.transpose(1, 2)
    return root
