"""Patches of space: im2col and col2im (`nn.Unfold`, `nn.Fold`), and Tensor.unfold."""

from __future__ import annotations

from edgeprune.ops import Axes, Call, NoRule, Rule, repeated


def im2col(call: Call) -> Axes:
    """(N, C, H, W) -> (N, C k k, patches): all k k positions of a channel go with it."""
    x, kernel = call.value("self"), call.plain("kernel_size")
    if len(x.shape) != 4:
        raise NoRule("an image without a batch")
    for space in x.axes[2:]:
        call.freeze(space, "is cut into patches")
    call.masked = x.masked
    return (x.axes[0], repeated(x.axes[1], kernel[0] * kernel[1]), None)


def col2im(call: Call) -> Axes:
    """(N, C k k, patches) -> (N, C, H, W): the k k rows of a channel go together."""
    x, kernel = call.value("self"), call.plain("kernel_size")
    if len(x.shape) != 3:
        raise NoRule("patches without a batch")
    call.freeze(x.axes[2], "is put together from patches")
    call.masked = x.masked
    return (x.axes[0], call.tie_blocks(x.axes[1], x.shape[1] // (kernel[0] * kernel[1])), None, None)


def unfold(call: Call) -> Axes:
    """Windows along `dimension`; what is in them becomes a last axis."""
    x = call.value("self")
    dim = call.plain("dimension") % len(x.shape)
    call.freeze(x.axes[dim], "is cut into windows")
    call.masked = x.masked
    return (*x.axes[:dim], None, *x.axes[dim + 1 :], None)


RULES: dict[str, Rule] = {"im2col": im2col, "col2im": col2im, "unfold": unfold}
