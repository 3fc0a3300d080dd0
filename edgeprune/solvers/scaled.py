"""The widths of another plan, scaled by one multiplier: the largest that fits.

So one pruned network gives a family of others for other budgets: "copycat" networks (Crowley et al., 2018,
arXiv:1810.04622), which are trained from nothing there.
"""

from __future__ import annotations

from edgeprune.core.problem import Problem
from edgeprune.solvers import Solution
from edgeprune.solvers._multiples import widest_multiple


def solve(problem: Problem, *, time_limit_s: float = 20.0) -> Solution:  # noqa: ARG001 the contract has it
    """Every group at the widest level within multiplier x its width in the other plan (`Choice.found`), up to its full
    width, which counts where the plan does not name it; branches as there.
    """
    widths = [int(choice.widths[-1]) if choice.found is None else choice.found for choice in problem.choices]
    return widest_multiple(problem, widths)
