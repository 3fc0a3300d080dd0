"""Error that least-squares compensation cannot repair, unit after unit (ZipLM: Kurtić et al., NeurIPS 2023).

The layers that read a group are refitted after every removal: structured optimal brain surgeon over
their inputs with H = XᵀX (Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580; ZipLM, arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edgeprune.criteria import GroupView
from edgeprune.criteria._readers import Reader, remove_greedily
from edgeprune.criteria._views import layers_of

NEEDS: str | None = "gram"


def score(views: Sequence[GroupView], *, damping: float = 1e-2) -> Tensor:
    """Error that each unit's removal adds when units go greedily, the cheapest first.

    The scores of the units removed so far sum up to the error of removing them together.

    views:   one per coupled parameter; layer, of those that read the units.
    damping: > 0, share of the mean diagonal element added to that of H.
    returns: (units,), >= 0: squared error over the readers' squared outputs, summed over the readers;
             never falling in the order of removal.
    raises:  DataError when no layer that reads the group was watched; UsageError when damping is too small.
    source:  ZipLM's structured step, columns in blocks. Ours: several readers of one group, each relative
             to its output.
    """
    return remove_greedily([Reader(layer, damping) for _, layer in layers_of(views)], len(views[0].weight))
