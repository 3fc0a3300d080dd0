"""The planning problem: one width level per group, least loss, within every limit at once.

    minimise    sum over groups of loss[group][level]
    subject to  constant + sum of unary[v][level of v] + sum of pairs[u, v][level of u, level of v] <= limit
                for every row (a latency, an artifact size, the live memory at one step ...)

A variable `v` is a group, or the size of an axis that several groups share (concatenation, a padded
shortcut), whose level follows from theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from edgeprune.core.branches import branch_of_kernel
from edgeprune.core.cost import Polynomial, kernel_latency, operator_of
from edgeprune.core.records import Branch, EnergyModel, Extent, FloatArray, IntArray, Kernel, Profile

Levels = tuple[int, ...]
"""One level index per group, in the order of `Problem.choices`."""

TOLERANCE = 1e-9
"""Relative excess over a limit that counts as met: rounding in sums of floats."""

MOST_SUM_SIZES = 64
"""Sizes of a shared axis are rounded up to at most this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The widths one group may have: widths (n,) ascending, loss (n,) of each. Of a branch they are 0 and 1.

    also: other groups that have the same width; the loss is of all. found: its width in a plan that was found before.
    """

    name: str
    widths: IntArray
    loss: FloatArray
    also: tuple[str, ...] = ()
    found: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Whose width it is."""
        return (self.name, *self.also)

    @property
    def is_branch(self) -> bool:
        """Whether it is a residual branch, which is there or not."""
        return int(self.widths[0]) == 0


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


# --- terms from records --------------------------------------------------------------------------


class Axes:
    """Axis sizes as variables: groups first, then one sum for every set of groups on one axis.

    branches: those that a choice of widths 0 and 1 may drop. inner: groups that lie in a branch alone.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        units: dict[str, int],
        branches: Sequence[Branch] = (),
        inner: Container[str] = (),
    ) -> None:
        self.choices, self.units, self.branches = choices, units, branches
        self.index = {name: v for v, choice in enumerate(choices) for name in choice.names}
        self.inner = {v for name, v in self.index.items() if name in inner}
        self.sums: list[Sum] = []
        self.gates: dict[tuple[int, int], int] = {}
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def switched(
        self, branch: str | None, u: int | None, v: int | None, matrix: FloatArray
    ) -> tuple[int | None, int | None, FloatArray]:
        """The same term, (levels of u, levels of v), but 0 where the branch is dropped."""
        if branch is None or branch not in self.index:
            return u, v, matrix
        switch = self.index[branch]
        if u is not None and u == v:
            u, matrix = None, np.diagonal(matrix)[None]
        if u is None or v is None:
            only = v if u is None else u
            return switch, only, np.stack([np.zeros(matrix.size), matrix.ravel()])
        if u in self.inner and v not in self.inner:
            u, v, matrix = v, u, matrix.T
        return u, self._gate(v, switch), np.hstack([np.zeros((len(matrix), 1)), matrix])

    def _gate(self, v: int, switch: int) -> int:
        """A variable with one level more than v: the first where the branch is dropped, then those of v.

        It is the size of v, and the largest on top of it where the branch is there; so any size below means dropped.
        """
        if (v, switch) not in self.gates:
            plain = v < len(self.choices)
            total = None if plain else self.sums[v - len(self.choices)]
            sizes = self.choices[v].widths if total is None else total.sizes
            counts, fixed = (((v, 1),), 0) if total is None else (total.counts, total.fixed)
            top = int(sizes[-1])
            self.gates[v, switch] = len(self.choices) + len(self.sums)
            self.sums.append(
                Sum(sizes=np.append(top, top + sizes), fixed=fixed, counts=tuple(sorted([*counts, (switch, top)])))
            )
        return self.gates[v, switch]

    def sizes(self, extent: Extent, tile: int) -> tuple[int | None, IntArray]:
        """The variable that decides an axis (None: constant) and the size at each of its levels."""
        fixed, counts = extent.fixed, dict[int, int]()
        for name, count in extent.groups:
            if name in self.index:
                counts[self.index[name]] = counts.get(self.index[name], 0) + count
            else:
                fixed += count * self.units[name]
        if not counts:
            return None, np.array([fixed])
        if len(counts) == 1:
            ((v, count),) = counts.items()
            return v, fixed + count * self.choices[v].widths
        key = (fixed, tuple(sorted(counts.items())))
        if key not in self._known:
            self._known[key] = len(self.choices) + len(self.sums)
            self.sums.append(Sum(sizes=self._reachable(*key, tile), fixed=fixed, counts=key[1]))
        return self._known[key], self.sums[self._known[key] - len(self.choices)].sizes

    def _reachable(self, fixed: int, counts: tuple[tuple[int, int], ...], tile: int) -> IntArray:
        """Every sum there can be, rounded up to the tile and further until there are few enough."""
        sizes = np.array([fixed])
        for v, count in counts:
            sizes = np.unique(sizes[:, None] + count * self.choices[v].widths)
        rounded, step = sizes, max(tile, 2)
        while len(rounded) > MOST_SUM_SIZES:
            rounded = np.unique(np.minimum(-(-sizes // step) * step, sizes[-1]))
            step *= 2
        return rounded.astype(np.int64)

    def tie_gates(self, row: Row) -> Row:
        """The same row, in which what no choice of levels can be costs twice the limit.

        A relaxation would otherwise drop half a branch and save all of it.
        """
        pairs = dict(row.pairs)
        for (v, switch), gate in self.gates.items():
            levels = len(self.sums[gate - len(self.choices)].sizes)
            there = np.arange(levels) > 0
            possible = {
                (switch, gate): np.stack([~there, there]),
                (v, gate): ~there | (np.arange(levels) == np.arange(1, levels)[:, None]),
            }
            for pair, allowed in possible.items():
                pairs[pair] = pairs.get(pair, 0.0) + np.where(allowed, 0.0, 2 * row.limit)
        return replace(row, pairs=pairs)


@dataclass(slots=True)
class Terms:
    """Cost terms as they add up."""

    constant: float = 0.0
    unary: dict[int, FloatArray] = field(default_factory=dict)
    pairs: dict[tuple[int, int], FloatArray] = field(default_factory=dict)

    def add(self, u: int | None, v: int | None, matrix: FloatArray) -> None:
        """Add a (levels of u, levels of v) matrix; None: that side is constant."""
        if u is None or v is None:
            only = v if u is None else u
            if only is None:
                self.constant += float(matrix.item())
            else:
                self.unary[only] = self.unary.get(only, 0.0) + matrix.ravel()
        elif u == v:
            self.unary[u] = self.unary.get(u, 0.0) + np.diagonal(matrix)
        else:
            key, oriented = ((u, v), matrix) if u < v else ((v, u), matrix.T)
            self.pairs[key] = self.pairs.get(key, 0.0) + oriented

    def row(self, quantity: str, limit: float) -> Row:
        """The finished row."""
        return Row(quantity=quantity, limit=limit, constant=self.constant, unary=self.unary, pairs=self.pairs)


def latency_terms(profile: Profile, axes: Axes) -> Terms:
    """Seconds: every kernel's table over the sizes of its two axes, and the overhead."""
    return _kernel_terms(profile, axes, profile.overhead_s, lambda _: 1.0)


