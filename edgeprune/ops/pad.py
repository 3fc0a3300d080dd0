"""Padding and creation: channels that no parameter produces, which are removed by asking for fewer."""

from __future__ import annotations

import numpy as np

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule


def pad(call: Call) -> Axes:
    """`pad` lists (before, after) from the last axis on; padded channels become units of their own."""
    x, amounts = call.value("self"), call.plain("pad")
    if not all(isinstance(amount, int) for amount in amounts):
        raise NoRule("pad amounts computed at run time")
    constant = call.op == "constant_pad_nd" or call.plain("mode", "constant") == "constant"
    call.masked = x.masked and (not constant or not call.plain("value"))
    axes: list[Axis] = list(x.axes)
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair : 2 * pair + 2]
        axis = len(x.shape) - 1 - pair
        ids = axes[axis]
        if before == after == 0 or ids is None:
            continue
        if not constant or before < 0 or after < 0:
            call.freeze(ids, "is padded with its neighbours or cropped")
            axes[axis] = None
            continue
        left, right = call.units.fresh(before), call.units.fresh(after)
        call.lower("pad", left, 2 * pair)
        call.lower("pad", right, 2 * pair + 1)
        axes[axis] = np.concatenate([left, ids, right])
    return tuple(axes)


def create(call: Call) -> Axes:
    """A tensor of one value: all its channels can be asked for or not."""
    axes: list[Axis] = []
    call.masked = call.op in ("zeros", "new_zeros")
    for item, size in enumerate(call.plain("size", [])):
        axis = call.units.fresh(size) if isinstance(size, int) and size > 1 else None
        call.lower("size", axis, item)
        axes.append(axis)
    return tuple(axes)


RULES: dict[str, Rule] = {"pad": pad, "constant_pad_nd": pad}
RULES |= dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), create)
