"""Batch-norm statistics, taken anew from calibration batches: what a layer computes follows, or stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
    """Replace running means and variances by their average over the batches, in place.

    Dropout stays off; momenta and each module's training flag are restored. Without batch norms, or
    without batches, nothing changes.

    batches: (inputs, targets); targets are not used. All batches count alike, so a last batch
        smaller than half of the first is left out.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    norms = [layer for layer in norms if layer.track_running_stats and layer.running_mean is not None]
    if not norms:
        return
    flags = {part: part.training for part in module.modules()}
    momenta = [layer.momentum for layer in norms]
    before = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in norms]
    module.eval()
    first = 0
    try:
        for layer in norms:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
        for inputs, _ in batches:
            inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            first = first or len(inputs[0])
            if len(inputs[0]) * 2 >= first and len(inputs[0]) > 1:
                module(*inputs)
    finally:
        for layer, momentum, old in zip(norms, momenta, before, strict=True):
            layer.momentum = momentum
            if not _sound(layer):
                layer.load_state_dict(old)
        for part, training in flags.items():
            part.training = training


@torch.no_grad()
def match_batch_norm(module: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
    """Give batch norms the statistics of what they see, and scales and shifts that undo the difference, in place.

    The module computes in eval mode what it did before. A refitted layer leaves its norm statistics that its outputs no
    longer have, and in train mode, where the statistics are those of the batch, the model would be another one:
    training would begin by undoing the fit. Ours.

    batches: (inputs, targets); targets are not used. Norms without scale, that saw nothing, or with a channel that
        does not vary stay as they are there.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    moments = [(layer, _Moments()) for layer in norms if layer.affine and layer.running_var is not None]

    def watch(moment: _Moments) -> Any:
        return lambda _, inputs: moment.add(inputs[0])

    handles = [layer.register_forward_pre_hook(watch(moment)) for layer, moment in moments]
    training = module.training
    module.eval()
    try:
        for inputs, _ in batches:
            module(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    for layer, moment in moments:
        _restate(layer, moment)


class _Moments:
    """Sums over everything but the channels: count, x (channels,), x² (channels,)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: (n, channels, ...)."""
        values = x.detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        total, square = values.sum(1), values.square().sum(1)
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square


def _restate(layer: nn.modules.batchnorm._BatchNorm, moment: _Moments) -> None:
    """The same map from a channel's input to its output, written with the statistics that were seen."""
    if moment.count < 2 or moment.total is None or moment.square is None:
        return
    assert layer.running_mean is not None and layer.running_var is not None
    mean = moment.total / moment.count
    variance = ((moment.square / moment.count - mean.square()) * moment.count / (moment.count - 1)).clamp_min(0)
    before = (layer.running_var.double() + layer.eps).sqrt()
    scale = layer.weight.double() * (variance + layer.eps).sqrt() / before
    shift = layer.bias.double() + layer.weight.double() * (mean - layer.running_mean.double()) / before
    sound = torch.isfinite(scale) & torch.isfinite(shift) & (variance > layer.eps)
    for tensor, value in (
        (layer.weight, scale), (layer.bias, shift), (layer.running_mean, mean), (layer.running_var, variance),
    ):  # fmt: skip
        tensor.copy_(torch.where(sound, value.to(tensor), tensor))


def _sound(layer: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the layer saw a batch and its statistics are finite."""
    assert layer.running_mean is not None and layer.running_var is not None
    seen = layer.num_batches_tracked is None or int(layer.num_batches_tracked) > 0
    return seen and bool(torch.isfinite(layer.running_mean).all() and torch.isfinite(layer.running_var).all())
