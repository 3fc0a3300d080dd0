"""A knapsack of widths, narrowed in rounds: the baseline of HALP (Shen et al., NeurIPS 2022, arXiv:2110.10811).

With every other group as it is now, each level of a group saves a fixed cost; choosing one level per
group of least loss that saves enough is a multiple-choice knapsack, solved exactly over integer buckets
of cost. A kernel's cost is a product of two widths, though, so the savings are right for one change at
a time only: the limit is approached in rounds, and the costs are taken anew in each.
"""

from __future__ import annotations

import time

import numpy as np

from edgeprune.core.problem import TOLERANCE, Problem, costs_of, losses_of
from edgeprune.core.records import FloatArray, IntArray
from edgeprune.solvers import Solution

BUCKETS = 1000
"""Integer savings per round."""


def solve(problem: Problem, *, time_limit_s: float = 20.0, rounds: int = 30) -> Solution:
    """Narrow from the dense network to the limits in equal parts; no group is ever widened again.

    rounds: knapsacks from the dense cost to the limit; further ones follow while true costs exceed it.
    source: HALP knows one limit and counts a layer's saving by its outputs only. Ours: of several limits the
        most exceeded is approached, and a group's saving is that of every kernel it touches.
    """
    start = time.perf_counter()
    limits = np.array([row.limit for row in problem.rows])
    levels = np.array(problem.dense)
    dense = costs_of(problem, levels)
    for done in range(1, rounds + 1):
        aims = dense + (limits - dense) * done / rounds
        aims = np.where(dense > limits, aims, limits)
        while len(limits):
            costs = costs_of(problem, levels)
            row = int(np.argmax(costs / aims))
            if costs[row] <= aims[row] * (1 + TOLERANCE):
                break
            narrower = _knapsack(problem, levels, row, float(costs[row] - aims[row]))
            if np.array_equal(narrower, levels) or time.perf_counter() - start > time_limit_s:
                return Solution(levels=None, loss=np.inf, status="unknown", seconds=time.perf_counter() - start)
            levels = narrower
    return Solution(
        levels=tuple(levels.tolist()),
        loss=float(losses_of(problem, levels)),
        status="feasible",
        seconds=time.perf_counter() - start,
    )


def _knapsack(problem: Problem, levels: IntArray, row: int, needed: float) -> IntArray:
    """Levels of least loss, none above those given, that save `needed` of a row with all else as given.

    Where they cannot (savings are rounded down to buckets), those that save most.
    """
    least = np.full(BUCKETS + 1, np.inf)  # loss by what is saved so far; the last bucket: enough
    least[0] = 0.0
    buckets = np.arange(BUCKETS + 1)
    choices: list[tuple[IntArray, IntArray]] = []  # per group and bucket: its level, and the bucket before it
    for v in range(len(levels)):
        loss, pick, before = np.full(BUCKETS + 1, np.inf), buckets * 0, buckets * 0
        savings = _savings(problem, levels, v, row) / needed * BUCKETS * (1 + TOLERANCE)
        for level in range(levels[v], -1, -1):  # of equals the widest
            if savings[level] < 0:
                continue
            saved = int(min(savings[level], BUCKETS))
            moved, source = np.full(BUCKETS + 1, np.inf), buckets - saved
            moved[saved:] = least[: BUCKETS + 1 - saved]
            source[-1] = BUCKETS - saved + int(np.argmin(least[BUCKETS - saved :]))
            moved[-1] = least[source[-1]]
            moved += problem.choices[v].loss[level]
            better = moved < loss
            loss, pick, before = (np.where(better, *pair) for pair in ((moved, loss), (level, pick), (source, before)))
        least = loss
        choices.append((pick, before))
    bucket = int(np.flatnonzero(np.isfinite(least))[-1])
    chosen = levels.copy()
    for v, (pick, before) in reversed(list(enumerate(choices))):
        chosen[v], bucket = pick[bucket], before[bucket]
    return chosen


def _savings(problem: Problem, levels: IntArray, v: int, row: int) -> FloatArray:
    """Cost that each level of group v up to its present one saves, the others as they are."""
    batch = np.repeat(levels[None], levels[v] + 1, axis=0)
    batch[:, v] = np.arange(levels[v] + 1)
    costs = costs_of(problem, batch)[:, row]
    saved: FloatArray = costs[-1] - costs
    return saved
