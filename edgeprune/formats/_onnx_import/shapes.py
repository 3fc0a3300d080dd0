"""ONNX operators that move numbers: reshape, slice, gather, concatenation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.core.tensors import Array
from edgeprune.formats._onnx_import.batch import across_batches
from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported


def _reshape(op: Operation) -> Result:
    x, target = op.tensor(0), op.integers(1, "shape") or []
    if not op.attribute("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    known = prod(size for size in target if size != -1)
    target = [prod(x.shape) // known if size == -1 else size for size in target]
    return op.call(torch.reshape, x, across_batches(x.now, x.two, target))


def _flatten(op: Operation) -> Result:
    x = op.flow(0)
    axis = op.attribute("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1:
        return op.call(torch.flatten, x, 1)
    target = [prod(x.shape[:axis]), prod(x.shape[axis:])]
    return op.call(torch.reshape, x, across_batches(x.now, x.two, target))


def _transpose(op: Operation) -> Result:
    order = op.attribute("perm", list(reversed(range(op.flow(0).rank))))
    return op.call(torch.permute, op.flow(0), list(order))


def _squeeze(op: Operation) -> Result:
    axes = op.integers(1, "axes")
    axes = [axis for axis, size in enumerate(op.flow(0).shape) if size == 1] if axes is None else axes
    return op.call(torch.squeeze, op.flow(0), tuple(axes))


def _unsqueeze(op: Operation) -> Result:
    axes, result = op.integers(1, "axes") or [], op.flow(0)
    for axis in sorted(axis % (result.rank + len(axes)) for axis in axes):
        result = op.call(torch.unsqueeze, result, axis)
    return result


def _concat(op: Operation) -> Result:
    """Constants, such as class tokens, are repeated for every example."""
    places = range(len(op.inputs))
    first = next(op.flow(index) for index in places if not op.is_constant(index))
    axis = op.attribute("axis") % first.rank
    return op.call(torch.cat, [op.beside(index, first) if axis else op.tensor(index) for index in places], axis)


def _split(op: Operation) -> Result:
    axis = op.attribute("axis", 0) % op.flow(0).rank
    size, sizes = op.flow(0).shape[axis], op.integers(1, "split")
    if sizes is None:
        each = -(-size // op.outputs)
        sizes = [min(each, size - start) for start in range(0, size, each)]
    parts = op.call(torch.split, op.flow(0), sizes, axis)
    return tuple(op.call(operator.getitem, parts, item) for item in range(op.outputs))


def _slice(op: Operation) -> Result:
    x = op.flow(0)
    starts, ends = op.integers(1, "starts") or [], op.integers(2, "ends") or []
    axes = op.integers(3, "axes") or list(range(len(starts)))
    steps = op.integers(4, "steps") or [1] * len(starts)
    cuts = [slice(None)] * x.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            if (start, step) not in ((-1, -1), (size - 1, -1)) or end > -size:
                raise Unsupported("steps backwards over a part")
            x = op.call(torch.flip, x, [axis])
            continue
        low = min(max(start + size if start < 0 else start, 0), size)
        high = min(max(end + size if end < 0 else end, 0), size)
        cuts[axis] = slice(low or None, None if high == size else high, None if step == 1 else step)
    return x if cuts == [slice(None)] * x.rank else op.call(operator.getitem, x, tuple(cuts))


def _gather(op: Operation) -> Result:
    """An index along an axis, a run of them, or any; whole numbers that look up a table are an embedding."""
    if op.is_constant(0):
        if op.attribute("axis", 0) or op.constant(0).ndim != 2:
            raise Unsupported("looking up anything but rows of a matrix")
        return op.call(functional.embedding, op.flow(1), op.layer_weight(0, "weight"))
    x = op.flow(0)
    axis = op.attribute("axis", 0) % x.rank
    if not op.is_constant(1):
        if axis or op.tensor(1).rank != 1:
            raise Unsupported("indices that are computed, along an axis that is not the first")
        return op.call(torch.index_select, x, 0, op.tensor(1))
    wanted = op.constant(1)
    if wanted.ndim == 0:
        return op.call(torch.select, x, axis, int(wanted))
    positions = np.where(wanted < 0, wanted + x.shape[axis], wanted)
    if x.rank == 1 and np.array_equal(positions.reshape(-1), np.arange(x.shape[0])):  # how torch writes as_strided
        return op.call(torch.reshape, x, across_batches(x.now, x.two, positions.shape))
    before = (slice(None),) * axis
    if positions.ndim == 1 and len(positions) and (np.diff(positions) == 1).all():
        return op.call(operator.getitem, x, (*before, slice(int(positions[0]), int(positions[-1]) + 1)))
    return op.call(operator.getitem, x, (*before, op.buffer(positions)))


def _gather_nd(op: Operation) -> Result:
    if op.attribute("batch_dims", 0):
        raise Unsupported("batch_dims")
    return op.call(operator.getitem, op.flow(0), tuple(op.buffer(axis) for axis in np.moveaxis(op.constant(1), -1, 0)))


def _gather_elements(op: Operation) -> Result:
    return op.call(torch.gather, op.flow(0), op.attribute("axis", 0), op.beside(1, op.flow(0)))


def _scatter_nd(op: Operation) -> Result:
    """Values written at known places; those that make up a block are an assignment, for any number of examples."""
    if op.attribute("reduction", "none") != "none":
        raise Unsupported("a reduction")
    x, places = op.tensor(0), op.constant(1)
    places = np.where(places < 0, places + np.array(x.shape[: places.shape[-1]]), places)
    if (cuts := _block(places, x.shape)) is not None:
        return op.call(_assign, x, cuts, op.tensor(2))
    return op.call(torch.index_put, x, tuple(op.buffer(axis) for axis in np.moveaxis(places, -1, 0)), op.tensor(2))


def _block(places: Array, shape: Sequence[int]) -> tuple[slice, ...] | None:
    """The slices whose product the places are, in order; None where they are none."""
    if places.ndim - 1 != places.shape[-1] or not places.size:
        return None
    cuts = []
    for axis, size in enumerate(places.shape[:-1]):
        line = np.moveaxis(places[..., axis], axis, 0).reshape(size, -1)
        step = int(line[1, 0] - line[0, 0]) if size > 1 else 1
        if step < 1 or (line != line[:, :1]).any() or (np.diff(line[:, 0]) != step).any():
            return None
        whole = size == shape[axis]
        cuts.append(slice(None) if whole else slice(int(line[0, 0]), int(line[-1, 0]) + 1, step))
    return tuple(cuts)


def _assign(x: Tensor, cuts: tuple[slice, ...], values: Tensor) -> Tensor:
    written = x.clone()
    written[cuts] = values
    return written


def _scatter_elements(op: Operation) -> Result:
    if op.attribute("reduction", "none") != "none":
        raise Unsupported("a reduction")
    x = op.tensor(0)
    return op.call(torch.scatter, x, op.attribute("axis", 0), op.beside(1, x), op.beside(2, x))


def _expand(op: Operation) -> Result:
    """Its own sizes stay its own (-1), so that the batch among them is free."""
    x, wanted = op.tensor(0), op.integers(1, "shape") or []
    sizes = np.broadcast_shapes(x.shape, tuple(wanted))
    own = (1,) * (len(sizes) - x.rank) + tuple(x.shape)
    new = len(sizes) - x.rank
    target = [-1 if axis >= new and own[axis] == size else size for axis, size in enumerate(sizes)]
    return x if target == [-1] * x.rank else op.call(torch.Tensor.expand, x, target)


def _tile(op: Operation) -> Result:
    times = op.integers(1, "repeats") or []
    return op.flow(0) if set(times) == {1} else op.call(torch.Tensor.repeat, op.flow(0), times)


def _pad(op: Operation) -> Result:
    x, pads = op.flow(0), op.integers(1, "pads") or []
    axes = op.integers(3, "axes") or list(range(x.rank))
    amounts = {axis % x.rank: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    changed = [axis for axis, pair in amounts.items() if any(pair)]
    if not changed:
        return x
    pairs = [amount for axis in reversed(range(min(changed), x.rank)) for amount in amounts.get(axis, (0, 0))]
    mode = {"edge": "replicate", "wrap": "circular"}.get(op.attribute("mode", "constant"), op.attribute("mode", ""))
    if mode in ("", "constant"):
        return op.call(functional.pad, x, pairs, value=op.number(2, "value") or 0.0)
    return op.call(functional.pad, x, pairs, mode=mode)


def _col2im(op: Operation) -> Result:
    image, block = op.integers(1, "image_shape") or [], op.integers(2, "block_shape") or []
    pads = op.attribute("pads", [0] * 2 * len(block))
    if len(block) != 2 or pads[:2] != pads[2:]:
        raise Unsupported("other than two axes, or pads that are not symmetric")
    strides, dilations = op.attribute("strides", [1, 1]), op.attribute("dilations", [1, 1])
    return op.call(functional.fold, op.flow(0), image, block, dilations, pads[:2], strides)


def _depth_to_space(op: Operation) -> Result:
    block, x = op.attribute("blocksize"), op.flow(0)
    if op.attribute("mode", "DCR") == "CRD":
        return op.call(functional.pixel_shuffle, x, block)
    channels = x.shape[1] // block**2
    split = op.call(torch.reshape, x, [-1, block, block, channels, *x.shape[2:]])
    moved = op.call(torch.permute, split, [0, 3, 4, 1, 5, 2])
    return op.call(torch.reshape, moved, [-1, channels, x.shape[2] * block, x.shape[3] * block])


def _space_to_depth(op: Operation) -> Result:
    block, x = op.attribute("blocksize"), op.flow(0)
    channels, height, width = x.shape[1:]
    split = op.call(torch.reshape, x, [-1, channels, height // block, block, width // block, block])
    moved = op.call(torch.permute, split, [0, 3, 5, 1, 2, 4])
    return op.call(torch.reshape, moved, [-1, channels * block**2, height // block, width // block])


def _triangle(op: Operation) -> Result:
    function = torch.triu if op.attribute("upper", 1) else torch.tril
    return op.call(function, op.flow(0), int(op.number(1, "k") or 0))


OPERATORS: dict[str, Operator] = {
    "Col2Im": _col2im,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
}
