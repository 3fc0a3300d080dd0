"""Closing the loop on the board: what to ask of the tables next, until the measured latency fits.

Tables are never exact. The planned network is measured, and the next request is corrected by what
was found, until the measurement lies just within the budget or no plan lies nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from edgeprune.core.budget import format_seconds
from edgeprune.core.records import Budget, Plan, PlanRound
from edgeprune.core.stats import median

LOWEST_SHARE = 0.97
"""A measured latency below this share of the budget asks for a finer step, or a reason why there is none."""

HIGHEST_SHARE = 0.995
"""The loop is content up to this share, on a board whose timings repeat."""

WINDOW = LOWEST_SHARE / HIGHEST_SHARE
"""It is content from this share of what it is content with."""

MOST_REACH = 0.08
"""Intervals wider than this, relative, are taken for this wide: they tell of few rounds rather than of the board."""

AIM = 0.988
"""Share of what it is content with that the loop aims at: the middle between the two."""

CORRECTED_AIM = 0.99
RESOLUTION = 1e-3
"""Relative distance of two requests below which they are one."""


def next_request(rounds: Sequence[PlanRound], budget: Budget) -> float | None:
    """The latency to ask of the tables next, so that the measured one comes within the budget.

    rounds: what was asked, predicted and measured so far, in order; none yet: what to ask first.
    returns: seconds, or None when the loop is over: the last plan measured comfortably within the
             budget and close to it, or there is no finer step (`no_finer_step` says why).

    The ratio of measured to predicted corrects the next request. Requests stay between those that
    gave too fast a plan and the prediction of the fastest plan that was too slow. Where no request
    below the budget is left, one above it is made, so that the end rests on a measured neighbour.
    """
    if budget.latency_s is None:
        return None
    if not rounds:
        return HIGHEST_SHARE * AIM * budget.latency_s
    last = rounds[-1]
    limit = comfortable(rounds, budget.latency_s)
    if WINDOW * limit <= last.measured.median <= limit:
        return None
    low, high = _bracket(rounds, limit)
    above = low * (1 + RESOLUTION)
    top = last.predicted_s * limit / last.measured.median
    aimed = top * AIM
    repeated = any(earlier.widths == last.widths for earlier in rounds[:-1])
    if last.measured.median > limit:
        request = aimed if aimed > above else (low + high) / 2
    elif high < inf:
        request = aimed if above < aimed < high and not repeated else high * (1 - RESOLUTION / 2)
    elif not repeated and aimed > above:
        request = aimed
    elif top > above:
        request = top
    elif repeated and (last.asked_s or 0.0) > top * (1 + RESOLUTION):
        return None
    else:
        request = low * limit / last.measured.median
    return request if above < request < high else None


def comfortable(rounds: Sequence[PlanRound], limit: float) -> float:
    """The longest measured latency that is still within `limit`, seconds, when it is measured again at validation.

    The upper end of its interval has to be within, too. How far intervals reach is typical of the board and its
    company, so all rounds are asked: of a few rounds one interval is short or long by chance.
    """
    reach = median([r.measured.high / r.measured.median - 1 for r in rounds])
    return limit * min(HIGHEST_SHARE, 1 / (1 + min(reach, MOST_REACH)))


def corrected_limit(limit: float | None, predicted: float | None, measured: float | None) -> float | None:
    """What to ask of the model of memory or energy next after a plan took more than `limit`; None where it did not.

    As for latency the ratio of measured to predicted corrects it, with a per cent to spare.
    """
    if limit is None or predicted is None or measured is None or measured <= limit:
        return None
    return CORRECTED_AIM * predicted * limit / measured


def best_round(rounds: Sequence[PlanRound], limit: float) -> int:
    """Index of the slowest round that is comfortably within `limit`, else of the slowest within, else of the fastest.

    rounds: at least one. limit: seconds.
    """
    measured = [r.measured.median for r in rounds]
    near = comfortable(rounds, limit)
    for most, least in ((near, WINDOW * near), (limit, 0.0)):
        within = [i for i, seconds in enumerate(measured) if seconds <= most]
        if within and max(measured[i] for i in within) >= least:
            return max(within, key=measured.__getitem__)
    return min(range(len(rounds)), key=measured.__getitem__)


def no_finer_step(rounds: Sequence[PlanRound], budget: Budget) -> str | None:
    """Why the closed loop ended below LOWEST_SHARE of the latency budget, or above it; None where it did not."""
    limit = budget.latency_s
    if limit is None or not rounds:
        return None
    slow = [r for r in rounds if r.measured.median > limit]
    asked = f"asked of the tables: {', '.join(format_seconds(r.asked_s or 0.0) for r in rounds)}"
    best = rounds[best_round(rounds, limit)].measured.median
    if best > limit:
        return f"no plan measured within {format_seconds(limit)}; the fastest took {format_seconds(best)} ({asked})"
    if best >= LOWEST_SHARE * limit:
        return None
    reached = f"the plan measured {format_seconds(best)}, {best / limit:.1%} of the budget"
    near = comfortable(rounds, limit)
    if best >= WINDOW * near:
        return (
            f"{reached}; a repeated measurement may come out {limit / near - 1:.1%} slower on this board, so nothing"
            " nearer would be sure to hold"
        )
    if slow:
        above = min(r.measured.median for r in slow)
        return (
            f"{reached}; the next plan above it takes {format_seconds(above)} and nothing was found between ({asked})"
        )
    return f"{reached}; more latency buys no lower predicted loss within the other budgets ({asked})"


def _bracket(rounds: Sequence[PlanRound], limit: float) -> tuple[float, float]:
    """Highest request that gave a plan within the limit, least prediction of one that was not.

    Tables that were corrected in between may make them cross; then only the last round counts.
    """
    low = max((r.asked_s or 0.0 for r in rounds if r.measured.median <= limit), default=0.0)
    high = min((r.predicted_s for r in rounds if r.measured.median > limit), default=inf)
    if low < high:
        return low, high
    last = rounds[-1]
    return (last.asked_s or 0.0, inf) if last.measured.median <= limit else (0.0, last.predicted_s)


def taken_round(plan: Plan) -> PlanRound | None:
    """The turn of the closed loop that a plan came from; None when there was none."""
    return next((turn for turn in reversed(plan.rounds) if turn.widths == plan.widths), None)
