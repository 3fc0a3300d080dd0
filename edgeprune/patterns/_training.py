"""Trainings that keep to a pattern: every step ends with the zeros in the model itself.

Whatever reads the model between two steps, an average of its weights, an evaluation, a checkpoint, an export, finds
a sparse one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgeprune.core.errors import UsageError
from edgeprune.patterns._layers import Layer

Choose = Callable[[Mapping[str, Layer]], dict[str, Tensor]]
UPDATES = 50
"""How many times a mask changes in the part of a training in which it does, at most."""
SHARE = 0.75
"""That part. sources: Zhu & Gupta and Evci et al. end at similar shares."""
DROPPED = 0.3
"""Share of a layer's connections that RigL replaces at first (the paper's alpha)."""
LOYALTY = 1.1
"""How much larger a weight counts that is kept, so that masks do not flicker (network surgery's two thresholds)."""


class Sparsifier:
    """What changes a training step: here, masked weights stay zero.

    choose: the masks of layers as they are; a layer's own zeros where it has the pattern.
    held: all of its state, by name, for checkpoints; changed in place only.
    """

    def __init__(self, layers: Mapping[str, Layer], choose: Choose) -> None:
        self.layers, self.choose = layers, choose
        self.masks = self.first_masks()
        self.held = {f"mask/{name}": mask for name, mask in self.masks.items()}
        self.apply()

    def first_masks(self) -> dict[str, Tensor]:
        """Those that the training starts with."""
        return self.choose(self.layers)

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is masked to zero."""
        for name, mask in self.masks.items():
            weight = self.layers[name].weight
            weight.masked_fill_(~mask, 0.0)  # a product would leave -0.0

    def before_forward(self) -> None:
        """At the start of a step."""

    def penalty(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """What is added to the loss of the model's outputs: nothing."""

    @torch.no_grad()
    def after_backward(self) -> None:
        """When the gradients of the loss are there: momentum gathers nothing for what is masked."""
        for name, mask in self.masks.items():
            if (gradient := self.layers[name].weight.grad) is not None:
                gradient.mul_(mask)

    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        """When the optimiser has moved the parameters."""
        self.apply()

    def finish(self) -> None:
        """At the end, also of an earlier state that was put back: the model has the pattern."""
        self.change(self.choose(self.layers))
        self.apply()

    def zeroed(self) -> dict[str, int]:
        """Weights that are zero now, per layer."""
        return {name: int((layer.weight == 0).sum()) for name, layer in self.layers.items()}

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Go on from the state of a checkpoint. raises: KeyError when a part of it is missing."""
        for name, value in self.held.items():
            value.copy_(held[name])

    def change(self, masks: Mapping[str, Tensor]) -> None:
        """Take other masks, in place."""
        for name, mask in masks.items():
            self.masks[name].copy_(mask)


class Timed(Sparsifier):
    """One whose masks change at some of the first steps of a training of `steps`.

    ending: step of the last change. every: steps between two.
    """

    def __init__(self, layers: Mapping[str, Layer], choose: Choose, steps: int) -> None:
        self.ending = max(1, int(SHARE * steps))
        self.every = max(1, self.ending // UPDATES)
        super().__init__(layers, choose)
        self.done = torch.zeros((), dtype=torch.int64)
        self.held["done"] = self.done

    def due(self) -> bool:
        """Count a step; whether the masks change at it."""
        self.done += 1
        step = int(self.done)
        return step == self.ending or (step < self.ending and step % self.every == 0)


class Gradual(Timed):
    """From dense to sparse along a cubic: fast while there is much to choose from (Zhu & Gupta, 2017,
    arXiv:1710.01878, sec. 3).

    choose_at: the masks at a share in [0, 1] of the sparsity.
    """

    def __init__(self, layers: Mapping[str, Layer], choose: Choose, steps: int,
                 choose_at: Callable[[Mapping[str, Layer], float], dict[str, Tensor]]) -> None:  # fmt: skip
        self.choose_at = choose_at
        super().__init__(layers, choose, steps)

    def first_masks(self) -> dict[str, Tensor]:
        """What is zero already."""
        return {name: layer.weight.detach() != 0 for name, layer in self.layers.items()}

    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        """See Sparsifier; some of the weights join the zeros."""
        self.apply()
        if self.due():
            self.change(self.choose_at(self.layers, 1 - (1 - int(self.done) / self.ending) ** 3))
            self.apply()


class Regrown(Timed):
    """The smallest connections go, and as many come back where the gradient is largest: RigL (Evci et al., ICML 2020,
    arXiv:1911.11134, sec. 3). New ones start at zero."""

    @torch.no_grad()
    def after_backward(self) -> None:
        """See Sparsifier; the gradients of masked weights, needed here, are cleared after."""
        if self.due():
            share = DROPPED / 2 * (1 + math.cos(math.pi * int(self.done) / self.ending))
            for name, mask in self.masks.items():
                weight = self.layers[name].weight
                if weight.grad is not None:
                    _replace(mask, weight.detach().abs(), weight.grad.abs(), share)
        super().after_backward()


def _replace(mask: Tensor, size: Tensor, gradient: Tensor, share: float) -> None:
    """Drop a share of the kept entries, the smallest, and keep as many others, of the largest gradient."""
    flat = mask.view(-1)
    count = min(int(share * int(flat.sum())), int((~flat).sum()))
    if count:
        flat[size.flatten().masked_fill(~flat, torch.inf).topk(count, largest=False).indices] = False
        flat[gradient.flatten().masked_fill(flat, -1.0).topk(count).indices] = True


class Remembered(Timed):
    """The optimiser moves dense weights, of which the model holds what the masks leave; a weight can come back.

    Gradients pass the mask straight through. decay: of weights that are masked now, which settles the masks: SR-STE
    (Zhou et al., ICLR 2021, arXiv:2102.04010, sec. 4). loyal: masks change rarely, and in favour of what is kept:
    network surgery (Guo et al., NIPS 2016, arXiv:1608.04493, sec. 3); ours with as many kept at all times.
    """

    def __init__(self, layers: Mapping[str, Layer], choose: Choose, steps: int, *, decay: float = 0.0,
                 loyal: bool = False) -> None:  # fmt: skip
        self.decay, self.loyal = decay, loyal
        self.dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        super().__init__(layers, choose, steps)
        self.held |= {f"dense/{name}": value for name, value in self.dense.items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        """See Sparsifier; the dense weights take the model's place for the optimiser."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
            if self.decay and layer.weight.grad is not None:
                layer.weight.grad.add_(layer.weight.masked_fill(self.masks[name], 0.0), alpha=self.decay)

    @torch.no_grad()
    def after_step(self, rate: float) -> None:  # noqa: ARG002 the contract has it
        """See Sparsifier."""
        for name, layer in self.layers.items():
            self.dense[name].copy_(layer.weight)
            if self.loyal:
                layer.weight.mul_(torch.where(self.masks[name], LOYALTY, 1.0))
        if self.due() or not self.loyal:
            self.change(self.choose(self.layers))
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
        self.apply()


def check_choice(pattern: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """raises: UsageError for a value that is none of the known."""
    if value not in known:
        raise UsageError(f"{pattern}: {option}={value}; known: {', '.join(known)}")
