"""What decides, as a module in the model's graph."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from edgeprune.graphs.capture import operator_name
from edgeprune.graphs.propagate import concrete

LEAST_SPREAD = 1e-3
"""Added to the scale of features, so that one which hardly changes does not blow up."""


class Choice(nn.Module):
    """Chooses for each example between two values.

    While it trains both are computed, and `taken` holds what the penalty needs of a step. chance: in [0, 1], how much
    noise a decision has in training. share: of the model's MACs, those that it guards.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.chance = 1.0
        self.taken: Tensor | None = None

    def forget(self) -> None:
        """Let go of what a training step left behind."""
        self.taken = None


class Learner(Choice):
    """A choice that can learn by itself what to answer: from features of what it sees, and from labels."""

    @abstractmethod
    def look(self, seen: Tensor) -> Tensor:
        """(n, ...) -> features (n, f, ...)."""

    @abstractmethod
    def answer(self, features: Tensor) -> Tensor:
        """(n, f, ...) -> (n, classes); in training the first batch sets the scale of the features."""


class Spread(nn.Module):
    """How the first batch of a training spreads the features that a layer reads: then all of them learn at one speed.

    mean, scale: of that batch, (features,); folded into the layer's weight and bias, as constants once exported.
    """

    mean: Tensor
    scale: Tensor
    looked: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("looked", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def look_at(self, input: Tensor) -> None:
        """input: (n, features, ...); what comes later does not count."""
        if not self.looked and len(input) > 1:
            axes = [axis for axis in range(input.ndim) if axis != 1]
            spread = input.std(axes)
            self.mean.copy_(input.mean(axes))
            self.scale.copy_(spread + LEAST_SPREAD * spread.mean() + LEAST_SPREAD)
            self.looked.fill_(True)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """weight: (out, features, ...). bias: (out,)."""
        weight = weight / self.scale.view(-1, *[1] * (weight.ndim - 2))
        return weight, bias - weight.reshape(*weight.shape[:2], -1).sum(2) @ self.mean


class Standardised(nn.Linear):
    """A linear layer of (n, features) as they are spread."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__(features, out)
        self.spread = Spread(features)

    def forward(self, input: Tensor) -> Tensor:
        """(n, features) -> (n, out)."""
        if self.training:
            self.spread.look_at(input)
        return functional.linear(input, *self.spread.fold(self.weight, self.bias))


class StandardisedConv(nn.Conv2d):
    """A convolution of (n, features, h, w) as they are spread; around the image lies what was zero before."""

    def __init__(self, features: int, out: int, kernel: int) -> None:
        super().__init__(features, out, kernel, padding=kernel // 2)
        self.spread = Spread(features)

    def forward(self, input: Tensor) -> Tensor:
        """(n, features, h, w) -> (n, out, h, w)."""
        if self.training:
            self.spread.look_at(input)
        assert self.bias is not None
        return functional.conv2d(input, *self.spread.fold(self.weight, self.bias), padding=self.padding)


def free_path(captured: fx.GraphModule, base: str) -> str:
    """A path that no part of the model has yet."""
    taken = {name for name, _ in captured.named_modules()} | {name for name, _ in captured.named_parameters()}
    path, number = base, 1
    while path in taken:
        number += 1
        path = f"{base}_{number}"
    return path


def count_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one call for one example; 0 for what is neither a convolution nor a product."""
    op = operator_name(node) if node.op == "call_function" else ""
    if not (op.startswith("conv") or op in ("linear", "addmm", "matmul", "bmm", "mm")):
        return 0
    out = concrete(node.meta["val"].shape, 1)
    if op.startswith("conv"):
        weight = node.args[1]
        assert isinstance(weight, fx.Node) and isinstance(node.args[0], fx.Node)
        per_place = int(weight.meta["val"].numel() // weight.meta["val"].shape[0])
        if "transpose" in op:
            return per_place * _numel(concrete(node.args[0].meta["val"].shape, 1))
        return per_place * _numel(out)
    inner = node.args[1 if op == "addmm" else 0]
    assert isinstance(inner, fx.Node)
    return _numel(out) * int(concrete(inner.meta["val"].shape, 1)[-1])


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
