"""Run a model until its latency has settled. Copied to the board beside measure.py.

Python 3.9 and numpy, nothing else of edgeprune.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

WARM_UP_BLOCKS = 10
"""The latency has settled when so many blocks of runs in a row show no change."""
WARM_UP_BLOCK_S = 0.008
WARM_UP_LIMIT_S = 3.0
CHANGE_RANKS = 21
"""Pettitt's K that counts as a change: 7 % of ten values in random order reach it, every clean step from the fourth to
the eighth does. A false alarm costs some blocks more."""
CHANGE_SHARE = 0.02
"""By how much the median has to change, too: less is lost in what the board does anyway."""


class WarmUp(NamedTuple):
    """How a warm-up went: typical seconds of a run at its end, runs made, and why it ended.

    ended: `stable`; at the time limit `changing after ... s`, or `too few runs in ... s` to tell whether it was stable.
    """

    run_s: float
    runs: int
    ended: str


def warm_up(
    run: Callable[[], Any], *, limit_s: float = WARM_UP_LIMIT_S, clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Run until the latency has settled: no changepoint in the latest blocks; what lies before one is warm-up.

    limit_s: end then in any case, after at least two runs.
    source: the idea is of Barrett et al., Virtual machine warmup blows hot and cold, OOPSLA 2017; in sequence, with
        a rank test, since a board has to decide while it runs.
    """
    began = clock()
    run()
    blocks: list[float] = []
    runs, changed = 1, False
    while True:
        durations: list[float] = []
        until = clock() + WARM_UP_BLOCK_S
        while not durations or clock() < until:
            before = clock()
            run()
            durations.append(clock() - before)
        runs += len(durations)
        blocks.append(max(statistics.median(durations), 1e-7))
        full = len(blocks) == WARM_UP_BLOCKS
        change = find_change(blocks) if full else None
        if full and change is None:
            return WarmUp(statistics.median(blocks), runs, "stable")
        if change is not None:
            changed = True
            del blocks[:change]
        if clock() - began > limit_s:
            ended = f"changing after {limit_s:g} s" if changed else f"too few runs in {limit_s:g} s"
            return WarmUp(statistics.median(blocks), runs, ended)


def find_change(blocks: list[float]) -> int | None:
    """Where ten values in order of time change to another level; None where they do not.

    returns: the place of the first value of the new level, in [1, 9].
    source: Pettitt, A non-parametric approach to the change-point problem, Applied Statistics 28 (1979) 126, eq. 2.
    """
    values = np.asarray(blocks)
    # U(t): by how much the first t values outrank the others.
    ranks = np.cumsum(np.sign(np.subtract.outer(values, values)).sum(axis=1))[:-1]
    place = int(np.argmax(np.abs(ranks))) + 1
    share = np.median(values[place:]) / np.median(values[:place]) - 1
    return place if abs(ranks[place - 1]) >= CHANGE_RANKS and abs(share) > CHANGE_SHARE else None