def energy_terms(profile: Profile, model: EnergyModel, axes: Axes) -> Terms:
    """Joules: every kernel's seconds times the power of its operator."""
    overhead = model.mean_w * profile.overhead_s
    return _kernel_terms(profile, axes, overhead, lambda kernel: model.power_w[operator_of(kernel)])


def _kernel_terms(profile: Profile, axes: Axes, constant: float, factor: Callable[[Kernel], float]) -> Terms:
    tables = {table.signature: table for table in profile.tables}
    terms = Terms(constant=constant)
    for kernel in profile.kernels:
        table = tables[kernel.signature]
        u, cin = axes.sizes(kernel.in_extent, table.tile_in) if kernel.in_extent is not None else (None, np.zeros(1))
        v, cout = axes.sizes(kernel.out_extent, table.tile_out)
        branch = branch_of_kernel(axes.branches, kernel)
        seconds = kernel_latency(table, cin[:, None], cout[None, :])
        terms.add(*axes.switched(branch.name if branch else None, u, v, factor(kernel) * seconds))
    return terms


def polynomial_terms(polynomial: Polynomial, axes: Axes) -> Terms:
    """A polynomial in the widths as terms; from the third group on, a product counts full widths."""
    terms = Terms()
    for names, coefficient in polynomial.items():
        fixed = float(coefficient)
        free = [axes.index[name] for name in names if name in axes.index]
        for name in names:
            fixed *= axes.units[name] if name not in axes.index else 1
        distinct = list(dict.fromkeys(free))
        for v in free:
            fixed *= int(axes.choices[v].widths[-1]) if v in distinct[2:] else 1
        powers = [axes.choices[v].widths.astype(np.float64) ** free.count(v) for v in distinct[:2]]
        left = powers[0] if powers else np.ones(1)
        right = powers[1] if len(powers) > 1 else np.ones(1)
        sides: list[int | None] = [*distinct[:2], None, None]
        terms.add(sides[0], sides[1], fixed * np.outer(left, right))
    return terms


def volume_terms(volumes: Mapping[str | None, Iterable[tuple[tuple[Extent, ...], float]]], axes: Axes) -> Terms:
    """Sum of tensor sizes x factor as terms of whole axes; from the third free axis on, full sizes count.

    volumes: by the branch that they go with. Two axes of several groups each stay one pair, where their polynomial has
    one for every two groups.
    """
    terms = Terms()
    for branch, extents, factor in ((branch, *volume) for branch, its in volumes.items() for volume in its):
        free: list[tuple[int | None, FloatArray]] = []
        scale = float(factor)
        for extent in extents:
            v, sizes = axes.sizes(extent, 1)
            if v is None or len(free) == 2:
                scale *= float(sizes[-1])
            else:
                free.append((v, sizes.astype(np.float64)))
        (u, left), (v, right) = [*free, (None, np.ones(1)), (None, np.ones(1))][:2]
        terms.add(*axes.switched(branch, u, v, scale * np.outer(left, right)))
    return terms
