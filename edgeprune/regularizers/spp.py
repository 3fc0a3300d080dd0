"""Structured probabilistic pruning (SPP: Wang et al., BMVC 2018, arXiv:1709.06994)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._ranks import Schedule
from edgeprune.regularizers._units import UnitGroup, check_share


def make(groups: Sequence[UnitGroup], steps: int, *, ratio: float = 0.5, share: float = 0.7) -> Regularizer:
    """Units are left out of a step at random, the lower their rank the more often; at probability 1 they are gone.

    What was left out of a step is not trained in it, and is back in the next unless drawn again.

    ratio:  in (0, 1), share of each group's units that go.
    share:  in (0, 1), part of the training that prunes; the rest recovers.
    raises: UsageError for options out of range.
    source: the paper as re-implemented by others, for filters of one layer; here for everything that goes
            with a unit, and batch-norm statistics of what was left out stay too (ours).
    """
    check_share("spp", ratio=ratio, share=share)
    return _Spp(groups, Schedule(groups, steps, ratio, share))


class _Spp(Regularizer):
    def __init__(self, groups: Sequence[UnitGroup], schedule: Schedule) -> None:
        super().__init__(groups)
        self.schedule, self.held = schedule, schedule.held
        self.out: list[Tensor] = []
        self.saved: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_forward(self) -> None:
        self.schedule.advance()
        self.out = [(torch.rand_like(r.going) < r.going).to(r.going.dtype) for r in self.schedule.rankings]
        self.saved = {
            part.name: part.tensor.detach().clone() for group in self.groups for part in (*group.parts, *group.buffers)
        }
        for group, out in zip(self.groups, self.out, strict=True):
            group.scale(1 - out)

    def after_backward(self) -> None:
        for group, out in zip(self.groups, self.out, strict=True):
            group.mute(out)

    @torch.no_grad()
    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        for group, out in zip(self.groups, self.out, strict=True):
            for part in (*group.parts, *group.buffers):
                absent = part.spread(out, 0.0) > 0
                part.tensor.copy_(torch.where(absent, self.saved[part.name], part.tensor))
        self.saved = {}
        for ranking in self.schedule.rankings:
            ranking.group.scale(ranking.kept)
