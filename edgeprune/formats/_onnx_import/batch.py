"""A free batch in a file whose sizes are fixed.

A file written for one example has the one in its shapes: `Reshape` to [1, 196, 768]. Where the batch stands in such a
shape follows from the input's axis that grows when there are two examples: the same numbers lie before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor


class FixedBatch(Exception):
    """The computation cannot be made for other numbers of examples."""


def across_batches(one: Sequence[int], two: Sequence[int] | None, target: Sequence[int]) -> list[int]:
    """The target shape of a reshape with -1 where the batch is.

    one, two: shapes of the input for one batch and for one of twice the size (None: the batch is fixed).
    target: for one batch, all sizes known. raises: FixedBatch when several axes grow.
    """
    grown = [axis for axis, (a, b) in enumerate(zip(one, two or one, strict=True)) if a != b]
    if not grown:
        return list(target)
    if len(grown) > 1:
        raise FixedBatch("the batch is in several axes")
    outer, before = prod(one[: grown[0]]), 1
    for axis, size in enumerate(target):
        if before == outer or before < outer < before * size:
            return [*target[:axis], -1, *target[axis + 1 :]]
        before *= size
    raise FixedBatch("the batch disappears in a reshape")


def with_batch(constant: Tensor, other: Tensor) -> Tensor:
    """A constant of one example for as many as the other tensor has."""
    return constant.expand(other.shape[0], *constant.shape[1:])
