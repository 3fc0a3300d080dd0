"""Channel-wise optimal brain damage with the diagonal Fisher (C-OBD of Wang et al., ICML 2019, arXiv:1905.05934)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView

NEEDS: str | None = "example_gradient"


def score(views: Sequence[GroupView]) -> Tensor:
    """Half the sum of w² x E[g²] over everything that goes with a unit.

    views:   one per coupled parameter; grad of one example's loss, its label drawn from the model.
    returns: (units,), >= 0, loss; score.py averages over examples, which makes the expectation.
    raises:  DataError, from GroupView.grad, when there is no gradient.
    source:  the paper, for one layer's filters; the sum over coupled parameters is ours.
    """
    return 0.5 * torch.stack([(view.weight * view.grad).square().sum(dim=1) for view in views]).sum(dim=0)
