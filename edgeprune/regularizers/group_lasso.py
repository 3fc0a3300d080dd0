"""Group lasso over everything that goes with a unit (Wen et al., NIPS 2016, arXiv:1608.03665)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._units import UnitGroup, check_positive


def make(groups: Sequence[UnitGroup], steps: int, *, strength: float = 1e-3) -> Regularizer:  # noqa: ARG001 the contract has it
    """A penalty of strength x sqrt(entries) x norm for each unit, by its proximal step, which gives exact zeros.

    strength: > 0. Each step shortens a unit by rate x strength x sqrt(entries), to zero if it is shorter.
    raises:   UsageError when strength is not positive.
    source:   Yuan and Lin, J. R. Stat. Soc. B 2006, for the penalty with sqrt(entries); Wen et al. for filters.
              Ours: whole coupled groups, one after the other where a weight belongs to two.
    """
    check_positive("group_lasso", strength=strength)
    return _GroupLasso(groups, strength)


class _GroupLasso(Regularizer):
    def __init__(self, groups: Sequence[UnitGroup], strength: float) -> None:
        super().__init__(groups)
        self.strength = strength

    def after_step(self, rate: float) -> None:
        for group in self.groups:
            norms = group.norms()
            shorter = rate * self.strength * group.entries**0.5
            group.scale((1 - shorter / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0.0))
