"""Pads of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from torch.nn import functional

from edgeprune.formats._onnx_import.operation import Flow, Operation


def find_pads(op: Operation, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Pads before every axis of space, then behind; `auto_pad` follows from the sizes."""
    space, auto = len(kernel), op.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(op.attribute("pads", [0] * 2 * space))
    if auto == "VALID":
        return [0] * 2 * space
    before, behind = [], []
    for size, reach, stride, dilation in zip(op.flow(0).shape[2:], kernel, strides, dilations, strict=True):
        missing = max((ceil(size / stride) - 1) * stride + (reach - 1) * dilation + 1 - size, 0)
        less = missing // 2
        before.append(less if auto == "SAME_UPPER" else missing - less)
        behind.append(missing - before[-1])
    return before + behind


def padded(op: Operation, x: Flow, pads: Sequence[int], value: float = 0.0) -> tuple[Flow, list[int]]:
    """The input and symmetric pads for its layer, with a pad before it where they are not symmetric."""
    space = len(pads) // 2
    before, behind = list(pads[:space]), list(pads[space:])
    if before == behind:
        return x, before
    pairs = [amount for axis in reversed(range(space)) for amount in (before[axis], behind[axis])]
    return op.call(functional.pad, x, pairs, value=value), [0] * space
