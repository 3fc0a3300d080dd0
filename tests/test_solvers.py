"""Every solver against brute force on small random problems, and the same promises for all of them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.core.errors import UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.problem import Choice, Problem, Row, Sum, costs_of, excess_of, is_feasible, losses_of
from edgeprune.solvers import Solution, Solver, bandit, brute_force, dp, greedy, knapsack, milp

EXACT = ("brute_force", "dp", "milp")


def random_problem(seed: int, *, groups: int = 4, tightness: float = 0.5) -> Problem:
    """A chain with a residual stream and one shared axis: latency with a staircase, size, memory steps."""
    rng = np.random.default_rng(seed)
    choices = []
    for v in range(groups):
        widths = np.unique(rng.integers(1, 33, rng.integers(2, 6))).astype(np.int64)
        loss = np.sort(rng.gamma(1.0, 1.0, len(widths)))[::-1].copy()
        loss[-1] = 0.0
        choices.append(Choice(name=f"g{v}", widths=widths, loss=loss))
    sums = []
    if groups > 2:
        members = ((0, int(rng.integers(1, 3))), (2, 1))
        sizes = np.array([5])
        for v, count in members:
            sizes = np.unique(sizes[:, None] + count * choices[v].widths)
        thinned = np.unique(np.append(sizes[:: rng.integers(1, 3)], sizes[-1]))
        sums.append(Sum(sizes=thinned, fixed=5, counts=members))
    width_of = [*(c.widths for c in choices), *(s.sizes for s in sums)]
    pairs = {(v, v + 1) for v in range(groups - 1)} | {(0, v) for v in range(1, groups)}
    pairs |= {(1, groups)} if sums else set()

    def matrix(u: int, v: int, tile: int) -> np.ndarray:
        left, right = (-(-width_of[x] // tile) * tile for x in (u, v))
        return rng.uniform(0.5, 2.0) * np.outer(left, right).astype(float)

    latency = {pair: matrix(*pair, 8) for pair in pairs}
    size = {pair: matrix(*pair, 1) for pair in pairs if max(pair) < groups}
    alone = {v: rng.uniform(0, 20) * width_of[v].astype(float) for v in range(len(width_of))}
    memory = [{v: 2.0 * width_of[v], (v + 1) % groups: 1.0 * width_of[(v + 1) % groups]} for v in range(groups)]
    draft: list[tuple[str, dict[str, Any]]] = [
        ("latency_s", {"constant": 10.0, "unary": alone, "pairs": latency}),
        ("artifact_bytes", {"constant": 5.0, "pairs": size}),
        *(("peak_memory_bytes", {"unary": row}) for row in memory),
    ]
    rows = [Row(quantity=quantity, limit=1.0, **terms) for quantity, terms in draft]
    problem = Problem(choices=tuple(choices), sums=tuple(sums), rows=tuple(rows))
    dense = costs_of(problem, problem.dense)
    least = costs_of(problem, tuple(0 for _ in choices))
    peak = dense[2:].max()
    limits = [least[0] + tightness * (dense[0] - least[0]), least[1] + 1.3 * tightness * (dense[1] - least[1])]
    limits += [max(0.8, tightness) * peak] * groups
    return Problem(
        choices=problem.choices,
        sums=problem.sums,
        rows=tuple(
            Row(quantity=row.quantity, limit=float(limit), constant=row.constant, unary=row.unary, pairs=row.pairs)
            for row, limit in zip(rows, limits, strict=True)
        ),
    )


def solver(name: str) -> Solver:
    return load_member("solvers", name).solve  # type: ignore[no-any-return]


def test_scaled_keeps_the_proportions_of_another_plan() -> None:
    even = np.arange(1, 33, dtype=np.int64)
    rising = np.linspace(1, 0, 32)
    choices = (
        Choice(name="wide", widths=even, loss=rising, found=24),
        Choice(name="narrow", widths=even, loss=rising, found=6),
        Choice(name="free", widths=even, loss=rising),
        Choice(name="dropped", widths=np.arange(2), loss=np.array([1.0, 0.0]), found=0),
        Choice(name="kept", widths=np.arange(2), loss=np.array([1.0, 0.0]), found=1),
    )
    for limit, wanted in ((62.0, [24, 6, 32]), (31.0, [12, 3, 16]), (40.0, [15, 3, 21]), (1e9, [32, 32, 32])):
        row = Row(quantity="latency_s", limit=limit, unary=dict.fromkeys(range(3), even.astype(float)))
        found = solver("scaled")(Problem(choices=choices, rows=(row,)), time_limit_s=20)
        assert found.levels is not None
        assert [int(even[level]) for level in found.levels[:3]] == wanted
        assert found.levels[3:] == (0, 1)
    too_little = Problem(choices=choices, rows=(Row(quantity="latency_s", limit=1.0, constant=2.0),))
    assert solver("scaled")(too_little, time_limit_s=20).levels is None


@pytest.mark.parametrize("name", ["milp", "dp"])
@pytest.mark.parametrize("tightness", [0.15, 0.4, 0.8])
def test_exact_solvers_equal_brute_force(name: str, tightness: float) -> None:
    for seed in range(12):
        problem = random_problem(seed, groups=3 + seed % 3, tightness=tightness)
        expected, found = brute_force.solve(problem), solver(name)(problem, time_limit_s=20)
        assert (found.levels is None) == (expected.levels is None), seed
        if expected.levels is None:
            assert found.status == "infeasible"
            continue
        assert found.status == "optimal"
        assert found.loss == pytest.approx(expected.loss, rel=2e-4, abs=1e-9), seed
        assert found.levels is not None and is_feasible(problem, found.levels)
        assert found.loss == pytest.approx(float(losses_of(problem, found.levels)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tightness=st.floats(0.05, 1.0), groups=st.integers(1, 4))
def test_what_every_solver_promises(seed: int, tightness: float, groups: int) -> None:
    """Feasible, honest about its loss, and never better than the optimum."""
    problem = random_problem(seed, groups=groups, tightness=tightness)
    best = brute_force.solve(problem)
    for name in list_members("solvers"):
        found: Solution = solver(name)(problem, time_limit_s=20)
        if found.levels is None:
            assert found.status in ("infeasible", "unknown")
            assert best.levels is None or name not in EXACT
            continue
        assert is_feasible(problem, found.levels), name
        assert found.loss == pytest.approx(float(losses_of(problem, found.levels))), name
        assert found.loss >= best.loss - 1e-9, name
        if found.gap is not None:
            assert found.loss * (1 - found.gap) <= best.loss + 1e-7, name


@pytest.mark.parametrize("name", list_members("solvers"))
def test_keeps_everything_when_everything_fits(name: str) -> None:
    problem = random_problem(3, tightness=1.0)
    roomy = Problem(
        choices=problem.choices,
        sums=problem.sums,
        rows=tuple(
            Row(quantity=r.quantity, limit=10 * r.limit, constant=r.constant, unary=r.unary, pairs=r.pairs)
            for r in problem.rows
        ),
    )
    assert solver(name)(roomy, time_limit_s=20).levels == roomy.dense


def test_milp_with_a_tiny_core_still_proves_the_optimum() -> None:
    """The core grows until what is left out cannot matter."""
    for seed in range(10):
        problem = random_problem(seed, groups=5, tightness=0.35)
        expected, found = brute_force.solve(problem), milp.solve(problem, core=1)
        assert found.status == expected.status
        if found.levels is not None:
            assert found.loss == pytest.approx(expected.loss, rel=2e-4)


def test_milp_out_of_time_reports_what_is_proven() -> None:
    problem = random_problem(5, groups=5, tightness=0.4)
    found = milp.solve(problem, time_limit_s=1e-6)
    best = brute_force.solve(problem)
    assert found.status in ("optimal", "feasible", "unknown")
    if found.levels is not None:
        assert found.gap is not None and found.loss * (1 - found.gap) <= best.loss + 1e-9


def test_milp_out_of_time_has_what_greedy_finds() -> None:
    """Not even one relaxed programme with a part of the levels gets to its end."""
    problem = random_problem(4, groups=12)
    opening = greedy.solve(problem)
    with patch.object(milp._Model, "minimise", lambda self, *_, **__: milp._Outcome(None, -np.inf)):
        found = milp.solve(problem, time_limit_s=0.5)
    assert found.levels == opening.levels and found.loss == opening.loss
    assert found.status == "feasible" and found.gap is not None and found.gap > 0


def test_impossible_limits_are_proven_and_measured() -> None:
    problem = random_problem(7, tightness=0.5)
    rows = list(problem.rows)
    least = float(costs_of(problem, [0] * len(problem.choices))[1])
    rows[1] = Row(quantity="artifact_bytes", limit=least / 2, constant=rows[1].constant, pairs=rows[1].pairs)
    impossible = Problem(choices=problem.choices, sums=problem.sums, rows=tuple(rows))
    for name in EXACT:
        assert solver(name)(impossible, time_limit_s=20).status == "infeasible"
    closest = milp.least_excess(impossible)
    every = np.stack(np.meshgrid(*[np.arange(len(c.widths)) for c in problem.choices], indexing="ij"), axis=-1)
    assert closest.loss == pytest.approx(float(excess_of(impossible, every).min()), rel=1e-3)
    assert closest.loss == pytest.approx(2.0, rel=1e-3)


def test_greedy_steps_over_a_flat_stair() -> None:
    """One level down gains nothing; two do."""
    choice = Choice(name="g", widths=np.array([8, 12, 16]), loss=np.array([2.0, 1.0, 0.0]))
    stairs = Row(quantity="latency_s", limit=1.5, unary={0: np.array([1.0, 2.0, 2.0])})
    assert greedy.solve(Problem(choices=(choice,), rows=(stairs,))).levels == (0,)


def chain(width: int, latency: list[float], limit: float, losses: list[list[float]]) -> Problem:
    """Groups of `width` levels of 1, 2, ... units; the cost of neighbours is their product."""
    choices = tuple(
        Choice(name=f"g{v}", widths=np.arange(1, width + 1), loss=np.array(loss)) for v, loss in enumerate(losses)
    )
    pairs = {(v, v + 1): factor * np.outer(*[np.arange(1.0, width + 1)] * 2) for v, factor in enumerate(latency)}
    return Problem(choices=choices, rows=(Row(quantity="latency_s", limit=limit, pairs=pairs),))


def test_one_round_of_the_knapsack_is_exact_where_costs_add_up() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        choices = tuple(
            Choice(name=f"g{v}", widths=np.arange(1, 6), loss=np.sort(rng.uniform(0, 1, 5))[::-1] - 1e-3)
            for v in range(5)
        )
        unary = {v: np.cumsum(rng.integers(1, 20, 5)).astype(float) for v in range(5)}
        limit = float(0.5 * sum(term[-1] for term in unary.values()))
        problem = Problem(choices=choices, rows=(Row(quantity="latency_s", limit=limit, unary=unary),))
        found, best = knapsack.solve(problem, rounds=1), brute_force.solve(problem)
        assert found.status == "feasible" and found.loss == pytest.approx(best.loss)


def test_knapsack_rounds_see_that_neighbours_shrink_together() -> None:
    """Half the cost of a pair: one side halved saves all that is needed, and two halved sides save more than that."""
    problem = chain(4, [1.0], 8.0, [[9.0, 4.0, 1.0, 0.0], [9.0, 4.1, 1.1, 0.0]])
    once, often = knapsack.solve(problem, rounds=1), knapsack.solve(problem, rounds=8)
    assert once.levels is not None and often.levels is not None
    assert float(costs_of(problem, often.levels)[0]) <= 8.0 * (1 + 1e-9)
    assert often.loss <= once.loss
    assert brute_force.solve(problem).loss <= often.loss


def test_knapsack_never_widens_and_gives_up_where_nothing_saves() -> None:
    flat = Row(quantity="latency_s", limit=1.0, unary={0: np.array([2.0, 2.0, 2.0])})
    choice = Choice(name="g", widths=np.array([1, 2, 3]), loss=np.array([2.0, 1.0, 0.0]))
    assert knapsack.solve(Problem(choices=(choice,), rows=(flat,))).status == "unknown"


def random_search(problem: Problem, plays: int, seed: int) -> float:
    """The least loss within the limits of so many configurations drawn at random."""
    rng = np.random.default_rng(seed)
    levels = np.stack([rng.integers(0, len(choice.widths), plays) for choice in problem.choices], axis=1)
    return float(np.where(is_feasible(problem, levels), losses_of(problem, levels), np.inf).min())


def test_bandit_plays_better_than_random_search() -> None:
    """With as many configurations, on ten groups; the optimum from milp is the scale."""
    ours, theirs = [], []
    for seed in range(5):
        problem = random_problem(seed, groups=10, tightness=0.4)
        best = milp.solve(problem).loss
        if not np.isfinite(best):
            continue
        played: list[int] = []
        largest = sum(float(choice.loss.max()) for choice in problem.choices)

        def reward(
            levels: np.ndarray, problem: Problem = problem, largest: float = largest, played: list[int] = played
        ) -> np.ndarray:
            played.append(len(levels))
            return 1 - losses_of(problem, levels) / largest

        found = bandit.solve(problem, reward=reward)
        assert found.levels is not None and is_feasible(problem, found.levels)
        ours.append(found.loss / best)
        theirs.append(min(random_search(problem, sum(played), seed), 10 * best) / best)
    assert len(ours) >= 3 and np.mean(ours) < np.mean(theirs)
    assert np.mean(ours) < 1.25


def test_bandit_finds_the_optimum_of_small_problems() -> None:
    right = 0
    for seed in range(10):
        problem = random_problem(seed, groups=4, tightness=0.5)
        best = brute_force.solve(problem)
        found = bandit.solve(problem)
        right += (found.levels is None) == (best.levels is None) and found.loss <= best.loss * (1 + 1e-9)
    assert right >= 8


def test_bandit_follows_a_reward_that_is_not_the_predicted_loss() -> None:
    """The reward likes the narrowest first group, whatever the losses say; noise does not hide it."""
    problem = chain(4, [1.0, 1.0], 20.0, [[3.0, 2.0, 1.0, 0.0]] * 3)
    rng = np.random.default_rng(0)

    def reward(levels: np.ndarray) -> np.ndarray:
        liked = 0.5 * (levels[:, 0] == 0) + 0.1 * levels[:, 1:].sum(axis=1) / 6
        return liked + rng.uniform(0, 0.02, len(levels))

    found = bandit.solve(problem, reward=reward)
    assert found.levels is not None and found.levels[0] == 0
    assert found.loss == pytest.approx(float(losses_of(problem, found.levels)))
    assert bandit.solve(problem).levels == bandit.solve(problem).levels, "not the same twice"


def test_a_factor_leaves_out_the_worse_arms_and_deals_every_active_one() -> None:
    rng = np.random.default_rng(0)
    factor = bandit._Factor(3, confidence=0.01)
    assert factor.activate(1) == [0, 1, 2]
    for played in range(1, 30):
        arms = factor.deal(factor.activate(played), 5, rng)
        assert len(arms) == 5 and set(factor.activate(played)) <= set(arms.tolist())
        factor.learn(arms, np.array([0.2, 0.9, 0.5])[arms])
    assert factor.activate(30) == [1] and factor.favourite() == 1
    assert factor.deal([1], 4, rng).tolist() == [1, 1, 1, 1]
    assert (factor.differences == -factor.differences.T).all() and (factor.counts == factor.counts.T).all()


def test_brute_force_refuses_too_many() -> None:
    with pytest.raises(UsageError, match="use the milp solver"):
        brute_force.solve(random_problem(0, groups=5), most=3)


def test_dp_gives_up_honestly() -> None:
    assert dp.solve(random_problem(0, groups=5), most=3).status == "unknown"


def test_sums_round_up_to_their_grid() -> None:
    """3 + 4 = 7 costs what 8 costs; every solver that finds the optimum agrees."""
    choices = tuple(Choice(name=n, widths=np.array([1, w]), loss=np.array([1.0, 0.0])) for n, w in (("a", 3), ("b", 4)))
    total = Sum(sizes=np.array([4, 8]), fixed=0, counts=((0, 1), (1, 1)))
    row = Row(quantity="latency_s", limit=5.0, unary={2: np.array([4.0, 8.0])})
    problem = Problem(choices=choices, sums=(total,), rows=(row,))
    assert costs_of(problem, (1, 1)) == pytest.approx([8.0])
    assert costs_of(problem, (1, 0)) == pytest.approx([4.0])
    for name in EXACT:
        assert solver(name)(problem, time_limit_s=20).loss == pytest.approx(1.0)
