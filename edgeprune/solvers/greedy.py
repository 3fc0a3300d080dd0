"""Step by step from the dense network, always where a unit of cost is cheapest in loss.

The rule of NetAdapt (Yang et al., ECCV 2018, arXiv:1804.03230) on predicted loss and measured tables,
for several budgets at once.
"""

from __future__ import annotations

import time

import numpy as np

from edgeprune.core.problem import TOLERANCE, Problem, costs_of, losses_of
from edgeprune.core.records import FloatArray, IntArray
from edgeprune.solvers import Solution


def solve(problem: Problem, *, time_limit_s: float = 20.0) -> Solution:
    """Narrow one group at a time, by any number of levels, until every budget is met.

    A step's gain is the fall of the summed relative excess over the budgets that are not yet met; the
    step with the least loss per gain is taken. Several levels at once are steps of their own,
    because on a staircase one level may gain nothing.
    """
    start = time.perf_counter()
    limits = np.array([row.limit for row in problem.rows])
    levels = np.array(problem.dense)

    def over(batch: IntArray) -> FloatArray:
        relative = costs_of(problem, batch) / limits - 1
        total: FloatArray = np.where(relative > TOLERANCE, relative, 0.0).sum(axis=-1)
        return total

    while (excess := over(levels)) > 0:
        steps = np.array([(v, lower) for v, level in enumerate(levels) for lower in range(level)], dtype=np.int64)
        steps = steps.reshape(-1, 2)
        batch = np.repeat(levels[None], len(steps), axis=0)
        batch[np.arange(len(steps)), steps[:, 0]] = steps[:, 1]
        gain = excess - over(batch)
        useful = np.flatnonzero(gain > 0)
        if not len(useful) or time.perf_counter() - start > time_limit_s:
            return Solution(levels=None, loss=np.inf, status="unknown", seconds=time.perf_counter() - start)
        price = (losses_of(problem, batch[useful]) - losses_of(problem, levels)) / gain[useful]
        levels = batch[useful[np.argmin(price)]]
    return Solution(
        levels=tuple(levels.tolist()),
        loss=float(losses_of(problem, levels)),
        status="feasible",
        seconds=time.perf_counter() - start,
    )
