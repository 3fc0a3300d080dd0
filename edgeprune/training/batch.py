"""A batch as a step trains on it: on its device, laid out in memory, and mixed where the training asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeprune.core.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Inputs (n, ...) and targets (n,), which may be of two examples each.

    others: targets of the second, or None. share: of the first, in [0, 1].
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    others: Tensor | None = None
    share: float = 1.0


def mix_batch(batch: Batch, alpha: float) -> Batch:
    """Mixup: every example with another of the batch, in one share for all, from Beta(alpha, alpha).

    Drawn with the global generators. alpha: > 0, or 0, which mixes nothing.
    raises: DataError for inputs that are no images.
    source: Zhang et al., ICLR 2018, arXiv:1710.09412, with one share a batch as in the authors' code.
    """
    if not alpha:
        return batch
    check_mixable(batch.inputs)
    share = float(np.random.beta(alpha, alpha))
    order = torch.randperm(len(batch.targets)).to(batch.targets.device)
    inputs = tuple(share * tensor + (1 - share) * tensor[order] for tensor in batch.inputs)
    return Batch(inputs, batch.targets, batch.targets[order], share)


def check_mixable(inputs: Sequence[Tensor]) -> None:
    """raises: DataError unless all are floats (n, channels, ...) of one n: the mean of two others says nothing."""
    for tensor in inputs:
        if tensor.ndim < 3 or not tensor.is_floating_point() or len(tensor) != len(inputs[0]):
            raise DataError(
                f"mixup mixes images, floats (n, channels, height, width) or the like, not {tensor.dtype} of shape "
                f"{list(tensor.shape)}; set mixup = 0"
            )


def lay_out(inputs: tuple[Tensor, ...], channels_last: bool) -> tuple[Tensor, ...]:
    """The inputs with images (n, c, h, w) channels last in memory if asked; convolutions pass the layout on."""
    if not channels_last:
        return inputs
    return tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
