"""Exact: a mixed-integer linear programme on the local marginal polytope, solved by HiGHS.

    x[v, i] in {0, 1}     variable v (a group, or the size of a shared axis) has level i
    y[u, v, i, j] >= 0    u has level i and v has level j, for every pair that costs something
    sum_i x[v, i] = 1
    sum_j y[u, v, i, j] = x[u, i],    sum_i y[u, v, i, j] = x[v, j]

Integral x make y their product, so every row of the problem is linear in (x, y); one y serves all
rows of a pair. The relaxation is tight on trees (Wainwright & Jordan 2008, section 4). The size of a
shared axis is the one level k with sizes[k - 1] < fixed + sum of count x width <= sizes[k].

How it gets fast. Levels and pairs that exceed a limit even with all else at its cheapest are removed.
The duals of the relaxation then bound the loss of every solution that uses a level, so what the
greedy solver finds, often the optimum itself, rules out most; a *core* of the most promising levels
is solved first. What it leaves out cannot beat the least bound left out, so a
small core usually proves its own optimum (the core concept of knapsacks, Balas & Zemel 1980); if not,
the core grows to every level that could still beat what was found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, hstack, vstack

from edgeprune.core.problem import TOLERANCE, Levels, Problem, Row, excess_of, is_feasible, losses_of
from edgeprune.core.records import FloatArray, IntArray
from edgeprune.solvers import Solution, Status, greedy

Mask = npt.NDArray[np.bool_]

INFEASIBLE = 2
"""Status of scipy's `milp` and `linprog` when there is no solution."""

FORBIDDEN = 1e30
"""Cost of what a limit rules out; finite, so that differences stay defined."""

OPENING = 0.25
"""Share of the time for a first solution, which is what is left where time runs out."""

PASSES = 5
"""Rounds of removing levels; each uses what the last removed."""


def solve(problem: Problem, *, time_limit_s: float = 20.0, gap: float = 1e-4, core: int = 3) -> Solution:
    """Least loss within all limits, and how far from the optimum it can be at most.

    time_limit_s: stop after this long with the best found. gap: relative gap at which to stop.
    core: levels per variable, on average, to begin with.
    """
    start = time.perf_counter()
    best: Levels | None = None
    loss = np.inf

    def result(bound: float, *, empty: bool = False) -> Solution:
        seconds = time.perf_counter() - start
        if best is None:
            return Solution(levels=None, loss=loss, status="infeasible" if empty else "unknown", seconds=seconds)
        distance = _relative_gap(loss, bound)
        status: Status = "optimal" if distance <= gap else "feasible"
        return Solution(levels=best, loss=loss, status=status, gap=distance, seconds=seconds)

    model = _Model(problem)
    if not model.possible:
        return result(np.inf, empty=True)
    bounds = model.level_bounds(time_limit_s)
    if bounds is None:
        return result(np.inf, empty=True)
    ascending = np.sort(bounds)
    proven, size = float(ascending[0]), core * len(problem.sizes)
    opening = greedy.solve(problem, time_limit_s=OPENING * time_limit_s)
    if opening.levels is not None and is_feasible(problem, opening.levels):
        best, loss = opening.levels, opening.loss
    while True:
        cut = min(loss, ascending[size - 1] if size < len(ascending) else np.inf)
        left = max(time_limit_s - (time.perf_counter() - start), 0.1)
        outcome = model.minimise(bounds <= cut, time_limit_s=left, gap=gap / 2)
        outside = float(np.min(bounds, where=bounds > cut, initial=np.inf))
        proven = max(proven, min(outside, outcome.bound))
        if outcome.levels is not None and is_feasible(problem, outcome.levels):
            found = float(losses_of(problem, outcome.levels))
            best, loss = (outcome.levels, found) if found < loss else (best, loss)
        complete = outside == np.inf or outside >= loss
        if complete or _relative_gap(loss, proven) <= gap or time.perf_counter() - start >= time_limit_s:
            return result(proven, empty=complete and outcome.empty)
        size = len(ascending) if best is not None else size * 3


