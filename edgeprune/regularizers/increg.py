"""Incremental regularization (IncReg: Wang et al., 2018, arXiv:1804.09461)."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._ranks import Schedule
from edgeprune.regularizers._units import UnitGroup, check_positive, check_share


def make(
    groups: Sequence[UnitGroup], steps: int, *, ratio: float = 0.5, share: float = 0.7, ceiling: float = 1.0
) -> Regularizer:
    """A weight decay of each unit's own, rising for low ranks and falling for high ones; at the ceiling the unit goes.

    ratio:   in (0, 1), share of each group's units that go.
    share:   in (0, 1), part of the training that prunes; the rest recovers.
    ceiling: > 0, weight decay at which a unit is set to zero for good.
    raises:  UsageError for options out of range.
    source:  the paper, for filters of one layer; here for everything that goes with a unit (ours).
    """
    check_share("increg", ratio=ratio, share=share)
    check_positive("increg", ceiling=ceiling)
    return _IncReg(groups, Schedule(groups, steps, ratio, share), ceiling)


class _IncReg(Regularizer):
    def __init__(self, groups: Sequence[UnitGroup], schedule: Schedule, ceiling: float) -> None:
        super().__init__(groups)
        self.schedule, self.ceiling, self.held = schedule, ceiling, schedule.held

    def after_backward(self) -> None:
        self.schedule.advance()
        for ranking in self.schedule.rankings:
            ranking.group.decay(ranking.going * self.ceiling)

    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        for ranking in self.schedule.rankings:
            ranking.group.scale(ranking.kept)
