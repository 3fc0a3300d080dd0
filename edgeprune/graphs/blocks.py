"""Orders of channels that gather what layers compute with in diagonal blocks: alternating assignments.

A layer in G blocks reads, for each G-th of its outputs, the same G-th of its inputs alone. Which channels stand in
which block is free, as far as the order of a group of channels is: all layers that write or read the group take it.
One group at a time is assigned anew, with all others where they are: what each unit would keep at each place is a
matrix, and the best order the maximum of a linear assignment. So nothing is lost by a step, and what the order that
there is keeps is never undercut.

source: pruning by matrix pivoting, of which only the idea is known here (rows and columns of a weight permuted so that
what is large gathers in blocks, the rest pruned). The search, over all layers of a net at once, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from edgeprune.core.records import FloatArray, Group, IntArray

ROUNDS = 20
"""Passes over all groups at most; few are needed."""
LEAST_GAIN = 1e-9
Axis = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Mass:
    """A layer as the search sees it.

    share: (outputs, inputs) >= 0, what each pair of channels is worth, of a sum of 1. parts: into how many blocks the
    layer may be cut; several count alike.
    """

    share: FloatArray
    parts: tuple[int, ...]


def find_orders(
    layers: Mapping[str, Mass], groups: Sequence[Group], *, restarts: int = 3, seed: int = 0
) -> dict[str, IntArray]:
    """Orders of units with which the diagonal blocks of all layers together keep most.

    layers: by the state-dict key of their weight. groups: those whose order is free. restarts: random orders to start
        from, besides the one that there is.
    returns: per group whose order changes, (units,): unit order[i] comes to place i.
    """
    best = _Arrangement(layers, groups)
    best.improve()
    rng = np.random.default_rng(seed)
    for _ in range(restarts):
        other = _Arrangement(layers, groups)
        other.shuffle(rng)
        other.improve()
        if other.kept() > best.kept() + LEAST_GAIN:
            best = other
    return {name: order for name, order in best.orders.items() if (order != np.arange(len(order))).any()}


def own_columns(share: FloatArray, parts: int) -> IntArray:
    """The order of a layer's inputs that keeps most for its outputs as they are: exact.

    share: (outputs, inputs). returns: (inputs,): input columns[i] comes to place i; ascending in each block.
    """
    sums = share.reshape(parts, -1, share.shape[1]).sum(axis=1)
    size = share.shape[1] // parts
    columns = _best_order(np.repeat(sums.T, size, axis=1))
    return np.sort(columns.reshape(parts, size), axis=1).ravel()


def kept_share(share: FloatArray, parts: int) -> float:
    """What the diagonal blocks hold, in [0, 1]."""
    outputs, inputs = share.shape
    blocks = share.reshape(parts, outputs // parts, parts, inputs // parts)
    return float(np.einsum("bibj->", blocks))


def _best_order(worth: FloatArray) -> IntArray:
    """Which unit comes to each place. worth: (units, places).

    Units are the rows: places of one block are all alike, and columns that are cost the solver little, where rows that
    are take it ten times as long.
    """
    places = linear_sum_assignment(worth, maximize=True)[1]
    return np.argsort(places).astype(np.int64)


class _Arrangement:
    """Every group in some order, and what the blocks of all layers keep."""

    def __init__(self, layers: Mapping[str, Mass], groups: Sequence[Group]) -> None:
        self.layers = layers
        self.orders = {group.name: np.arange(group.units) for group in groups}
        self._at: dict[Axis, IntArray] = {
            (key, axis): np.arange(size) for key, layer in layers.items() for axis, size in enumerate(layer.share.shape)
        }
        self._places: dict[str, list[tuple[Axis, IntArray]]] = {
            group.name: [((m.parameter, m.axis), m.index) for m in group.members if (m.parameter, m.axis) in self._at]
            for group in groups
        }

    def kept(self, keys: Sequence[str] | None = None) -> float:
        """Mean kept share over numbers of blocks, summed over layers."""
        total = 0.0
        for key in self.layers if keys is None else keys:
            layer = self.layers[key]
            share = layer.share[self._at[key, 0]][:, self._at[key, 1]]
            total += float(np.mean([kept_share(share, parts) for parts in layer.parts]))
        return total

    def shuffle(self, rng: np.random.Generator) -> None:
        """Put every group in a random order."""
        for name, places in self._places.items():
            if places:
                self._put(name, rng.permutation(len(self.orders[name])))

    def improve(self) -> None:
        """Assign group after group anew until none gains."""
        for _ in range(ROUNDS):
            gained = False
            for name, places in self._places.items():
                if places:
                    gained |= self._assign(name)
            if not gained:
                return

    def _assign(self, name: str) -> bool:
        keys = list(dict.fromkeys(key for (key, _), _ in self._places[name]))
        before, order = self.kept(keys), self.orders[name]
        self._put(name, _best_order(self._worth(name)))
        # A group that is read and written by one layer moves both of its axes, of which each expects the other to stay.
        if self.kept(keys) > before + LEAST_GAIN:
            return True
        self._put(name, order)
        return False

    def _worth(self, name: str) -> FloatArray:
        """(units, places): what a unit keeps at a place, with all else where it is."""
        units = len(self.orders[name])
        worth = np.zeros((units, units))
        for (key, axis), index in self._places[name]:
            layer = self.layers[key]
            share = layer.share if axis == 0 else layer.share.T
            ordered = share[:, self._at[key, 1 - axis]]
            for parts in layer.parts:
                sums = ordered.reshape(len(share), parts, -1).sum(axis=2) / len(layer.parts)
                block = index * parts // len(share)
                for copy in range(index.shape[1]):
                    worth += sums[index[:, copy]][:, block[:, copy]]
        return worth

    def _put(self, name: str, order: IntArray) -> None:
        self.orders[name] = order
        for axis, index in self._places[name]:
            self._at[axis][index.ravel()] = index[order].ravel()
