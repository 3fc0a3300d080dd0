"""Solvers: choose one width per group, losing least, within all budgets at once.

    minimise    sum over groups of loss[group][level]
    subject to  constant + sum of unary[v][level of v] + sum of pairs[u, v][level of u, level of v] <= limit
                for every row (a latency, an artifact size, the live memory at one step ...)

A variable `v` is a group, or the size of an axis that several groups share (concatenation, a padded
shortcut), whose level follows from theirs. A member is a module with `solve`, a `Solver`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeprune.core.records import FloatArray, IntArray

Levels = tuple[int, ...]
"""One level index per group, in the order of `Problem.choices`."""

Status = Literal["optimal", "feasible", "infeasible", "unknown"]

TOLERANCE = 1e-9
"""Relative excess over a limit that counts as met: rounding in sums of floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The widths one group may have: widths (n,) ascending, loss (n,) of each."""

    name: str
    widths: IntArray
    loss: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """An axis of several groups: fixed + sum of count x width, rounded up to one of `sizes`.

    sizes: (n,) ascending; the last is at least the axis' full size. counts: (choice index, count).
    """

    sizes: IntArray
    fixed: int
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One limited quantity. Keys are variable indices: choices first, then sums; pairs have u < v.

    quantity: the `Budget` field it belongs to; several rows of one quantity must all stay below.
    """

    quantity: str
    limit: float
    constant: float = 0.0
    unary: Mapping[int, FloatArray] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to choose from and within what."""

    choices: tuple[Choice, ...]
    rows: tuple[Row, ...]
    sums: tuple[Sum, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of levels of every variable."""
        return (*(len(choice.widths) for choice in self.choices), *(len(total.sizes) for total in self.sums))

    @property
    def dense(self) -> Levels:
        """Every group at its full width."""
        return tuple(len(choice.widths) - 1 for choice in self.choices)


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


def losses_of(problem: Problem, levels: npt.ArrayLike) -> FloatArray:
    """Predicted loss of each of a batch of configurations; levels (..., groups) -> (...)."""
    chosen = np.asarray(levels)
    return sum((c.loss[chosen[..., v]] for v, c in enumerate(problem.choices)), np.zeros(chosen.shape[:-1]))


def costs_of(problem: Problem, levels: npt.ArrayLike) -> FloatArray:
    """Cost of every row for each of a batch of configurations; levels (..., groups) -> (..., rows)."""
    chosen = np.asarray(levels)
    state = [chosen[..., v] for v in range(len(problem.choices))]
    for total in problem.sums:
        size = sum(count * problem.choices[v].widths[state[v]] for v, count in total.counts) + total.fixed
        state.append(np.searchsorted(total.sizes, size))
    result = np.zeros((*chosen.shape[:-1], len(problem.rows)))
    for index, row in enumerate(problem.rows):
        result[..., index] = row.constant
        for v, values in row.unary.items():
            result[..., index] += values[state[v]]
        for (u, v), matrix in row.pairs.items():
            result[..., index] += matrix[state[u], state[v]]
    return result


def excess_of(problem: Problem, levels: npt.ArrayLike) -> FloatArray:
    """Largest cost / limit over the rows; levels (..., groups) -> (...)."""
    limits = np.array([row.limit for row in problem.rows])
    excess: FloatArray = (costs_of(problem, levels) / limits).max(axis=-1, initial=0.0)
    return excess


def is_feasible(problem: Problem, levels: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """True where every budget is met; levels (..., groups) -> (...)."""
    return excess_of(problem, levels) <= 1 + TOLERANCE
