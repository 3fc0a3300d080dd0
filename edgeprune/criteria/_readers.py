"""Layers that read a group's units, refitted after every removal: structured optimal brain surgeon over their inputs.

The step of ZipLM (Kurtić et al., NeurIPS 2023, arXiv:2302.04089), columns in blocks, with H = XᵀX as in optimal brain
compression (Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580). Ours: several readers of one group, and how much a
step does at once: of H⁻¹ and of the refitted weight's WᵀW it changes the units' own blocks; what it changes of the rest
is kept as factors of low rank, and carried out for many steps together. Whole matrices in every step take minutes for a
wide layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import LayerView
from edgeprune.criteria._kronecker import blocks, damped_inverse

RISE = 1e-6
"""Least relative rise from one removal to the next, so that scores keep the order of removal."""
HELD_BACK = 128
"""Columns of removed units whose changes are carried out together."""


class Reader:
    """A layer that loses inputs, refitted each time: H⁻¹ and WᵀW, both (G, d, d), over what is left.

    metric: (G, m, o); errors are those of metric times the layer's output. None: of the output, as a share of its own.
    """

    def __init__(self, layer: LayerView, damping: float, metric: Tensor | None = None) -> None:
        weight = layer.weight if metric is None else metric @ layer.weight
        energy = float((weight @ layer.inputs * weight).sum()) if metric is None else 1.0
        self.scale = 1 / energy if energy > 0 else 0.0
        self.positions = layer.positions
        self.inverse, self.square = damped_inverse(layer.inputs, damping), weight.transpose(1, 2) @ weight
        # What the units' own blocks are now, and what is held back of the rest: H⁻¹ - rowsᵀ stiff, and
        # WᵀW - stiffᵀ turned - turnedᵀ stiff.
        self.own, self.own_square = blocks(self.inverse, self.positions), blocks(self.square, self.positions)
        self._forget()

    def _forget(self) -> None:
        self.rows = self.stiff = self.turned = self.inverse[:, :0]
        self.gone = torch.zeros(self.inverse.shape[1], dtype=torch.bool)

    def errors(self, units: Tensor) -> Tensor:
        """(units,): tr(W_u ([H⁻¹]_uu)⁻¹ W_uᵀ), the damped error of removing one more."""
        stiffness = torch.linalg.inv(self.own[:, units])
        errors: Tensor = (stiffness * self.own_square[:, units]).sum(dim=(0, 2, 3))
        return errors.clamp_min(0.0) * self.scale

    def remove(self, unit: int) -> None:
        """Refit the rest, and take the unit's columns out of H⁻¹ (block elimination)."""
        where = self.positions[unit]
        own = self.own[:, unit]
        rows = self.inverse[:, where] - self.rows[:, :, where].transpose(1, 2) @ self.stiff
        square = (
            self.square[:, where]
            - self.stiff[:, :, where].transpose(1, 2) @ self.turned
            - self.turned[:, :, where].transpose(1, 2) @ self.stiff
        )
        stiff = torch.linalg.solve(own, rows)  # ([H⁻¹]_uu)⁻¹ [H⁻¹]_u:
        turned = square - 0.5 * self.own_square[:, unit] @ stiff
        at_rows, at_stiff, at_turned = (
            each[:, :, self.positions].movedim(1, 2) for each in (rows, stiff, turned)
        )  # (G, units, r, r)
        self.own -= at_rows.transpose(2, 3) @ at_stiff
        change = at_stiff.transpose(2, 3) @ at_turned
        self.own_square -= change + change.transpose(2, 3)
        self.rows = torch.cat([self.rows, rows], dim=1)
        self.stiff, self.turned = torch.cat([self.stiff, stiff], dim=1), torch.cat([self.turned, turned], dim=1)
        self.gone[where] = True
        if self.rows.shape[1] >= HELD_BACK:
            self._carry_out()

    def _carry_out(self) -> None:
        """Do what is held back, and let go of the columns that are gone."""
        left = ~self.gone
        rows, stiff, turned = (each[:, :, left] for each in (self.rows, self.stiff, self.turned))
        for name in ("inverse", "square"):  # one axis after the other, so that two copies are the most
            setattr(self, name, getattr(self, name)[:, left])
            setattr(self, name, getattr(self, name)[:, :, left])
        self.inverse.baddbmm_(rows.transpose(1, 2), stiff, alpha=-1)
        self.square.baddbmm_(stiff.transpose(1, 2), turned, alpha=-1).baddbmm_(turned.transpose(1, 2), stiff, alpha=-1)
        # Of a unit that is gone the positions are those of another; nobody asks for it any more.
        self.positions = (left.cumsum(0) - 1).clamp_min(0)[self.positions]
        self._forget()


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
