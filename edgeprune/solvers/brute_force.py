"""Every configuration there is: the oracle for small problems."""

from __future__ import annotations

import time
from math import prod

import numpy as np

from edgeprune.core.errors import UsageError
from edgeprune.core.problem import Problem, is_feasible, losses_of
from edgeprune.solvers import Solution, Status

BATCH = 1 << 16


def solve(problem: Problem, *, time_limit_s: float = 20.0, most: int = 5_000_000) -> Solution:
    """The optimum, by trying everything.

    most: configurations that are too many. raises: UsageError when there are more.
    """
    start = time.perf_counter()
    shape = tuple(len(choice.widths) for choice in problem.choices)
    count = prod(shape)
    if count > most:
        raise UsageError(f"brute_force would try {count:.3g} configurations (at most {most:.3g}); use the milp solver")
    best, least = None, np.inf
    for first in range(0, count, BATCH):
        if time.perf_counter() - start > time_limit_s:
            status: Status = "unknown" if best is None else "feasible"
            return Solution(levels=best, loss=least, status=status, seconds=time.perf_counter() - start)
        levels = np.stack(np.unravel_index(np.arange(first, min(first + BATCH, count)), shape), axis=1)
        loss = np.where(is_feasible(problem, levels), losses_of(problem, levels), np.inf)
        index = int(np.argmin(loss))
        if loss[index] < least:
            best, least = tuple(levels[index].tolist()), float(loss[index])
    seconds = time.perf_counter() - start
    if best is None:
        return Solution(levels=None, loss=np.inf, status="infeasible", seconds=seconds)
    return Solution(levels=best, loss=least, status="optimal", gap=0.0, seconds=seconds)
