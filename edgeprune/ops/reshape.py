"""Operators that move entries without changing them: views, permutations, shuffles, repeats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule, Value, repeated


def view(call: Call) -> Axes:
    """Any change of shape; axes are matched by the finest common factorisation of both shapes."""
    x = call.value("self")
    call.masked, call.zeros = x.masked, x.zeros
    out: list[Axis] = [None] * len(call.out_shape)
    for inner, outer in factorise(x.shape, call.out_shape):
        axes = _merge(call, x, inner)
        for axis, ids in zip(outer, _split(call, axes, [call.out_shape[a] for a in outer], outer), strict=True):
            out[axis] = ids
    argument = "size" if "size" in call.arguments else "shape" if "shape" in call.arguments else None
    for axis, ids in enumerate(out):
        if argument is not None and ids is not None:
            call.lower(argument, ids, axis)
    if call.op == "unflatten":
        first = call.plain("dim") % len(x.shape)
        for item in range(len(call.plain("sizes"))):
            call.lower("sizes", out[first + item], item)
    return tuple(out)


def view_as(call: Call) -> Axes:
    """As `view`, to the shape of `other`, whose axes it must keep following."""
    axes, other = view(call), call.value("other")
    return tuple(call.tie(a, b) for a, b in zip(axes, other.axes, strict=True))


def factorise(inner: tuple[int, ...], outer: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of axes of equal product, as short as they can be; axes of one position are left out.

    (2, 3, 4), (6, 4) -> ([0, 1], [0]), ([2], [1])
    """
    left = [a for a, size in enumerate(inner) if size != 1]
    right = [a for a, size in enumerate(outer) if size != 1]
    while left and right:
        run_in, run_out = [left.pop(0)], [right.pop(0)]
        size_in, size_out = inner[run_in[0]], outer[run_out[0]]
        while size_in != size_out:
            if size_in < size_out and left:
                run_in.append(left.pop(0))
                size_in *= inner[run_in[-1]]
            elif size_in > size_out and right:
                run_out.append(right.pop(0))
                size_out *= outer[run_out[-1]]
            else:
                raise NoRule(f"a view from {inner} to {outer}")
        yield run_in, run_out


def _merge(call: Call, x: Value, axes: list[int]) -> Axis:
    """Ids of the flattened axes: those of one axis that has any, repeated along the others."""
    carrying = [a for a in axes if x.axes[a] is not None]
    if not carrying:
        return None
    carrier = carrying[min(call.option, len(carrying) - 1)]
    for axis in carrying:
        if axis != carrier:
            call.freeze(x.axes[axis], "is merged with another pruned axis")
    shape = [1] * len(axes)
    shape[axes.index(carrier)] = -1
    ids = x.axes[carrier]
    assert ids is not None
    if len(carrying) > 1:
        call.choices = (ids, len(carrying))
    return np.broadcast_to(ids.reshape(shape), [x.shape[a] for a in axes]).ravel()


def _split(call: Call, ids: Axis, sizes: list[int], axes: list[int]) -> list[Axis]:
    """Ids of each part of a split axis: one part carries them, the positions along the others are tied."""
    if ids is None or len(sizes) == 1:
        return [ids] * len(sizes)
    roots = call.units.find(ids).reshape(sizes)
    varying = [axis for axis in range(len(sizes)) if (roots != roots.take([0], axis)).any()]
    if not varying:
        call.freeze(ids, "is one unit that a view splits")
        return [None] * len(sizes)
    # The largest part leaves most units. Only in channels-last tensors, split into attention heads, is
    # the innermost part summed head by head, so there the part before it can be removed; a single head
    # shows as an axis of one position between them.
    order = sorted(varying, key=lambda axis: (sizes[axis], axis), reverse=True)
    if axes[-1] == len(call.out_shape) - 1 and len(varying) > 1 and axes[-1] - axes[-2] == 1:
        order.remove(heads := varying[-2])
        order.insert(0, heads)
    if len(order) > 1:
        call.choices = (ids, len(order))
    carrier = order[min(call.option, len(order) - 1)]
    first = roots
    for axis in range(len(sizes)):
        if axis != carrier:
            first = first.take([0], axis)
    call.units.union(roots, first)
    return [first.ravel() if axis == carrier else None for axis in range(len(sizes))]


def same(call: Call) -> Axes:
    """The shape stays; used for what only moves along fixed axes."""
    x = call.value("self")
    call.masked = x.masked
    dims = call.plain("dims", [])
    for dim in dims if isinstance(dims, list) else [dims]:
        call.freeze(x.axes[dim], "is reordered")
    return x.axes


