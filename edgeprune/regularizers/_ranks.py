"""Which units go next: by their rank in L1 norm, averaged over the training (IncReg, SPP).

Both raise a number per unit, a penalty or a probability, by A x rise(rank): most for the lowest, nothing
for the rank at which enough have gone, less than nothing above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.regularizers._units import UnitGroup

CENTRE = 0.25
"""u of both papers: the rise at the inflection, as a share of the largest."""
RISES = 40
"""Rises over the part of the training that prunes."""
PACE = 3.0
"""How many times over the lowest unit of a group could go in that part: the later ones start when it has gone."""


def rise(ranks: Tensor, missing: int) -> Tensor:
    """Rise in [-, 1] for ranks from 0: 1 at rank 0, u at the inflection, 0 at rank `missing`; never rising.

    source: IncReg (arXiv:1804.09461), with alpha = ln(2/u) / missing and the inflection at -ln(u) / alpha.
    """
    alpha = math.log(2 / CENTRE) / missing
    inflection = -math.log(CENTRE) / alpha
    below = torch.exp(-alpha * ranks)
    above = 2 * CENTRE - torch.exp(-alpha * (2 * inflection - ranks))
    return torch.where(ranks < inflection, below, above)


class Ranking:
    """The ranks of one group's units, averaged over the rises so far, and what they bring.

    going: (units,), what was raised, in [0, 1]: a unit whose number reaches 1 is gone for good.
    """

    def __init__(self, group: UnitGroup, ratio: float) -> None:
        self.group, self.wanted = group, group.most(ratio)
        device = group.parts[0].tensor.device
        self.going = torch.zeros(group.units, device=device)
        self.ranks = torch.zeros(group.units, device=device)
        self.count = torch.zeros((), device=device)

    def advance(self, amount: float) -> None:
        """Rank anew, and raise by at most `amount`; enough units reach 1 and no more.

        Ours: ranks are among the units that are left, and the curve ends at as many as are still missing, so
        that the last ones go as fast as the first.
        """
        live = self.going < 1
        missing = self.wanted - int((~live).sum())
        if missing <= 0:
            return
        order = self.group.norms(p=1).argsort(stable=True)
        now = torch.empty_like(self.ranks)
        now[order] = torch.arange(self.group.units, device=now.device, dtype=now.dtype)
        self.count += 1
        self.ranks += (now - self.ranks) / self.count
        left = live.nonzero().flatten()
        left = left[self.ranks[left].argsort(stable=True)]
        raised = rise(torch.arange(len(left), device=now.device, dtype=now.dtype), missing) * amount
        self.going[left] = (self.going[left] + raised).clamp(0, 1)

    def complete(self) -> None:
        """Let what is still missing go: the units that were raised most."""
        missing = self.wanted - int((self.going >= 1).sum())
        if missing > 0:
            self.going[self.going.argsort(descending=True, stable=True)[: self.wanted]] = 1

    @property
    def kept(self) -> Tensor:
        """(units,) 1 for a unit that is left, 0 for one that is gone."""
        return (self.going < 1).to(self.going.dtype)


class Schedule:
    """Rankings of all groups over a training: rises for the first `share` of the steps, then nothing more.

    Ours: the papers raise by a fixed small amount for very long; here the amount follows from the steps, and
    what is missing when the share is over goes at once.
    """

    def __init__(self, groups: Sequence[UnitGroup], steps: int, ratio: float, share: float) -> None:
        self.rankings = [Ranking(group, ratio) for group in groups]
        self.pruning = max(1, round(share * steps))
        self.every = max(1, self.pruning // RISES)
        self.amount = PACE * self.every / self.pruning
        self.done = torch.zeros((), dtype=torch.int64)
        self.held = {"done": self.done} | {
            f"{ranking.group.name}/{name}": getattr(ranking, name)
            for ranking in self.rankings
            for name in ("going", "ranks", "count")
        }

    def advance(self) -> None:
        """Count a step, and raise where it is time to."""
        if int(self.done) < self.pruning and int(self.done) % self.every == 0:
            for ranking in self.rankings:
                ranking.advance(self.amount)
        self.done += 1
        if int(self.done) == self.pruning:
            for ranking in self.rankings:
                ranking.complete()
