"""Union-find over integer ids in numpy: which channels can only be removed together."""

from __future__ import annotations

import numpy as np

from edgeprune.core.records import IntArray


class Units:
    """Disjoint sets of ids, each with an optional reason to stay whole (frozen) or to be handled with care (inexact).

    source: union by smallest id with pointer jumping, after Shiloach & Vishkin 1982.
    """

    def __init__(self) -> None:
        self._parent: IntArray = np.zeros(0, np.int64)
        self._frozen: list[tuple[IntArray, str]] = []
        self._inexact: list[tuple[IntArray, str]] = []

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int) -> IntArray:
        """(count,) new ids, each a set of its own."""
        ids = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def find(self, ids: IntArray) -> IntArray:
        """The root of each id; same shape as `ids`."""
        roots: IntArray = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def union(self, left: IntArray, right: IntArray) -> None:
        """Merge the sets of left[i] and right[i] for every i; shapes broadcast."""
        left, right = (side.ravel() for side in np.broadcast_arrays(left, right))
        while True:
            a, b = self.find(left), self.find(right)
            if not (differ := a != b).any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self._parent, high, low)

    def freeze(self, ids: IntArray, reason: str) -> None:
        """Keep every unit that one of `ids` belongs to, now or after later unions."""
        self._frozen.append((ids.ravel(), reason))

    def mark_inexact(self, ids: IntArray, reason: str) -> None:
        """Note that removing these units changes more than the removed channels."""
        self._inexact.append((ids.ravel(), reason))

    def frozen(self) -> dict[int, str]:
        """Root -> the first reason given."""
        return self._by_root(self._frozen)

    def inexact(self) -> dict[int, str]:
        """Root -> the first reason given."""
        return self._by_root(self._inexact)

    def _by_root(self, marks: list[tuple[IntArray, str]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, reason in marks:
            for root in np.unique(self.find(ids)).tolist():
                reasons.setdefault(root, reason)
        return reasons
