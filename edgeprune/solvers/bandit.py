"""Factored bandits: every group is a factor, every width an arm, and all factors learn from the same plays.

Temporary elimination (TEA: Zimmert and Seldin, NeurIPS 2018, arXiv:1807.01488). In a round every factor
deals its active arms out over a few joint actions at random; two arms are compared by their mean rewards
within the round, where the other factors play alike against both; an arm that is worse with confidence
is left out for the time being.

The algorithm assumes that a factor's best arm is the best whatever the others play. A shared limit breaks
that, so the limits get a weight (ours): the reward is

    (1 - weight) x value + weight x (1 - cost),   cost: the largest cost / limit, scaled to [0, 1],

and the weight is bisected for the least at which the best arms meet the limits. Every play that meets
them is remembered, so the answer is the best of those.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, islice

import numpy as np

from edgeprune.core.problem import TOLERANCE, Problem, excess_of, losses_of
from edgeprune.core.records import FloatArray, IntArray
from edgeprune.solvers import Solution

Reward = Callable[[IntArray], FloatArray]
"""Levels (plays, groups) -> value (plays,) in [0, 1], larger = better; it may be measured, and noisy."""


def solve(
    problem: Problem,
    *,
    time_limit_s: float = 20.0,
    reward: Reward | None = None,
    weights: int = 12,
    rounds: int = 40,
    confidence: float = 0.005,
    seed: int = 0,
) -> Solution:
    """The best configuration within the limits that was played.

    reward:     value of configurations, such as their accuracy; by default 1 - loss / largest loss, as predicted.
    weights:    of the limits, to try; each takes `rounds` rounds of as many plays as a group has levels, at most.
    confidence: factor of the squared radius. 12 in the paper, for rewards of any noise; with predicted losses
        the only noise is the other factors' plays, and so little decides best on small problems (ours).
    """
    start = time.perf_counter()
    largest = max(sum(float(choice.loss.max()) for choice in problem.choices), float(np.finfo(float).tiny))
    game = _Game(problem, reward or (lambda plays: 1 - losses_of(problem, plays) / largest))
    rng = np.random.default_rng(seed)
    low, high = 0.0, 1.0
    for _ in range(weights):
        if time.perf_counter() - start > time_limit_s:
            break
        weight = (low + high) / 2
        factors = [_Factor(len(choice.widths), confidence) for choice in problem.choices]
        for played in range(1, rounds + 1):
            hands = [factor.activate(played) for factor in factors]
            plays = max(len(hand) for hand in hands)
            dealt = np.stack([f.deal(hand, plays, rng) for f, hand in zip(factors, hands, strict=True)], axis=1)
            rewards = game.play(dealt, weight)
            for factor, arms in zip(factors, dealt.T, strict=True):
                factor.learn(arms, rewards)
        favourite = np.array([[factor.favourite() for factor in factors]])
        game.play(favourite, weight)
        low, high = (low, weight) if bool(excess_of(problem, favourite)[0] <= 1 + TOLERANCE) else (weight, high)
    seconds = time.perf_counter() - start
    if game.best is None:
        return Solution(levels=None, loss=np.inf, status="unknown", seconds=seconds)
    return Solution(
        levels=tuple(game.best.tolist()),
        loss=float(losses_of(problem, game.best)),
        status="feasible",
        seconds=seconds,
    )


class _Game:
    """Plays joint actions, and remembers the best that met the limits."""

    def __init__(self, problem: Problem, value: Reward) -> None:
        self.problem, self.value = problem, value
        self.best: IntArray | None = None
        self.highest = -np.inf
        ends = np.array([problem.dense, [0] * len(problem.choices)])
        self.most, self.least = (float(excess) for excess in excess_of(problem, ends))
        self.play(ends, 0.0)

    def play(self, levels: IntArray, weight: float) -> FloatArray:
        """(plays,) rewards in [0, 1]."""
        values, excess = self.value(levels), excess_of(self.problem, levels)
        within = np.where(excess <= 1 + TOLERANCE, values, -np.inf)
        if (found := within.max()) > self.highest:
            self.highest, self.best = float(found), levels[int(within.argmax())].copy()
        cost = (excess - self.least) / max(self.most - self.least, float(np.finfo(float).tiny))
        rewards: FloatArray = (1 - weight) * values + weight * (1 - cost.clip(0, 1))
        return rewards


class _Factor:
    """Temporary elimination among the arms of one factor.

    differences[i, j]: sum of (mean of i - mean of j) over rounds, each counted as often as the rarer of
    the two was played; counts[i, j]: these numbers. favoured: arms that have never been left out, if any.
    """

    def __init__(self, arms: int, confidence: float) -> None:
        self.confidence, self.favoured = confidence, list(range(arms))
        self.differences, self.counts = np.zeros((arms, arms)), np.zeros((arms, arms))

    def activate(self, played: int) -> list[int]:
        """The arms that no other beats with confidence in this round; all until every pair has met."""
        arms = len(self.counts)
        others = ~np.eye(arms, dtype=bool)
        active = list(range(arms))
        if arms > 1 and (self.counts[others] > 0).all():
            counts = np.where(others, self.counts, 1.0)
            inside = np.log(np.maximum(2 * arms * _growth(counts) * _growth(played), 1.0))
            ahead = self.differences / counts - np.sqrt(self.confidence * inside / counts)
            beaten = (np.where(others, ahead, -np.inf) > 0).any(axis=0)
            active = np.flatnonzero(~beaten).tolist() or active
        self.favoured = [arm for arm in self.favoured if arm in active] or active
        return active

    def deal(self, active: list[int], plays: int, rng: np.random.Generator) -> IntArray:
        """(plays,) arms in random order: every active one, then the favoured in turn."""
        arms = [*active, *islice(cycle(self.favoured), plays - len(active))]
        return rng.permutation(np.array(arms, dtype=np.int64))

    def learn(self, arms: IntArray, rewards: FloatArray) -> None:
        """Compare the arms that were played in one round."""
        number = np.bincount(arms, minlength=len(self.counts))
        mean = np.bincount(arms, weights=rewards, minlength=len(self.counts)) / np.maximum(number, 1)
        pairs = np.minimum(number[:, None], number[None, :])
        self.counts += pairs
        self.differences += pairs * (mean[:, None] - mean[None, :])

    def favourite(self) -> int:
        """The arm whose worst comparison is the best."""
        ahead = self.differences / np.maximum(self.counts, 1)
        return int(ahead.min(axis=1).argmax())


def _growth(t: FloatArray | float) -> FloatArray:
    """f(t) = (t + 1) log²(t + 1); that it stands inside the logarithm is recalled, not checked in the paper."""
    grown: FloatArray = (np.asarray(t) + 1.0) * np.log(np.asarray(t) + 1.0) ** 2
    return grown
