"""Structured directional pruning (SDprun) by generalised regularised dual averaging (gRDA).

Chao et al., NeurIPS 2020, arXiv:2006.09358, for single weights: the gradient steps add up in v, which begins
as the weights, and the weights are v with a threshold that grows slowly enough for the training loss to
stay where it would have been.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.regularizers import Regularizer
from edgeprune.regularizers._units import UnitGroup, check_positive


def make(
    groups: Sequence[UnitGroup],
    steps: int,  # noqa: ARG001 the contract has it
    *,
    strength: float = 0.005,
    power: float = 0.6,
) -> Regularizer:
    """w = v x max(1 - threshold x sqrt(entries) / norm of v, 0) for each unit, threshold = c η^(½+μ) t^μ.

    strength: c > 0; the paper's is below 0.005, for trainings of some 10⁵ steps.
    power:    μ in (½, 1); about 0.6 for CIFAR and 0.501 for ImageNet.
    raises:   UsageError for options out of range.
    source:   gRDA's threshold. The form for units, with sqrt(entries), is reconstructed, not taken from a paper
              we read. Ours: η is the highest rate so far and t counts a step at a lower rate as a part of one;
              v adds up the optimiser's steps, momentum included; a weight of two groups has both factors.
    """
    check_positive("directional", strength=strength, power=power)
    return _Directional(groups, strength, power)


class _Directional(Regularizer):
    def __init__(self, groups: Sequence[UnitGroup], strength: float, power: float) -> None:
        super().__init__(groups)
        self.strength, self.power = strength, power
        self.weights = {part.name: part.tensor for group in groups for part in group.parts}
        self.dual = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.before: dict[str, Tensor] = {}
        self.travelled, self.highest = torch.zeros(()), torch.zeros(())
        self.held = {"travelled": self.travelled, "highest": self.highest} | {
            f"dual/{name}": value for name, value in self.dual.items()
        }

    @torch.no_grad()
    def before_forward(self) -> None:
        self.before = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def after_step(self, rate: float) -> None:
        for name, weight in self.weights.items():
            self.dual[name] += weight - self.before[name]
            weight.copy_(self.dual[name])
        self.before = {}
        self.travelled += rate
        self.highest.clamp_min_(rate)
        time = float(self.travelled / self.highest)
        threshold = self.strength * float(self.highest) ** (0.5 + self.power) * time**self.power
        factors = []
        for group in self.groups:
            norms = group.norms(of=self.dual).clamp_min(torch.finfo(torch.float32).tiny)
            factors.append((1 - threshold * group.entries**0.5 / norms).clamp_min(0.0))
        for group, factor in zip(self.groups, factors, strict=True):
            group.scale(factor)
