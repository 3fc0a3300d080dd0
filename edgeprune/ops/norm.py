"""Normalisations: per channel (exact), over channels (inexact), in groups of channels (whole groups)."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.ops import Axes, Axis, Call, Rule, Value


def per_channel(call: Call) -> Axes:
    """Batch and instance norm: each channel by itself, so a removed one takes its parameters along.

    A weight that is standardised by it at run time has its inputs' axis among those that are normalised over: removed
    inputs, which are zero, still count in its statistics, but are no zeros afterwards.
    """
    x = call.value("input")
    axis = x.axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (parameter := call.optional(name)) is not None:
            axis = call.tie(axis, parameter.axes[0], x.fixed_because)
    if call.op == "instance_norm":
        for space in x.axes[2:]:
            call.freeze(space, "is normalised over")
    elif call.plain("training"):
        _standardise(call, x)
    call.masked = _masked(call, (x.axes[0], *x.axes[2:]))
    return (x.axes[0], axis, *x.axes[2:])


def _standardise(call: Call, x: Value) -> None:
    bias = call.optional("bias")
    if x.masked and len(x.shape) == 3 and x.axes[0] is None and call.optional("running_mean") is None:
        call.pad_statistics(x.axes[2])
        call.consume(x.axes[2])
        call.zeros = x.axes[1] if bias is None or bias.masked else None
        return
    for space in (x.axes[0], *x.axes[2:]):
        call.mark_inexact(space, "is normalised over")


def over_channels(call: Call) -> Axes:
    """Layer and RMS norm: the statistics run over the last axes, so fewer channels change them."""
    x, shape = call.value("input"), call.plain("normalized_shape")
    axes, first = list(x.axes), len(x.shape) - len(shape)
    for item in range(len(shape)):
        axis: Axis = axes[first + item]
        for name in ("weight", "bias"):
            if (parameter := call.optional(name)) is not None:
                axis = call.tie(axis, parameter.axes[item], x.fixed_because)
        call.mark_inexact(axis, f"{call.op} takes statistics over its channels")
        call.lower("normalized_shape", axis, item)
        axes[first + item] = axis
    call.masked = len(shape) == 1 and _masked(call, axes[:first])
    return tuple(axes)


def group_norm(call: Call) -> Axes:
    """Statistics run over each group of channels, so whole groups go."""
    x = call.value("input")
    axis = x.axes[1]
    for name in ("weight", "bias"):
        if (parameter := call.optional(name)) is not None:
            axis = call.tie(axis, parameter.axes[0], x.fixed_because)
    for space in x.axes[2:]:
        call.freeze(space, "is normalised over")
    call.lower("num_groups", call.tie_blocks(axis, call.plain("num_groups")))
    call.masked = _masked(call, (x.axes[0], *x.axes[2:]))
    return (x.axes[0], axis, *x.axes[2:])


def _masked(call: Call, others: Sequence[Axis]) -> bool:
    """Whether a removed channel comes out as zero, its scale and its shift being zero; `others`: not the channels."""
    weight, bias = call.optional("weight"), call.optional("bias")
    scaled = weight is not None and weight.masked and (bias is None or bias.masked)
    return scaled and all(axis is None for axis in others)


RULES: dict[str, Rule] = {
    "batch_norm": per_channel,
    "instance_norm": per_channel,
    "layer_norm": over_channels,
    "rms_norm": over_channels,
    "group_norm": group_norm,
}
