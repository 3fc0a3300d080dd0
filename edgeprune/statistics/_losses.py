"""The loss of a classifier on calibration examples, and labels where there are none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import DataError


def are_logits(outputs: Any) -> bool:
    """Whether a model's outputs have the shape of a classifier's."""
    return isinstance(outputs, Tensor) and outputs.ndim == 2


def run_classifier(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits (n, classes). raises: DataError when the output is anything else."""
    logits: Tensor = model(*inputs)
    if not are_logits(logits):
        raise DataError(
            "this criterion, and loss curves, need a classifier with outputs (n, classes); for other outputs use "
            "criterion reconstruction without loss curves"
        )
    return logits


def cross_entropy(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor, reduction: str = "mean") -> Tensor:
    """Loss on a batch. raises: DataError for outputs or labels that do not fit."""
    logits = run_classifier(model, inputs)
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise DataError(f"the data has the label {int(targets.max())}, the model only {logits.shape[1]} classes")
    return functional.cross_entropy(logits, targets, reduction=reduction)


def finite(loss: Tensor) -> Tensor:
    """The loss itself. raises: DataError when it is not finite."""
    if not math.isfinite(float(loss.detach())):
        raise DataError(f"the model's calibration loss is {float(loss.detach())}; check weights and data")
    return loss


def sampled_loss(model: nn.Module, inputs: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Summed loss with labels drawn from the model's own predictions: its gradients make the true Fisher.

    raises: DataError when the outputs are not finite.
    """
    logits = run_classifier(model, inputs)
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the model's outputs on the calibration data are not finite; check weights and data")
    drawn = torch.multinomial(logits.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
    return functional.cross_entropy(logits, drawn, reduction="sum")
