"""Fisher pruning of activations (Theis et al., 2018, arXiv:1801.05787; Crowley et al., 2018, arXiv:1810.04622)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._views import missing

NEEDS: str | None = "activation_gradient"


def score(views: Sequence[GroupView]) -> Tensor:
    """Rise of the loss when a unit's activation is set to zero, to second order with the Fisher information.

        1/(2N) sum over examples n of (sum over readers and places of a x dL_n/da)²

    Not divided by the latency that a unit saves, as the papers allow: the solver weighs loss against
    measured latency, so it would count twice.

    views:   one per coupled parameter; activation and activation_gradient of those that read the units.
    returns: (units,), >= 0, loss; score.py averages over batches.
    raises:  DataError when no layer that reads the group was watched.
    source:  both papers, for one reader. The sum over all readers of the units (residual sums, several
             branches) is ours: it is the derivative by one gate in front of them all.
    """
    changes = [
        (view.activation * view.activation_gradient).sum(dim=2)
        for view in views
        if view.activation is not None and view.activation_gradient is not None
    ]
    if not changes:
        raise missing(views, "gradients by activations (from calibration data with labels)")
    return 0.5 * torch.stack(changes).sum(dim=0).square().mean(dim=1)
