"""Batch-norm statistics, estimated anew from calibration batches."""

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


def _sound(layer: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the layer saw a batch and its statistics are finite."""
    assert layer.running_mean is not None and layer.running_var is not None
    seen = layer.num_batches_tracked is None or int(layer.num_batches_tracked) > 0
    return seen and bool(torch.isfinite(layer.running_mean).all() and torch.isfinite(layer.running_var).all())
