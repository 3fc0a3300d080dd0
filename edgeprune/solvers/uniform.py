"""One width multiplier for the whole network: the largest that fits."""

from __future__ import annotations

import time

import numpy as np

from edgeprune.core.problem import Problem, is_feasible, losses_of
from edgeprune.solvers import Solution


def solve(problem: Problem, *, time_limit_s: float = 20.0) -> Solution:  # noqa: ARG001 the contract has it
    """Every group at the widest level within multiplier x its full width, at least its narrowest; every branch stays.

    All distinct multipliers are tried, so time_limit_s is not needed.
    """
    start = time.perf_counter()
    ratios = [choice.widths / choice.widths[-1] for choice in problem.choices]
    multipliers = np.unique(np.concatenate([*ratios, [1.0]]))
    levels = np.stack([np.searchsorted(ratio, multipliers, side="right") - 1 for ratio in ratios], axis=1).clip(0)
    levels[:, [choice.is_branch for choice in problem.choices]] = 1
    fitting = np.flatnonzero(is_feasible(problem, levels))
    if not len(fitting):
        return Solution(levels=None, loss=np.inf, status="unknown", seconds=time.perf_counter() - start)
    best = levels[fitting[-1]]
    return Solution(
        levels=tuple(best.tolist()),
        loss=float(losses_of(problem, best)),
        status="feasible",
        seconds=time.perf_counter() - start,
    )
