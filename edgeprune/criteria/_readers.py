"""Layers that read a group's units, refitted after every removal: structured optimal brain surgeon over their inputs.

The step of ZipLM (Kurtić et al., NeurIPS 2023, arXiv:2302.04089), columns in blocks, with H = XᵀX as in optimal brain
compression (Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580). Ours: several readers of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import LayerView
from edgeprune.criteria._kronecker import blocks, damped_inverse

RISE = 1e-6
"""Least relative rise from one removal to the next, so that scores keep the order of removal."""


class Reader:
    """A layer that loses inputs: its weight (G, o, d), refitted each time, and H⁻¹ (G, d, d) over what is left.

    metric: (G, m, o); errors are those of metric times the layer's output. None: of the output, as a share of its own.
    """

    def __init__(self, layer: LayerView, damping: float, metric: Tensor | None = None) -> None:
        self.weight = layer.weight.clone() if metric is None else metric @ layer.weight
        self.positions = layer.positions
        self.inverse = damped_inverse(layer.inputs, damping)
        energy = float((self.weight @ layer.inputs * self.weight).sum()) if metric is None else 1.0
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


def remove_greedily(readers: Sequence[Reader], units: int) -> Tensor:
    """(units,): the error that each removal adds where the cheapest unit goes next; never falling in that order."""
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
