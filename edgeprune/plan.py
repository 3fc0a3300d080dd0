"""Choose the widths that lose least within the budgets, and which units to keep.

Every group gets a short list of widths (levels), each with a predicted loss; kernels, weights and
live activations become unary and pairwise terms of the levels; a solver does the rest.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from math import gcd, inf, lcm

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from edgeprune.core.branches import dropped_branches
from edgeprune.core.budget import format_amount
from edgeprune.core.closed_loop import LOWEST_SHARE, next_request, no_finer_step
from edgeprune.core.cost import (
    artifact_polynomial,
    evaluate,
    kernel_latency,
    kernel_sizes,
    live_bytes,
    live_of_peak,
    memory_steps,
    multiply,
    peak_of_live,
    predict_cost,
    volumes_by_branch,
)
from edgeprune.core.errors import DataError, InfeasibleBudget, ModelError, RecordError, Unmet, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.problem import (
    Axes,
    Choice,
    Levels,
    Problem,
    Row,
    costs_of,
    energy_terms,
    is_feasible,
    latency_terms,
    losses_of,
    polynomial_terms,
    volume_terms,
)
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Branch,
    Budget,
    FloatArray,
    Graph,
    Group,
    Importance,
    IntArray,
    Plan,
    Profile,
    SolverResult,
)
from edgeprune.core.stats import statistic
from edgeprune.solvers import Solution
from edgeprune.tables.fit import ALIGNMENT

__all__ = ["choose_widths", "next_request", "no_finer_step"]

FEW_SUMMED = 4
"""Where more groups are concatenated, widths on the tile give sums enough to choose from."""
COSTLY = 0.25
"""Share of a group's costliest kernel from which on a kernel's tile binds the group's widths."""
MEMORY_PASSES, MEMORY_AIM = 8, 0.99
TIE_BREAK = 1e-4
"""Weight of the units' own scores beside a measured curve: among equal losses, keep more."""


def choose_widths(
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    *,
    solver: str = "milp",
    compare: Sequence[str] = ("greedy", "uniform"),
    levels: int = 16,
    time_limit_s: float = 20.0,
    min_keep: float = 1 / 16,
    near: Mapping[str, int] | None = None,
    reach: int = 2,
    progress: Progress = silent,
) -> Plan:
    """The widths of least predicted loss that meet every budget at once.

    solver, compare: members of `solvers`; what the compared ones would reach is in the plan.
    levels: most widths to consider per group. time_limit_s: for each solver.
    min_keep: least share of a group's units to keep, in (0, 1].
    near: no group further than `reach` of its levels from these widths, where they name it.
    raises: RecordError, DataError, UsageError for what cannot be planned from; InfeasibleBudget.
    """
    check_inputs(graph, profile, importance, budget)
    if levels < 2 or not 0 < min_keep <= 1:
        raise UsageError(f"levels={levels} must be at least 2 and min_keep={min_keep} in (0, 1]")
    names = list(dict.fromkeys([solver, *compare]))
    asked, plain = budget, replace(importance, found={})

    def pose(given: Importance) -> Problem:
        return build_problem(
            graph, profile, given, asked, levels=levels, min_keep=min_keep, near=near, reach=reach
        )  # fmt: skip

    for _ in range(MEMORY_PASSES):
        problem = pose(importance)
        solutions = _solve(problem, names, time_limit_s, progress)
        found_by, chosen = _best_found(solutions, solver)
        if chosen.levels is None:
            raise _no_solution(problem, asked, solver, chosen, time_limit_s)
        widths = _widths(problem, chosen.levels)
        predicted = predict_cost(graph, widths, profile)
        if (excess := (predicted.peak_memory_bytes or 0) / (budget.peak_memory_bytes or inf)) <= 1:
            break
        # What lives at once is the least that any allocator takes: ask for less until this one's fits.
        asked = replace(asked, peak_memory_bytes=peak_of_live(profile, MEMORY_AIM * live_bytes(graph, widths) / excess))
    else:
        raise Unmet("no widths were found whose peak memory, as the runtime allocates it, is within budget; allow more")
    priced = pose(plain) if importance.found else problem  # what keeps to the found widths is no loss
    results = tuple(
        SolverResult(
            solver=name,
            status=solution.status,
            widths=_widths(problem, solution.levels),
            loss=float(losses_of(priced, solution.levels)),
            cost=predict_cost(graph, _widths(problem, solution.levels), profile),
            gap=solution.gap,
            seconds=solution.seconds,
        )
        for name, solution in solutions.items()
        if solution.levels is not None
    )
    return Plan(
        graph_sha256=graph.model_sha256,
        budget=budget,
        widths=widths,
        keep=keep_units(importance, widths, graph),
        predicted=predicted,
        solver=found_by,
        status=chosen.status,
        gap=chosen.gap,
        loss=float(losses_of(priced, chosen.levels)),
        alternatives=results,
        precision=profile.precision,
        finer_step=_next_step(problem, chosen.levels),
    )