def permute(call: Call) -> Axes:
    """Axes in the order `dims`."""
    x = call.value("self")
    call.masked = x.masked
    return tuple(x.axes[d] for d in call.plain("dims"))


def transpose(call: Call) -> Axes:
    """Two axes change places."""
    x = call.value("self")
    call.masked = x.masked
    axes = list(x.axes)
    if call.op in ("t", "numpy_T"):
        return tuple(reversed(axes))
    names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    a, b = (call.plain(name) for name in names)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def movedim(call: Call) -> Axes:
    """Axes `source` go to `destination`."""
    x = call.value("self")
    call.masked = x.masked
    source, destination = (d if isinstance(d, list) else [d] for d in (call.plain("source"), call.plain("destination")))
    # The shape of an array whose sizes are the axes' numbers says where numpy puts each.
    numbers = np.moveaxis(np.empty(tuple(range(len(x.shape)))), source, destination).shape
    return tuple(x.axes[d] for d in numbers)


def unsqueeze(call: Call) -> Axes:
    """A new axis of one position."""
    x = call.value("self")
    call.masked = x.masked
    axes = list(x.axes)
    axes.insert(call.plain("dim") % len(call.out_shape), None)
    return tuple(axes)


def expand(call: Call) -> Axes:
    """Axes of one position repeat, new ones come in front."""
    x = call.value("self")
    call.masked = x.masked
    new = len(call.out_shape) - len(x.shape)
    axes: list[Axis] = [None] * new
    for axis, ids in enumerate(x.axes):
        kept = ids if x.shape[axis] == call.out_shape[new + axis] else None
        if call.op == "expand":
            call.lower("size", kept, new + axis)
        axes.append(kept)
    return tuple(axes)


def expand_as(call: Call) -> Axes:
    """As `expand`, to the shape of `other`, whose axes it must keep following."""
    axes, other = expand(call), call.value("other")
    return tuple(call.tie(a, b) if a is not None else b for a, b in zip(axes, other.axes, strict=True))


def repeat(call: Call) -> Axes:
    """The whole tensor several times along each axis."""
    x, times = call.value("self"), call.plain("repeats")
    call.masked = x.masked
    new = len(times) - len(x.shape)
    if not all(isinstance(t, int) or x.axes[a - new] is None for a, t in enumerate(times) if a >= new):
        raise NoRule("repeats computed at run time")
    tiled = (None if ids is None else np.tile(ids, t) for ids, t in zip(x.axes, times[new:], strict=True))
    return (*[None] * new, *tiled)


def repeat_interleave(call: Call) -> Axes:
    """Each position several times in place."""
    x, times, dim = call.value("self"), call.plain("repeats"), call.plain("dim")
    call.masked = x.masked
    if not isinstance(times, int) or dim is None:
        raise NoRule("repeats that differ")
    dim %= len(x.shape)
    return (*x.axes[:dim], repeated(x.axes[dim], times), *x.axes[dim + 1 :])


def pixel_shuffle(call: Call) -> Axes:
    """(..., C r r, H, W) -> (..., C, H r, W r): the r r channels of one output go together."""
    x, factor = call.value("self"), call.plain("upscale_factor")
    call.masked = x.masked
    for space in x.axes[-2:]:
        call.freeze(space, "is shuffled into space")
    return (*x.axes[:-3], call.tie_blocks(x.axes[-3], x.shape[-3] // factor**2), None, None)


def pixel_unshuffle(call: Call) -> Axes:
    """(..., C, H r, W r) -> (..., C r r, H, W)."""
    x, factor = call.value("self"), call.plain("downscale_factor")
    call.masked = x.masked
    for space in x.axes[-2:]:
        call.freeze(space, "is shuffled into channels")
    return (*x.axes[:-3], repeated(x.axes[-3], factor**2), None, None)


def channel_shuffle(call: Call) -> Axes:
    """(N, g c, ...) -> channels in the order of (c, g): the same positions of all groups go together."""
    x, groups = call.value("self"), call.plain("groups")
    call.masked = x.masked
    return (x.axes[0], repeated(call.tie_parts(x.axes[1], groups), groups), *x.axes[2:])


RULES: dict[str, Rule] = dict.fromkeys(
    ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "ravel"), view
)
RULES |= dict.fromkeys(("view_as", "reshape_as"), view_as)
RULES |= dict.fromkeys(("roll", "flip"), same)
RULES |= dict.fromkeys(("transpose", "t", "swapaxes", "swapdims", "numpy_T"), transpose)
RULES |= {
    "permute": permute,
    "movedim": movedim,
    "moveaxis": movedim,
    "unsqueeze": unsqueeze,
    "expand": expand,
    "expand_as": expand_as,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
}
