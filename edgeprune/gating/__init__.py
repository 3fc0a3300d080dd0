"""Gating: what a model computes is decided anew for every input.

`edgeprune gate --gate block_skip:rate=0.6` loads `gating/block_skip.py`. A member is a module with

    make(**options) -> Gating

A gated model chooses with `torch.where`, one boolean an example. In a batch both sides are computed and masked; in an
ONNX file for one example they become branches of an `If`, so that what was not chosen is not computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeprune.core.family import configure, load_member
from edgeprune.gating._choices import Choice as Choice

Batches = Iterable[tuple[Any, Tensor]]
Measure = Callable[[], Mapping[str, float]]
"""How often each gate runs on the calibration data, as the model is now."""


class Gating(ABC):
    """Where a model decides, how the deciding is trained, and how it is set in the end.

    alone: only the gates are trained; the rest of the model stays as it is.
    """

    alone = False

    @abstractmethod
    def place(self, captured: fx.GraphModule) -> list[str]:
        """Put a `Choice` into a captured graph wherever one belongs.

        returns: their paths. raises: ModelError where none belongs, with the reason.
        """

    @abstractmethod
    def penalty(self, choices: Mapping[str, Choice], logits: Tensor, targets: Tensor) -> Tensor:
        """What a step of training adds to the loss.

        logits: of the whole model, (n, classes). targets: (n,) labels. choices: after their forward pass, in training.
        """

    @abstractmethod
    def settle(self, module: nn.Module, choices: Mapping[str, Choice], calibration: Batches, measure: Measure) -> None:
        """Set the thresholds of a trained model, in place.

        measure: how often each gate runs on the calibration data. calibration: (inputs, labels).
        raises: DataError without examples.
        """


class GateTraining:
    """What gates change in a training step: the loss, and how much chance there is in a decision.

    held: its state, by name, for checkpoints.
    """

    CERTAIN = 0.75
    """Share of the training after which decisions are as in evaluation."""

    def __init__(self, gating: Gating, choices: Mapping[str, Choice], steps: int) -> None:
        self.gating, self.choices, self.steps = gating, choices, steps
        self.done = torch.zeros((), dtype=torch.int64)
        self.held = {"done": self.done}

    def before_forward(self) -> None:
        """At the start of a step."""
        certain = float(self.done) / max(1.0, self.CERTAIN * self.steps)
        for choice in self.choices.values():
            choice.chance = max(0.0, 1.0 - certain)

    def penalty(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """What is added to the loss."""
        return self.gating.penalty(self.choices, logits, targets)

    def after_backward(self) -> None:
        """When the gradients of the loss are there."""

    def after_step(self, rate: float) -> None:
        """When the optimiser has moved the parameters, at this learning rate."""
        del rate
        self.done += 1

    def finish(self) -> None:
        """At the end, also of an earlier state that was put back."""
        for choice in self.choices.values():
            choice.forget()

    def zeroed(self) -> dict[str, int]:
        """Gates bring nothing to zero."""
        return {}

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Go on from the state of a checkpoint. raises: KeyError when it is not there."""
        self.done.copy_(held["done"])


def load_gating(chosen: str) -> Gating:
    """The member of `name:option=value,...`. raises: UsageError."""
    name, _, options = chosen.partition(":")
    made: Gating = configure(load_member("gating", name).make, options)()
    return made


def find_gates(module: nn.Module) -> dict[str, Choice]:
    """The gates of a model that can be trained, by their paths."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Choice)}
