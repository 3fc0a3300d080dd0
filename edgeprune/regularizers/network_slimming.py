"""L1 on the scales of batch norms (network slimming: Liu et al., ICCV 2017, arXiv:1708.06519)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.core.errors import ModelError
from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._units import Part, UnitGroup, check_positive


def make(groups: Sequence[UnitGroup], steps: int, *, strength: float = 1e-3) -> Regularizer:  # noqa: ARG001 the contract has it
    """A penalty of strength x |gamma|, by its proximal step, which gives exact zeros.

    strength: > 0. Each step brings a scale nearer to zero by rate x strength.
    raises:   UsageError when strength is not positive; ModelError when no group has a batch norm.
    source:   the paper, which follows the subgradient and never reaches zero. Ours: the proximal step; once all
              scales of a unit are zero its shifts are brought to zero in the same way, and then all of it is.
    """
    check_positive("network_slimming", strength=strength)
    norms = [(group, _named(group, "weight"), _named(group, "bias")) for group in groups]
    norms = [(group, scales, shifts) for group, scales, shifts in norms if scales]
    if not norms:
        raise ModelError("network_slimming needs batch norms, and no prunable group has one; use group_lasso")
    return _NetworkSlimming(norms, strength)


def _named(group: UnitGroup, leaf: str) -> list[Part]:
    return [part for part in group.parts if part.op == "batch_norm" and part.name.endswith(leaf)]


class _NetworkSlimming(Regularizer):
    def __init__(self, norms: Sequence[tuple[UnitGroup, list[Part], list[Part]]], strength: float) -> None:
        super().__init__([group for group, _, _ in norms])
        self.norms, self.strength = norms, strength

    @torch.no_grad()
    def after_step(self, rate: float) -> None:
        for group, scales, shifts in self.norms:
            for part in scales:
                _shrink(part, rate * self.strength, torch.ones(group.units))
            silent = _largest(scales) == 0
            for part in shifts:
                _shrink(part, rate * self.strength, silent)
            if shifts:
                silent = silent & (_largest(shifts) == 0)
            group.scale((~silent).float())


def _shrink(part: Part, amount: float, which: Tensor) -> None:
    """Soft threshold of the entries of some units."""
    values = part.tensor
    values.copy_(values.sign() * (values.abs() - amount * part.spread(which, 0.0)).clamp_min(0.0))


def _largest(parts: Sequence[Part]) -> Tensor:
    """(units,) largest absolute value over a unit's entries."""
    return torch.stack([part.tensor.abs()[part.index].amax(dim=1) for part in parts]).amax(dim=0)
