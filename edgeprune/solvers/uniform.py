"""One width multiplier for the whole network: the largest that fits."""

from __future__ import annotations

from edgeprune.core.problem import Problem
from edgeprune.solvers import Solution
from edgeprune.solvers._multiples import widest_multiple


def solve(problem: Problem, *, time_limit_s: float = 20.0) -> Solution:  # noqa: ARG001 the contract has it
    """Every group at the widest level within multiplier x its full width; every branch stays."""
    return widest_multiple(problem, [int(choice.widths[-1]) for choice in problem.choices])