def _solve(problem: Problem, names: Sequence[str], time_limit_s: float, progress: Progress) -> dict[str, Solution]:
    """What each solver finds; the others are not asked where the first says that there is nothing."""
    solutions: dict[str, Solution] = {}
    for done, name in enumerate(names):
        progress(f"planning with {name}", done, len(names))
        solutions[name] = load_member("solvers", name).solve(problem, time_limit_s=time_limit_s)
        if done == 0 and solutions[name].status == "infeasible":
            break
    progress("planned", len(names), len(names))
    return solutions


def keep_units(importance: Importance, widths: dict[str, int], graph: Graph) -> dict[str, IntArray]:
    """Per pruned group the indices of its highest-scored units, ascending (ties: the first); none of a branch."""
    units = graph.units
    return {
        name: np.sort(np.argsort(-importance.scores[name], kind="stable")[:width]).astype(np.int64)
        for name, width in widths.items()
        if name in units and width < units[name]
    } | {branch.name: np.zeros(0, np.int64) for branch in dropped_branches(graph, widths)}


# --- what can be planned from --------------------------------------------------------------------


def check_inputs(graph: Graph, profile: Profile, importance: Importance, budget: Budget) -> None:
    """Refuse records of another model, scores that are no numbers, and budgets nobody measured.

    raises: RecordError, DataError, ModelError, UsageError.
    """
    for what, sha256 in (("profile", profile.graph_sha256), ("importance", importance.graph_sha256)):
        if sha256 != graph.model_sha256:
            raise RecordError(
                f"the {what} was made from another graph ({sha256[:12]}) than the model ({graph.model_sha256[:12]});"
                f" make it again for this model"
            )
    if not graph.prunable:
        raise ModelError("no group of the model can be pruned; `edgeprune trace` says why")
    for group in graph.prunable:
        scores = importance.scores.get(group.name)
        if scores is None or len(scores) != group.units:
            raise RecordError(f"the importance does not score all {group.units} units of '{group.name}'; score again")
        curve = importance.curves.get(group.name)
        if not np.isfinite(scores).all() or (curve is not None and not np.isfinite(curve.loss).all()):
            raise DataError(f"the importance of '{group.name}' has values that are not finite; score again")
    if budget.energy_j is not None and profile.energy is None:
        raise UsageError(
            "an energy budget needs a board with a power meter, and this profile has no energy; profile with --meter,"
            " or give a --power-model"
        )
    limits = {name: getattr(budget, name) for name in ("latency_s", "artifact_bytes", "peak_memory_bytes", "energy_j")}
    if all(limit is None for limit in limits.values()):
        raise UsageError("no budget given; ask for at least one of latency, memory, size or energy")
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise UsageError(f"the {name} budget is {limit}; it must be above zero")


# --- the problem ---------------------------------------------------------------------------------