def least_excess(problem: Problem, *, time_limit_s: float = 10.0) -> Solution:
    """The configuration that comes closest to all limits: least of the largest cost / limit.

    `loss` of the result is that ratio: above 1 proves, with `gap`, that the limits cannot be met.
    """
    start = time.perf_counter()
    outcome = _Model(problem, within_limits=False).closest(time_limit_s)
    seconds = time.perf_counter() - start
    if outcome.levels is None:
        return Solution(levels=None, loss=np.inf, status="unknown", seconds=seconds)
    ratio = float(excess_of(problem, outcome.levels))
    gap = _relative_gap(ratio, outcome.bound)
    status: Status = "optimal" if gap <= 1e-4 else "feasible"
    return Solution(levels=outcome.levels, loss=ratio, status=status, gap=gap, seconds=seconds)


def _relative_gap(value: float, bound: float) -> float:
    """How far value can be above the optimum, in [0, inf]."""
    if value <= bound:
        return 0.0
    return float((value - bound) / abs(value)) if np.isfinite(value) else np.inf


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What HiGHS answered: levels or None, a lower bound of the objective, and whether it is empty."""

    levels: Levels | None
    bound: float
    empty: bool = False


class _Model:
    """The programme of one problem: columns x then y, consistency rows, budget rows."""

    def __init__(self, problem: Problem, *, within_limits: bool = True) -> None:
        self.problem = problem
        self.sizes = problem.sizes
        self.rows = _undominated(problem) if within_limits else list(problem.rows)
        starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self.levels_of = [np.arange(a, b) for a, b in pairwise(starts)]
        self.binary = self.columns = int(starts[-1])
        self.pairs: dict[tuple[int, int], IntArray] = {}
        for u, v in sorted({pair for row in problem.rows for pair in row.pairs}):
            count = self.sizes[u] * self.sizes[v]
            self.pairs[u, v] = np.arange(self.columns, self.columns + count).reshape(self.sizes[u], self.sizes[v])
            self.columns += count
        self.allowed = self._allowed() if within_limits else np.ones(self.columns, dtype=bool)
        self.losses = np.zeros(self.columns)
        for v, choice in enumerate(problem.choices):
            self.losses[self.levels_of[v]] = choice.loss
        self.equalities, self.equal_to = self._consistency()
        self.sums, self.sums_below = self._sums()
        self.costs, self.costs_below = self._budgets()

    @property
    def possible(self) -> bool:
        """False where some variable has no level left."""
        return all(self.allowed[levels].any() for levels in self.levels_of)

    def level_bounds(self, time_limit_s: float) -> FloatArray | None:
        """(binary,) least loss of any solution that uses a level, or None when there is no solution.

        From the duals of the linear relaxation: using level i of v pays its reduced cost and, for each
        neighbour u, that of the cheapest level j of u with the pair (i, j); all other reduced
        costs are at least 0. Where a limit rules a level out, the bound is infinite. Without duals
        (out of time) nothing is known and the bound is -infinity.
        """
        solver: Any = linprog
        kept = np.flatnonzero(self.allowed)
        relaxed = solver(
            self.losses[kept],
            A_ub=vstack([self.sums, self.costs])[:, kept],
            b_ub=np.concatenate([self.sums_below, self.costs_below]),
            A_eq=self.equalities[:, kept],
            b_eq=self.equal_to,
            bounds=(0, None),
            method="highs-ipm",
            options={"time_limit": time_limit_s},
        )
        if relaxed.x is None:
            return None if relaxed.status == INFEASIBLE else np.full(self.binary, -np.inf)
        reduced = np.full(self.columns, np.inf)
        reduced[kept] = np.maximum(relaxed.lower.marginals, 0.0)
        paid = reduced[: self.binary].copy()
        for (u, v), columns in self.pairs.items():
            of_u, of_v = self.levels_of[u], self.levels_of[v]
            paid[of_u] += (reduced[columns] + reduced[of_v]).min(axis=1)
            paid[of_v] += (reduced[columns] + reduced[of_u, None]).min(axis=0)
        bounds: FloatArray = float(relaxed.fun) + paid
        return bounds

    def minimise(self, keep: Mask, *, time_limit_s: float, gap: float) -> _Outcome:
        """Least loss with only the levels in keep (binary,)."""
        allowed = self.allowed.copy()
        allowed[: self.binary] &= keep
        for (u, v), columns in self.pairs.items():
            allowed[columns] &= allowed[self.levels_of[u], None] & allowed[self.levels_of[v]]
        if not all(allowed[levels].any() for levels in self.levels_of):
            return _Outcome(None, np.inf, empty=True)
        kept = np.flatnonzero(allowed)
        constraints = [
            LinearConstraint(self.equalities[:, kept], self.equal_to, self.equal_to),
            LinearConstraint(self.sums[:, kept], ub=self.sums_below),
            LinearConstraint(self.costs[:, kept], ub=self.costs_below),
        ]
        integral = (kept < self.binary).astype(np.int64)
        options: Any = {"time_limit": time_limit_s, "mip_rel_gap": gap}
        return self._outcome(
            milp(
                self.losses[kept], integrality=integral, bounds=Bounds(0, 1), constraints=constraints, options=options
            ),
            kept,
        )

    def closest(self, time_limit_s: float) -> _Outcome:
        """Least t, one more column, with every cost at most t x its limit."""

        def beside(matrix: csr_array, last: float) -> csr_array:
            return csr_array(hstack([matrix, csr_array(np.full((matrix.shape[0], 1), last))]))

        constraints = [
            LinearConstraint(beside(self.equalities, 0.0), self.equal_to, self.equal_to),
            LinearConstraint(beside(self.sums, 0.0), ub=self.sums_below),
            LinearConstraint(beside(self.costs, -1.0), ub=self.costs_below - 1.0),
        ]
        columns = np.arange(self.columns + 1)
        integral = (columns < self.binary).astype(np.int64)
        bounds = Bounds(0, np.where(columns < self.columns, 1.0, np.inf))
        objective = (columns == self.columns).astype(np.float64)
        options: Any = {"time_limit": time_limit_s}
        return self._outcome(
            milp(objective, integrality=integral, bounds=bounds, constraints=constraints, options=options), columns
        )

    def _outcome(self, answer: Any, columns: IntArray) -> _Outcome:
        """HiGHS' answer in terms of levels."""
        empty = answer.status == INFEASIBLE
        bound = np.inf if empty else answer.mip_dual_bound
        if answer.x is None:
            return _Outcome(None, -np.inf if bound is None else float(bound), empty)
        x = np.zeros(self.columns + 1)
        x[columns] = answer.x
        levels = tuple(int(np.argmax(x[of])) for of in self.levels_of[: len(self.problem.choices)])
        return _Outcome(levels, float(bound), empty)

    def _allowed(self) -> Mask:
        """(columns,) False where a limit is exceeded even with everything else at its cheapest."""
        allowed = np.ones(self.columns, dtype=bool)
        for _ in range(PASSES):
            before = int(allowed.sum())
            for row in self.rows:
                self._exclude(row, allowed)
            if int(allowed.sum()) in (0, before):
                break
        return allowed

    def _exclude(self, row: Row, allowed: Mask) -> None:
        """Clear the levels and pairs that exceed one row's limit (one pass)."""
        room = row.limit * (1 + TOLERANCE) - row.constant
        over = {v: np.zeros(self.sizes[v]) for v in range(len(self.sizes))}
        for v, values in row.unary.items():
            cheap = np.where(allowed[self.levels_of[v]], values, FORBIDDEN)
            room -= cheap.min()
            over[v] += cheap - cheap.min()
        tables: dict[tuple[int, int], tuple[FloatArray, FloatArray, FloatArray]] = {}
        for (u, v), matrix in row.pairs.items():
            table = np.where(allowed[self.pairs[u, v]], matrix, FORBIDDEN)
            room -= table.min()
            table = table - table.min()
            tables[u, v] = table, table.min(axis=1), table.min(axis=0)
            over[u] += tables[u, v][1]
            over[v] += tables[u, v][2]
        for v, excess in over.items():
            allowed[self.levels_of[v]] &= excess <= room
        for (u, v), columns in self.pairs.items():
            excess = over[u][:, None] + over[v]
            if (u, v) in tables:
                table, of_u, of_v = tables[u, v]
                excess = excess - of_u[:, None] - of_v + table
            allowed[columns] &= (excess <= room) & allowed[self.levels_of[u], None] & allowed[self.levels_of[v]]

    def _consistency(self) -> tuple[csr_array, FloatArray]:
        """One level per variable; a pair's levels are those of its variables."""
        rows: list[tuple[IntArray, IntArray]] = [(levels, np.empty(0, dtype=np.int64)) for levels in self.levels_of]
        for (u, v), columns in self.pairs.items():
            rows.extend((line, level) for line, level in zip(columns, self.levels_of[u][:, None], strict=True))
            rows.extend((line, level) for line, level in zip(columns.T, self.levels_of[v][:, None], strict=True))
        columns_of = [np.concatenate(row) for row in rows]
        signs = [np.concatenate([np.ones(len(plus)), -np.ones(len(minus))]) for plus, minus in rows]
        equal_to = np.array([0.0 if len(minus) else 1.0 for _, minus in rows])
        return self._matrix(columns_of, signs), equal_to

    def _sums(self) -> tuple[csr_array, FloatArray]:
        """Two rows per shared axis: its level holds the sum, and the next smaller one does not."""
        columns: list[IntArray] = []
        values: list[FloatArray] = []
        below: list[float] = []
        for index, total in enumerate(self.problem.sums, start=len(self.problem.choices)):
            full = float(total.sizes[-1])
            groups = [(self.levels_of[v], count * self.problem.choices[v].widths) for v, count in total.counts]
            where = np.concatenate([self.levels_of[index], *(levels for levels, _ in groups)])
            smaller = np.concatenate(([-1], total.sizes[:-1])) + 1
            # the smallest level also covers every sum below it
            smaller[0] = 0
            columns += [where, where]
            values += [
                np.concatenate([-total.sizes, *(widths for _, widths in groups)]) / full,
                np.concatenate([smaller, *(-widths for _, widths in groups)]) / full,
            ]
            below += [-total.fixed / full, total.fixed / full]
        return self._matrix(columns, values), np.array(below)

    def _budgets(self) -> tuple[csr_array, FloatArray]:
        """One row per limit, divided by it."""
        columns: list[IntArray] = []
        values: list[FloatArray] = []
        for row in self.rows:
            terms = [(self.levels_of[v], term) for v, term in row.unary.items()]
            terms += [(self.pairs[pair].ravel(), matrix.ravel()) for pair, matrix in row.pairs.items()]
            columns.append(np.concatenate([where for where, _ in terms]) if terms else np.empty(0, dtype=np.int64))
            values.append(np.concatenate([term for _, term in terms]) / row.limit if terms else np.empty(0))
        below = np.array([1 - row.constant / row.limit for row in self.rows])
        return self._matrix(columns, values), below

    def _matrix(self, columns: list[IntArray], values: list[FloatArray]) -> csr_array:
        """Sparse rows from column indices and values."""
        pointers = np.concatenate(([0], np.cumsum([len(line) for line in columns], dtype=np.int64)))
        flat = (np.concatenate(lines) if lines else np.empty(0) for lines in (values, columns))
        data, indices = flat
        return csr_array((data, indices.astype(np.int64), pointers), shape=(len(columns), self.columns))


def _undominated(problem: Problem) -> list[Row]:
    """The rows that can be exceeded and that no other row without pairs implies."""
    able = [row for row in problem.rows if _most(row) > row.limit]
    kept: list[Row] = []
    for index, row in enumerate(able):
        others = (other for other in [*kept, *able[index + 1 :]] if not other.pairs)
        if row.pairs or not any(_implies(other, row, len(problem.sizes)) for other in others):
            kept.append(row)
    return kept


def _most(row: Row) -> float:
    """An upper bound of the row's cost."""
    terms: Iterable[FloatArray] = [*row.unary.values(), *row.pairs.values()]
    return row.constant + sum(float(term.max()) for term in terms)


def _implies(strong: Row, weak: Row, variables: int) -> bool:
    """True where weak's share of its limit never exceeds strong's (rows without pairs)."""
    none = np.zeros(1)
    worst = weak.constant / weak.limit - strong.constant / strong.limit
    for v in range(variables):
        if v in weak.unary or v in strong.unary:
            difference = weak.unary.get(v, none) / weak.limit - strong.unary.get(v, none) / strong.limit
            worst += float(difference.max())
    return worst <= 0
