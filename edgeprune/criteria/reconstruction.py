"""Error that least-squares compensation cannot repair, unit after unit (ZipLM: Kurtić et al., NeurIPS 2023).

The layers that read a group are refitted after every removal: structured optimal brain surgeon over
their inputs with H = XᵀX (Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580; ZipLM, arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView, LayerView
from edgeprune.criteria._kronecker import blocks, damped_inverse
from edgeprune.criteria._views import layers_of

NEEDS: str | None = "gram"
RISE = 1e-6
"""Least relative rise from one removal to the next, so that scores keep the order of removal."""


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
    readers = [_Reader(layer, damping) for _, layer in layers_of(views)]
    units = len(views[0].weight)
    left = torch.arange(units)
    scores = torch.zeros(units, dtype=torch.float64)
    last = 0.0
    while len(left):
        errors = torch.stack([reader.errors(left) for reader in readers]).sum(dim=0)
        cheapest = int(errors.argmin())
        last = max(float(errors[cheapest]), last * (1 + RISE))
        scores[left[cheapest]] = last
        for reader in readers:
            reader.remove(int(left[cheapest]))
        left = left[torch.arange(len(left)) != cheapest]
    return scores


class _Reader:
    """A layer that loses inputs: its weight (G, o, d), refitted each time, and H⁻¹ (G, d, d) over what is left."""

    def __init__(self, layer: LayerView, damping: float) -> None:
        self.weight, self.positions = layer.weight.clone(), layer.positions
        self.inverse = damped_inverse(layer.inputs, damping)
        energy = float((self.weight @ layer.inputs * self.weight).sum())
        self.scale = 1 / energy if energy > 0 else 0.0

    def errors(self, units: Tensor) -> Tensor:
        """(units,): tr(W_u ([H⁻¹]_uu)⁻¹ W_uᵀ), the damped error of removing one more."""
        where = self.positions[units]
        stiffness = torch.linalg.inv(blocks(self.inverse, where))
        columns = self.weight[:, :, where].movedim(2, 1)  # (G, units, o, r)
        errors: Tensor = (columns @ stiffness * columns).sum(dim=(0, 2, 3))
        return errors.clamp_min(0.0) * self.scale

    def remove(self, unit: int) -> None:
        """Refit the rest, and take the unit's columns out of H⁻¹ (block elimination)."""
        where = self.positions[unit]
        rows = self.inverse[:, where]
        stiff = torch.linalg.solve(rows[:, :, where], rows)  # ([H⁻¹]_uu)⁻¹ [H⁻¹]_u:
        self.weight -= self.weight[:, :, where] @ stiff
        self.inverse -= rows.transpose(1, 2) @ stiff