def build_problem(
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    *,
    levels: int = 16,
    min_keep: float = 1 / 16,
    near: Mapping[str, int] | None = None,
    reach: int = 2,
) -> Problem:
    """Levels, losses and cost terms; arguments as in `choose_widths`."""
    tiles, summed = _tiles(graph, profile), _summed(profile)
    fine = budget.artifact_bytes is not None or budget.peak_memory_bytes is not None
    ties = tied_groups(graph)
    widths: dict[str, IntArray] = {}
    for tie in ties:
        tile = lcm(*(tiles.get(group.name, 1) for group in tie))
        parts = any(group.name in summed for group in tie)
        for group in tie:
            offered = candidate_widths(group, tile, levels, min_keep, fine, summed=parts)
            if near is not None and (middle := near.get(tie[0].name)) is not None:
                at = int(np.searchsorted(offered, middle))
                offered = offered[max(at - reach, 0) : at + reach + 1]
            widths[group.name] = offered
    losses = level_losses(importance, widths)
    switches = branch_losses(graph, importance, losses)
    if importance.found:
        # To leave what a search has found costs more than all that others could gain by it.
        step = sum(float(loss[0]) for loss in losses.values()) + sum(switches.values())
        losses = {name: loss + step * (widths[name] < importance.found.get(name, 0)) for name, loss in losses.items()}
        switches = {name: loss if importance.found.get(name) == 0 else loss + step for name, loss in switches.items()}
    choices = (
        *(
            Choice(
                name=group.name,
                widths=widths[group.name],
                loss=np.sum([losses[each.name] for each in (group, *rest)], axis=0),
                also=tuple(each.name for each in rest),
                found=importance.found.get(group.name),
            )
            for group, *rest in ties
        ),
        *(
            Choice(name=name, widths=np.arange(2), loss=np.array([loss, 0.0]), found=importance.found.get(name))
            for name, loss in switches.items()
        ),
    )
    axes = Axes(choices, graph.units, *_inside(graph, switches))
    rows: list[Row] = []
    if budget.latency_s is not None:
        limit = budget.latency_s / _tail(profile, budget)
        rows.append(latency_terms(profile, axes).row("latency_s", limit))
    if budget.energy_j is not None and profile.energy is not None:
        rows.append(energy_terms(profile, profile.energy, axes).row("energy_j", budget.energy_j))
    if budget.artifact_bytes is not None:
        weights = artifact_polynomial(graph, profile.precision.dtype)
        terms = volume_terms(volumes_by_branch(graph, profile.precision.dtype), axes)
        terms.constant += max(profile.dense_bytes - evaluate(weights, {}, graph.units), 0)
        rows.append(terms.row("artifact_bytes", budget.artifact_bytes))
    if budget.peak_memory_bytes is not None:
        live_limit = live_of_peak(profile, budget.peak_memory_bytes)
        live = [
            multiply(step.bytes, {(step.branch.name,): 1.0})
            if step.branch and step.branch.name in switches
            else step.bytes
            for step in memory_steps(graph)
        ]
        distinct = {tuple(sorted(step.items())): step for step in live}
        rows.extend(polynomial_terms(step, axes).row("peak_memory_bytes", live_limit) for step in distinct.values())
    if rows:
        rows[0] = axes.tie_gates(rows[0])
    return Problem(choices=choices, rows=tuple(rows), sums=tuple(axes.sums))


def tied_groups(graph: Graph) -> list[list[Group]]:
    """The groups that can be pruned, those together that have one width."""
    ties: dict[str, list[Group]] = {}
    for group in graph.prunable:
        ties.setdefault(f"tie {group.tie}" if group.tie else group.name, []).append(group)
    return list(ties.values())


def _inside(graph: Graph, switches: Container[str]) -> tuple[list[Branch], set[str]]:
    """The branches that may be dropped, and the groups that lie in them alone."""
    branches = [branch for branch in graph.branches if branch.name in switches]
    places = {True: set[str](), False: set[str]()}
    for node in graph.nodes:
        inside = any(node.name in branch.nodes for branch in branches)
        places[inside].update(name for extent in node.out_extents for name, _ in extent.groups)
    return branches, places[True] - places[False]


