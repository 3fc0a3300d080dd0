"""A free batch in a file whose sizes are fixed.

A file written for one example has the one in its shapes: `Reshape` to [1, 196, 768]. Where the batch stands in such a
shape follows from the values of two examples beside those of the first alone: as many numbers lie before it in the
output as in the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class FixedBatch(Exception):
    """The computation cannot be made for other numbers of examples."""


def across_batches(now: Tensor, two: Tensor | None, target: Sequence[int]) -> list[int]:
    """The target shape of a reshape with -1 where the batch is.

    now, two: the input for one batch, and for that and another one (None: the batch is fixed).
    target: for one batch, all sizes known. raises: FixedBatch when the batch is in no one place.
    """
    if two is None or now.shape == two.shape:
        return list(target)
    outer, before = _numbers_before_batch(now, two), 1
    for axis, size in enumerate(target):
        last = axis == len(target) - 1
        # Between two axes it joins the left one rather than the last, which are features.
        here = before < outer < before * size or (before == outer and (size == 1 or not last or axis == 0))
        if here or last:
            free = axis if here else axis - 1
            return [*target[:free], -1, *target[free + 1 :]]
        before *= size
    raise FixedBatch("the batch disappears in a reshape")


def _numbers_before_batch(now: Tensor, two: Tensor) -> int:
    """How many numbers of one example lie before the batch: with those of its own axis, where others share that."""
    grown = [axis for axis, (a, b) in enumerate(zip(now.shape, two.shape, strict=True)) if a != b]
    if len(grown) > 1:
        raise FixedBatch("the batch is in several axes")
    (axis,) = grown
    size = int(now.shape[axis])
    for outer in (part for part in (1, size, *range(2, size)) if size % part == 0):
        first = two.unflatten(axis, (outer, 2, size // outer)).select(axis + 1, 0).flatten(axis, axis + 1)
        if torch.allclose(first, now, rtol=1e-3, atol=1e-5):
            return int(prod(now.shape[:axis]) * outer)
    raise FixedBatch("examples are mixed")


def with_batch(constant: Tensor, other: Tensor) -> Tensor:
    """A constant of one example for as many as the other tensor has."""
    return constant.expand(other.shape[0], *constant.shape[1:])
