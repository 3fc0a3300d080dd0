"""Solvers: choose one level per group, losing least, within all limits at once.

The problem is in `core/problem.py`. A member is a module with `solve`, a `Solver`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from edgeprune.core.problem import Levels, Problem

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solver found.

    levels: None when it found nothing. gap: proven relative distance of `loss` from the optimum,
    (loss - bound) / loss, or None where nothing is proven.
    status: `infeasible` is a proof; `unknown` means that time or the method ran out first.
    """

    levels: Levels | None
    loss: float
    status: Status
    gap: float | None = None
    seconds: float = 0.0


class Solver(Protocol):
    """A member's `solve`."""

    def __call__(self, problem: Problem, *, time_limit_s: float) -> Solution: ...