def candidate_widths(
    group: Group, tile: int, levels: int, min_keep: float, fine: bool, *, summed: bool = False
) -> IntArray:
    """Ascending widths to consider, the full one last.

    Multiples of the group's step and of the tile (units computed at once: a width in between costs
    time without need), thinned evenly to `levels`. fine: budgets other than latency also gain below
    the tile, so a group with few tiles is offered widths between them. summed: kernels read its units beside
    those of other groups, and only what they are together has to lie on the tile.
    """
    floor = max(group.step, group.least, int(np.ceil(min_keep * group.units)))
    quantum = lcm(group.step, tile)
    if summed and group.units <= 4 * tile:
        # Alone such a width may lie off the tile, but not off the alignment, which costs extra.
        part = tile // (4 if group.units <= 2 * tile else 2)
        quantum = lcm(group.step, max(part, min(tile, ALIGNMENT)))
    if fine and group.units < levels * quantum:
        quantum = group.step * max(1, group.units // (levels * group.step))
    widths = np.arange(quantum, group.units, quantum)
    widths = np.append(widths[widths >= floor], group.units)
    if len(widths) > levels:
        widths = widths[np.unique(np.linspace(0, len(widths) - 1, levels).round().astype(int))]
    return widths.astype(np.int64)


def level_losses(importance: Importance, widths: dict[str, IntArray]) -> dict[str, FloatArray]:
    """Predicted rise of the loss per group and level, never falling as the width falls.

    From the measured curve (made monotone, interpolated by PCHIP) where there is one; else from
    the summed scores of the removed units, scaled to the curves of the other groups if any.
    """
    removed = {name: _removed_score(importance.scores[name], levels) for name, levels in widths.items()}
    rises: dict[str, FloatArray] = {}
    ratios: list[float] = []
    for name, levels in widths.items():
        curve = importance.curves.get(name)
        if curve is None or len(curve.widths) < 2:
            continue
        monotone = np.asarray(isotonic_regression(curve.loss, increasing=False).x)
        rises[name] = _interpolate(curve.widths, monotone - monotone[-1], levels)
        if removed[name][0] > 0:
            ratios.append(float(rises[name][0] / removed[name][0]))
    scale = float(np.median(ratios)) if ratios else 1.0
    # Where no curve rises, any measure does: without one the solver would drop units for nothing.
    largest = max((float(rise[0]) for rise in rises.values()), default=0.0) or 1.0
    for name in widths:
        if name in rises:
            share = removed[name] / removed[name][0] if removed[name][0] > 0 else np.zeros(len(removed[name]))
            rises[name] = rises[name] + TIE_BREAK * largest * share
        else:
            rises[name] = removed[name] * scale
    return {name: rises[name] for name in widths}


def branch_losses(graph: Graph, importance: Importance, losses: dict[str, FloatArray]) -> dict[str, float]:
    """Predicted rise of the loss where a branch is dropped, for each whose loss without it was measured.

    losses: of the groups; where nothing is lost by dropping, a little of the largest speaks for keeping.
    """
    rises = {
        branch.name: max(float(curve.loss[0] - curve.loss[-1]), 0.0)
        for branch in graph.branches
        if (curve := importance.curves.get(branch.name)) is not None
    }
    largest = max([*rises.values(), *(float(loss[0]) for loss in losses.values())], default=0.0)
    return {name: rise + TIE_BREAK * largest for name, rise in rises.items()}


def _removed_score(scores: FloatArray, widths: IntArray) -> FloatArray:
    """Summed scores of the units that each width removes, lowest first."""
    total = np.concatenate(([0.0], np.cumsum(np.sort(scores))))
    return np.asarray(total[len(scores) - widths], dtype=np.float64)


def _interpolate(widths: IntArray, rises: FloatArray, wanted: IntArray) -> FloatArray:
    """Monotone interpolation; below the narrowest measured width along the first segment."""
    inside = PchipInterpolator(widths, rises)(np.clip(wanted, widths[0], widths[-1]))
    slope = (rises[0] - rises[1]) / (widths[1] - widths[0])
    return np.asarray(inside + slope * np.maximum(widths[0] - wanted, 0), dtype=np.float64)


def _tiles(graph: Graph, profile: Profile) -> dict[str, int]:
    """Per group the units that the costly kernels touching it compute at once."""
    tables = {table.signature: table for table in profile.tables}
    found: dict[str, list[tuple[float, int]]] = {}
    for kernel in profile.kernels:
        table = tables[kernel.signature]
        seconds = kernel_latency(table, *kernel_sizes(kernel, graph.units, graph.units))
        for extent, tile in ((kernel.in_extent, table.tile_in), (kernel.out_extent, table.tile_out)):
            for name, count in extent.groups if extent is not None else ():
                found.setdefault(name, []).append((seconds, tile // gcd(tile, count)))
    return {
        name: min(lcm(*(units for seconds, units in tiles if seconds >= COSTLY * max(tiles)[0])), graph.units[name])
        for name, tiles in found.items()
    }


def _summed(profile: Profile) -> set[str]:
    """Groups whose units some kernel reads or writes beside those of a few others: concatenated or padded."""
    extents = [extent for kernel in profile.kernels for extent in (kernel.in_extent, kernel.out_extent) if extent]
    together = [{name for name, _ in extent.groups} for extent in extents]
    return {name for names in together if 1 < len(names) <= FEW_SUMMED for name in names}


def _tail(profile: Profile, budget: Budget) -> float:
    """How far the statistic of the latency budget lies above the median, as measured."""
    ratios = [
        statistic(m.samples.values, budget.statistic) / statistic(m.samples.values, "median")
        for m in profile.measurements
    ]
    return float(np.median(ratios)) if ratios else 1.0


# --- what comes of it ----------------------------------------------------------------------------


def _best_found(solutions: dict[str, Solution], solver: str) -> tuple[str, Solution]:
    """The solver and its answer; where it ran out of time, the best of any, with what it has proven."""
    chosen = solutions[solver]
    name, best = min(solutions.items(), key=lambda item: item[1].loss)
    if chosen.levels is None:
        return (name, best) if chosen.status == "unknown" and best.levels is not None else (solver, chosen)
    if chosen.status == "optimal" or chosen.gap is None or best.loss >= chosen.loss:
        return solver, chosen
    bound = chosen.loss * (1 - chosen.gap)
    return name, replace(best, status="feasible", gap=max(best.loss - bound, 0.0) / best.loss)


def _widths(problem: Problem, levels: Levels) -> dict[str, int]:
    """Of the groups, and 0 of every branch that is dropped."""
    chosen = zip(problem.choices, levels, strict=True)
    return {name: int(c.widths[level]) for c, level in chosen for name in c.names if level == 0 or not c.is_branch}


def _no_solution(problem: Problem, budget: Budget, solver: str, answer: Solution, time_limit_s: float) -> Unmet:
    """Why there is no plan: the binding budget and what can be reached, or that the solver gave up."""
    least_excess = load_member("solvers", "milp").least_excess
    quantities = list(dict.fromkeys(row.quantity for row in problem.rows))
    best: dict[str, float] = {}
    for quantity in quantities:
        rows = tuple(row for row in problem.rows if row.quantity == quantity)
        best[quantity] = least_excess(replace(problem, rows=rows), time_limit_s=time_limit_s).loss

    def amount(quantity: str, share: float) -> str:
        return f"{_called(quantity)} {format_amount(quantity, share * getattr(budget, quantity))}"

    reachable = ", ".join(amount(quantity, best[quantity]) for quantity in quantities)
    binding = max(best, key=lambda quantity: best[quantity])
    if best[binding] > 1:
        return InfeasibleBudget(
            f"no widths meet the budget of {amount(binding, 1.0)}; at best {reachable} can be reached."
            f" Allow more, or let groups keep fewer units (min_keep)"
        )
    together = least_excess(problem, time_limit_s=time_limit_s)
    if together.levels is not None and together.loss > 1:
        shares = costs_of(problem, together.levels) / np.array([row.limit for row in problem.rows])
        binding = problem.rows[int(np.argmax(shares))].quantity
        return InfeasibleBudget(
            f"each budget can be met alone ({reachable}) but not all at once: at the closest,"
            f" {amount(binding, float(shares.max()))} exceeds the budget of {amount(binding, 1.0)}. Allow more"
        )
    return Unmet(
        f"solver '{solver}' found no widths within the budgets in {answer.seconds:.1f} s, though there are some;"
        f" use the milp solver, or allow more than {time_limit_s:g} s"
    )


def _called(quantity: str) -> str:
    return {"latency_s": "latency", "artifact_bytes": "size", "peak_memory_bytes": "memory", "energy_j": "energy"}[
        quantity
    ]


def _next_step(problem: Problem, levels: Levels) -> str | None:
    """The cheapest step up where the plan is predicted well below the latency budget, or None."""
    index = next((k for k, row in enumerate(problem.rows) if row.quantity == "latency_s"), None)
    if index is None:
        return None
    limit = problem.rows[index].limit
    now = float(costs_of(problem, levels)[index])
    wider = [
        (v, (*levels[:v], level + 1, *levels[v + 1 :]))
        for v, level in enumerate(levels)
        if level + 1 < len(problem.choices[v].widths)
    ]
    if now >= LOWEST_SHARE * limit or not wider:
        return None
    steps = [step for _, step in wider]
    if is_feasible(problem, steps).any():
        return None
    slower = costs_of(problem, steps)[:, index]
    cheapest = int(np.argmin(np.where(slower > now, slower, np.inf)))
    v, step = wider[cheapest]
    choice = problem.choices[v]
    return (
        f"the tables predict {now / limit:.1%} of the latency budget and no single group can be wider within all"
        f" budgets; the cheapest step, '{choice.name}' from {choice.widths[levels[v]]} to {choice.widths[step[v]]},"
        f" would take it to {slower[cheapest] / limit:.1%}"
    )
