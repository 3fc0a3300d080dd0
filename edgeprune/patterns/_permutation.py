"""Orders of input channels that keep more magnitude under N:M: greedy swaps between stripes of M channels.

source: Pool & Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021, sec. 4 (swaps; without its escapes). All layers
that read the channels of a group decide together (ours), since they take the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from edgeprune.core.records import Graph, Group, IntArray, Member
from edgeprune.patterns._layers import Layer

MOST_ROWS = 512
"""Rows of all layers that a swap is judged on; evenly spaced ones where there are more."""
SWAPS_PER_STRIPE = 8
"""Bound on the search."""
LEAST_GAIN = 1e-6
"""Of the whole magnitude, for a swap to be worth it."""


def better_orders(layers: Mapping[str, Layer], graph: Graph, n: int, m: int) -> dict[str, IntArray]:
    """Per group that gains: unit order[i] comes to place i. Groups that cannot be reordered exactly are left out."""
    found = {}
    for group in graph.prunable:
        if not _reorderable(group, m):
            continue
        rows = _rows_reading(group, layers, m)
        if rows is None:
            continue
        order = find_order(rows[:: -(-len(rows) // MOST_ROWS)], n, m)
        if kept(rows[:, order], n, m) > kept(rows, n, m) * (1 + LEAST_GAIN):
            found[group.name] = order.cpu().numpy().astype(np.int64)
    return found


def kept(rows: Tensor, n: int, m: int) -> float:
    """Magnitude that N:M leaves of (rows, columns)."""
    return float(rows.unflatten(1, (-1, m)).topk(n, dim=2).values.double().sum())


def find_order(rows: Tensor, n: int, m: int) -> Tensor:
    """Columns of (rows, columns >= 0) in an order that keeps more; the best swap of two of them at a time.

    returns: (columns,) indices. In a stripe they stay ascending, as their order there does not matter.
    """
    count = rows.shape[1] // m
    order = torch.arange(rows.shape[1], device=rows.device).view(count, m)
    if count < 2:
        return order.flatten()
    left, right = torch.triu_indices(count, count, 1, device=rows.device)
    gains, swaps = _best_swaps(rows, order, left, right, n)
    least = LEAST_GAIN * float(rows.sum())
    for _ in range(SWAPS_PER_STRIPE * count):
        best = int(gains.argmax())
        if float(gains[best]) <= least:
            break
        i, j = int(left[best]), int(right[best])
        a, b = divmod(int(swaps[best]), m)
        order[i, a], order[j, b] = order[j, b].clone(), order[i, a].clone()
        touched = (left == i) | (right == i) | (left == j) | (right == j)
        gains[touched], swaps[touched] = _best_swaps(rows, order, left[touched], right[touched], n)
    return order.sort(dim=1).values.flatten()


def _best_swaps(rows: Tensor, order: Tensor, left: Tensor, right: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each pair of stripes what its best swap gains, and the swap as a x M + b."""
    m = order.shape[1]

    def magnitude(stripes: Tensor) -> Tensor:
        return rows[:, stripes].topk(n, dim=2).values.sum(dim=(0, 2))

    before = magnitude(order)[left] + magnitude(order)[right]
    after = []
    for a in range(m):
        for b in range(m):
            mine, theirs = order[left].clone(), order[right].clone()
            mine[:, a], theirs[:, b] = order[right][:, b], order[left][:, a]
            # Pairs in parts: all at once would hold rows x pairs x M numbers.
            parts = zip(mine.split(256), theirs.split(256), strict=True)
            after.append(torch.cat([magnitude(x) + magnitude(y) for x, y in parts]))
    best = torch.stack(after).max(dim=0)
    return best.values - before, best.indices


def _reorderable(group: Group, m: int) -> bool:
    """Whether any order of the units gives the same model: nothing is split among them, no grouped convolution."""
    uniform = all((constant.count == constant.count[0]).all() for constant in group.constants)
    return group.step == 1 and group.units > m and group.units % m == 0 and uniform


def _rows_reading(group: Group, layers: Mapping[str, Layer], m: int) -> Tensor | None:
    """Magnitudes (rows, units) of all weights that the pattern chooses by stripes of units, or None to leave it."""
    rows = []
    for member in group.members:
        layer = layers.get(member.parameter)
        if layer is None or member.axis != (0 if layer.transposed else 1):
            continue
        if _whole_stripes(member, m):
            continue  # a unit is several stripes: they stay together in any order
        channels = layer.matrix().shape[2]
        first = int(member.index[0, 0])
        regular = member.index.shape[1] == 1 and np.array_equal(member.index[:, 0], first + np.arange(group.units))
        if not regular or first % m or first + group.units > channels:
            return None
        part = layer.matrix()[..., first : first + group.units]
        rows.append(part.reshape(-1, group.units).abs())
    return torch.cat(rows) if rows else None


def _whole_stripes(member: Member, m: int) -> bool:
    index = member.index
    return (
        index.shape[1] % m == 0
        and bool((index == index[:, :1] + np.arange(index.shape[1])).all())
        and not bool((index[:, 0] % m).any())
    )
