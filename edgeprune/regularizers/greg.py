"""Growing regularization (GReg-1: Wang et al., ICLR 2021, arXiv:2012.09243)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._units import UnitGroup, check_positive, check_share


def make(
    groups: Sequence[UnitGroup], steps: int, *, ratio: float = 0.5, share: float = 0.7, ceiling: float = 1.0
) -> Regularizer:
    """The units of least L1 norm are chosen at the start; their weight decay grows evenly until they are removed.

    ratio:   in (0, 1), share of each group's units that go.
    share:   in (0, 1), part of the training over which the decay grows; then they are zero for good.
    ceiling: > 0, the decay at its end.
    raises:  UsageError for options out of range.
    source:  the paper, for filters of one layer, with a fixed growth per update. Ours: the growth follows
             from the steps, and everything that goes with a unit decays.
    """
    check_share("greg", ratio=ratio, share=share)
    check_positive("greg", ceiling=ceiling)
    return _GReg(groups, max(1, round(share * steps)), ratio, ceiling)


class _GReg(Regularizer):
    def __init__(self, groups: Sequence[UnitGroup], pruning: int, ratio: float, ceiling: float) -> None:
        super().__init__(groups)
        self.pruning, self.ceiling = pruning, ceiling
        self.done = torch.zeros((), dtype=torch.int64)
        self.going = []
        for group in groups:
            norms = group.norms(p=1)
            going = torch.zeros_like(norms)
            going[norms.argsort(stable=True)[: group.most(ratio)]] = 1
            self.going.append(going)
        self.held = {"done": self.done} | {
            f"{group.name}/going": going for group, going in zip(groups, self.going, strict=True)
        }

    def after_backward(self) -> None:
        self.done += 1
        decay = self.ceiling * min(1.0, int(self.done) / self.pruning)
        for group, going in zip(self.groups, self.going, strict=True):
            group.decay(going * decay)

    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        if int(self.done) >= self.pruning:
            for group, going in zip(self.groups, self.going, strict=True):
                group.scale(1 - going)
