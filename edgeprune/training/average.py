"""The average of a model's weights along its training, which scatters less than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of all that a model's state dict holds; whole numbers are those of the last step.

    The first steps count more, or the average would long be that of the start: after `step` of them the decay is at
    most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage. Statistics of batch norms are averaged
    like weights; whoever uses the average in the end takes them anew.

    decay: [0, 1), share of the average that a step leaves. values: the average, by name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def follow(self, module: nn.Module, step: int) -> None:
        """Take in what a step has made of the model. step: how many there were before."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from an average that was stored. raises: KeyError when a part of it is missing."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The model with the average for a while; whatever happens to it meanwhile is undone."""
        own = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.values)
        try:
            yield
        finally:
            module.load_state_dict(own)
