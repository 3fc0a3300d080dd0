"""Second-order loss change with the diagonal of the Hessian (optimal brain damage: LeCun et al., NIPS 1989)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._views import missing

NEEDS: str | None = "curvature"


def score(views: Sequence[GroupView]) -> Tensor:
    """Half the sum of h x w² over everything that goes with a unit; 0 where the loss curves downwards.

    views:   one per coupled parameter; curvature, an estimate of h x w².
    returns: (units,), >= 0, loss.
    raises:  DataError when there is no curvature.
    source:  the paper, for single weights; the sum over coupled parameters is ours. Negative sums count as 0,
             only after summing, so that the noise of the estimate averages out.
    """
    rises = [view.curvature.sum(dim=1) for view in views if view.curvature is not None]
    if not rises:
        raise missing(views, "second derivatives (from calibration data with labels)")
    return (0.5 * torch.stack(rises).sum(dim=0)).clamp_min(0.0)
