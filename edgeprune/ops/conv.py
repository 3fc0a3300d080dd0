"""Convolution, plain, grouped and depthwise, and its transpose."""

from __future__ import annotations

import numpy as np

from edgeprune.ops import Axes, Axis, Call, Rule, Value, repeated


def conv(call: Call) -> Axes:
    """weight (Cout, Cin/groups, *kernel); groups keep equal size, so the same positions of all go together."""
    return _convolve(call, out_axis=0)


def conv_transpose(call: Call) -> Axes:
    """weight (Cin, Cout/groups, *kernel)."""
    return _convolve(call, out_axis=1)


def _convolve(call: Call, out_axis: int) -> Axes:
    x, weight, bias = call.value("input"), call.value("weight"), call.optional("bias")
    groups = call.plain("groups", 1)
    channel = len(x.shape) - (len(weight.shape) - 2) - 1
    for space in x.axes[channel + 1 :]:
        call.freeze(space, "is convolved over")
    for space in weight.axes[2:]:
        call.freeze(space, "is a kernel's spatial axis")  # of a weight that is computed or used elsewhere
    channels = x.axes[channel]
    if groups == 1:
        call.contract_any(x, channel, weight, 1 - out_axis)
        out = weight.axes[out_axis]
    elif groups == x.shape[channel]:
        call.lower("groups", channels)
        out = _depthwise(call, x, channels, weight, out_axis, groups)
    else:
        out = _grouped(call, x, channels, weight, out_axis, groups)
    if bias is not None:
        out = call.tie(out, bias.axes[0])
    batched = any(axis is not None for axis in x.axes[:channel])
    zero = weight.masked or (out_axis == 0 and call.zero_along(weight, 0))
    call.masked = zero and (bias is None or bias.masked) and not batched
    return (*x.axes[:channel], out, *[None] * (len(x.shape) - channel - 1))


def _depthwise(call: Call, x: Value, channels: Axis, weight: Value, out_axis: int, groups: int) -> Axis:
    if out_axis == 0:
        return call.tie(repeated(channels, weight.shape[0] // groups), weight.axes[0], x.fixed_because)
    call.tie(channels, weight.axes[0], x.fixed_because)
    call.freeze(weight.axes[1], "is the multiplier of a depthwise transposed convolution")
    return repeated(weight.axes[0], weight.shape[1])


def _grouped(call: Call, x: Value, channels: Axis, weight: Value, out_axis: int, groups: int) -> Axis:
    if out_axis == 0:
        call.contract(call.tie_parts(channels, groups), x.fixed_because, weight, 1, masked=x.masked)
        call.tie_parts(weight.axes[0], groups)
        return weight.axes[0]
    call.tie_parts(weight.axes[0], groups)
    call.contract(channels, x.fixed_because, weight, 0)
    return None if weight.axes[1] is None else np.tile(weight.axes[1], groups)


RULES: dict[str, Rule] = {
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose,
    "conv_transpose3d": conv_transpose,
}
