"""Joining and cutting along an axis: cat, stack, split, slice, select, unbind, glu."""

from __future__ import annotations

import numpy as np

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule


def cat(call: Call) -> Axes:
    """Channels of all parts in order; the other axes go together."""
    parts = call.plain("tensors")
    dim = call.plain("dim", 0) % len(call.out_shape)
    joined: list[Axis] = []
    for part in parts:
        axis = part.axes[dim]
        if axis is None and any(p.axes[dim] is not None for p in parts):
            axis = call.units.fresh(part.shape[dim])
            call.freeze(axis, part.fixed_because)
        joined.append(axis)
    axes = list(parts[0].axes)
    for part in parts[1:]:
        axes = [a if d == dim else call.tie(a, b) for d, (a, b) in enumerate(zip(axes, part.axes, strict=True))]
    axes[dim] = None if joined[0] is None else np.concatenate([a for a in joined if a is not None])
    call.masked = all(part.masked for part in parts)
    return tuple(axes)


def stack(call: Call) -> Axes:
    """Parts along a new axis; their channels go together."""
    parts = call.plain("tensors")
    dim = call.plain("dim", 0) % len(call.out_shape)
    axes = list(parts[0].axes)
    for part in parts[1:]:
        axes = [call.tie(a, b) for a, b in zip(axes, part.axes, strict=True)]
    axes.insert(dim, None)
    call.masked = all(part.masked for part in parts)
    return tuple(axes)


def split(call: Call) -> list[Axes]:
    """Cut into the listed sizes."""
    x, sizes = call.value("self"), call.plain("split_sizes")
    dim = call.plain("dim", 0) % len(x.shape)
    ids = x.axes[dim]
    call.masked = x.masked
    if ids is None:
        return [x.axes] * len(sizes)
    bounds = np.cumsum([0, *sizes])
    outputs: list[Axes] = []
    for item in range(len(sizes)):
        part = ids[bounds[item] : bounds[item + 1]]
        call.lower("split_sizes", part, item)
        outputs.append((*x.axes[:dim], part, *x.axes[dim + 1 :]))
    return outputs


def chunk(call: Call) -> list[Axes]:
    """Cut into parts whose sizes follow from the batch; those of channels are known, and are `split_with_sizes`."""
    x = call.value("self")
    if x.axes[call.plain("dim", 0) % len(x.shape)] is not None:
        raise NoRule("parts of a size that is computed at run time")
    call.masked = x.masked
    return [x.axes] * len(call.out_shapes)


def slice_axis(call: Call) -> Axes:
    """x[start:end:step] along `dim`; both bounds fall by the channels removed before them."""
    x = call.value("self")
    dim = call.plain("dim", 0) % len(x.shape)
    ids = x.axes[dim]
    call.masked = x.masked
    if ids is None:
        return x.axes
    start, end = call.plain("start") or 0, call.plain("end")
    end = len(ids) if end is None else end
    if call.plain("step", 1) != 1 or not isinstance(start, int) or not isinstance(end, int) or start < 0 or end < 0:
        call.freeze(ids, "is sliced with a step")
        return (*x.axes[:dim], None, *x.axes[dim + 1 :])
    if start:
        call.lower("start", ids[:start])
    if end < len(ids):
        call.lower("end", ids[:end])
    return (*x.axes[:dim], ids[start:end], *x.axes[dim + 1 :])


def narrow(call: Call) -> Axes:
    """x[start : start + length] along `dim`."""
    x, start, length = call.value("self"), call.plain("start"), call.plain("length")
    dim = call.plain("dim") % len(x.shape)
    ids = x.axes[dim]
    call.masked = x.masked
    if ids is None:
        return x.axes
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        raise NoRule("bounds computed at run time")
    call.lower("start", ids[:start])
    call.lower("length", ids[start : start + length])
    return (*x.axes[:dim], ids[start : start + length], *x.axes[dim + 1 :])


def select(call: Call) -> Axes:
    """x[index] along `dim`; the axis goes."""
    x = call.value("self")
    dim = call.plain("dim") % len(x.shape)
    call.freeze(x.axes[dim], "is indexed")
    call.masked = x.masked
    return (*x.axes[:dim], *x.axes[dim + 1 :])


def index(call: Call) -> Axes:
    """x[..., integers, ...]: the indexed axis gives way to the axes of the integers, the others pass."""
    x, indices = call.value("self"), call.plain("indices")
    places = [axis for axis, given in enumerate(indices) if given is not None]
    if len(places) != 1:
        raise NoRule("several axes are indexed")
    (dim,) = places
    call.freeze(x.axes[dim], "is indexed")
    call.masked = x.masked
    return (*x.axes[:dim], *[None] * len(indices[dim].shape), *x.axes[dim + 1 :])


def unbind(call: Call) -> list[Axes]:
    """Every x[index] along `dim`."""
    x = call.value("self")
    dim = call.plain("dim", 0) % len(x.shape)
    call.freeze(x.axes[dim], "is unbound")
    call.masked = x.masked
    return [(*x.axes[:dim], *x.axes[dim + 1 :])] * len(call.out_shapes)


def glu(call: Call) -> Axes:
    """First half times sigmoid of the second half: the halves go together."""
    x = call.value("self")
    call.masked = x.masked
    dim = call.plain("dim", -1) % len(x.shape)
    return (*x.axes[:dim], call.tie_parts(x.axes[dim], 2), *x.axes[dim + 1 :])


RULES: dict[str, Rule] = {
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "split_with_sizes": split,
    "chunk": chunk,
    "split": chunk,
    "tensor_split": chunk,
    "slice": slice_axis,
    "narrow": narrow,
    "select": select,
    "index": index,
    "unbind": unbind,
    "glu": glu,
}
