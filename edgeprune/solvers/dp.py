"""Exact without relaxation: dynamic programming over the groups with Pareto fronts.

Groups are decided one after the other in their order. Partial decisions that agree on every group which
a later cost term still needs compete: one that loses no less and costs no less in every row than another
is dropped. Exact for any number of limits and for shared axes. Meant for small nets and as a check of
the other solvers: the fronts grow with the number of limits and the tables with how many
groups are open at once (one or two in chains and residual stages).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.core.problem import TOLERANCE, Problem, is_feasible
from edgeprune.core.records import FloatArray, IntArray
from edgeprune.solvers import Solution


def solve(problem: Problem, *, time_limit_s: float = 20.0, most: int = 2_000_000) -> Solution:
    """The optimum, or `unknown` when it takes too long.

    most: partial decisions that are too many to hold at once.
    """
    start = time.perf_counter()
    terms = _terms(problem)
    limits = np.array([row.limit for row in problem.rows]) * (1 + TOLERANCE)
    levels = np.zeros((1, 0), dtype=np.int64)
    loss = np.zeros(1)
    costs = np.array([[row.constant for row in problem.rows]])
    for v, choice in enumerate(problem.choices):
        count = len(choice.widths)
        if len(levels) * count > most or time.perf_counter() - start > time_limit_s:
            return Solution(levels=None, loss=np.inf, status="unknown", seconds=time.perf_counter() - start)
        levels = np.column_stack([np.repeat(levels, count, axis=0), np.tile(np.arange(count), len(levels))])
        loss = np.repeat(loss, count) + choice.loss[levels[:, v]]
        costs = np.repeat(costs, count, axis=0)
        open_rows = np.zeros(len(limits), dtype=bool)
        least = np.zeros(len(limits))
        for term in terms:
            if term.groups[-1] == v:
                costs[:, term.row] += term.values(problem, levels)
            elif term.groups[-1] > v:
                open_rows[term.row] = True
                least[term.row] += term.matrix.min()
        fits = (costs + least <= limits).all(axis=1)
        levels, loss, costs = levels[fits], loss[fits], costs[fits]
        needed = sorted({group for term in terms if term.groups[-1] > v for group in term.groups if group <= v})
        kept = _undominated(levels[:, needed], np.column_stack([loss, costs[:, open_rows]]))
        levels, loss, costs = levels[kept], loss[kept], costs[kept]
    seconds = time.perf_counter() - start
    order = np.argsort(loss, kind="stable")
    order = order[is_feasible(problem, levels[order])] if len(order) else order
    if not len(order):
        return Solution(levels=None, loss=np.inf, status="infeasible", seconds=seconds)
    best = order[0]
    return Solution(
        levels=tuple(levels[best].tolist()), loss=float(loss[best]), status="optimal", gap=0.0, seconds=seconds
    )


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand of one row: a matrix over one or two variables, which rest on `groups`, ascending."""

    row: int
    variables: tuple[int, ...]
    matrix: FloatArray
    groups: tuple[int, ...]

    def values(self, problem: Problem, levels: IntArray) -> FloatArray:
        """Value for each of the decisions (n, groups so far)."""
        result: FloatArray = self.matrix[tuple(_state(problem, levels, v) for v in self.variables)]
        return result


def _state(problem: Problem, levels: IntArray, v: int) -> IntArray:
    """Level of one variable, which may be the size of a shared axis."""
    if v < len(problem.choices):
        return levels[:, v]
    total = problem.sums[v - len(problem.choices)]
    size = total.fixed + sum(count * problem.choices[u].widths[levels[:, u]] for u, count in total.counts)
    return np.searchsorted(total.sizes, size).astype(np.int64)


def _terms(problem: Problem) -> list[_Term]:
    """All summands, with the groups that decide them."""

    def groups(variables: Sequence[int]) -> tuple[int, ...]:
        first_sum = len(problem.choices)
        found = {v for v in variables if v < first_sum}
        found |= {u for v in variables if v >= first_sum for u, _ in problem.sums[v - first_sum].counts}
        return tuple(sorted(found))

    terms: list[_Term] = []
    for index, row in enumerate(problem.rows):
        terms += [_Term(index, (v,), values, groups((v,))) for v, values in row.unary.items()]
        terms += [_Term(index, pair, matrix, groups(pair)) for pair, matrix in row.pairs.items()]
    return terms


def _undominated(keys: IntArray, vectors: FloatArray) -> IntArray:
    """Indices of the vectors that no other of the same key matches or beats in every entry."""
    if not len(vectors):
        return np.zeros(0, dtype=np.int64)
    group = np.unique(keys, axis=0, return_inverse=True)[1].ravel() if keys.shape[1] else np.zeros(len(vectors), int)
    order = np.lexsort((*vectors.T[::-1], group))
    kept: list[int] = []
    for block in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        rest = block
        while len(rest):
            kept.append(int(rest[0]))
            rest = rest[(vectors[rest] < vectors[rest[0]]).any(axis=1)]
    return np.array(kept, dtype=np.int64)
