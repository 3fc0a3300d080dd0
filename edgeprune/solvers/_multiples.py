"""Widths that are one multiple of given ones: the largest multiple that fits."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgeprune.core.problem import Problem, is_feasible, losses_of
from edgeprune.solvers import Solution


def widest_multiple(problem: Problem, of: Sequence[int]) -> Solution:
    """Every group at the widest level within multiplier x its width in `of`, at least its narrowest.

    of: of each choice, > 0; of a branch 1 where it stays, 0 where it is dropped, whatever the multiplier.
    All distinct multipliers are tried, so no time limit is needed.
    """
    start = time.perf_counter()
    ratios = [choice.widths / max(width, 1) for choice, width in zip(problem.choices, of, strict=True)]
    multipliers = np.unique(np.concatenate([*ratios, [1.0]]))
    levels = np.stack([np.searchsorted(ratio, multipliers, side="right") - 1 for ratio in ratios], axis=1).clip(0)
    for place, choice in enumerate(problem.choices):
        if choice.is_branch:
            levels[:, place] = of[place]
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
