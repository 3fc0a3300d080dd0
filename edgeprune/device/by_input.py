"""Latency of each of many inputs, for models that do not take the same for all. Copied to the board beside measure.py.

Python 3.9, nothing else of edgeprune.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

MIN_ROUNDS = 2
"""Over all inputs; the steps of a measurement repeat it."""
FEWEST_INPUTS = 8
MOST_SAMPLES = 20_000

Run = Callable[[Any], Any]


def time_inputs(
    runs: Sequence[Run], feeds: Sequence[Any], seconds: float, *, run_s: float, loops: int, working: bool, steady: bool
) -> tuple[list[list[float]], int]:
    """Typical latency of each input in every model, seconds; and how many rounds over the inputs that took.

    Rounds over all inputs, in another order each time; the models in turns for each of them. A timed run follows one
    that is not timed, of the same input and model, so that caches are as in a stream of inputs.

    runs: the models. feeds: as many of them take part, the first ones, as fit into `seconds`; all where it is steady,
    for which no time is planned. run_s: of the slowest model. loops: runs in a row that make one sample.
    working: whether the runtimes work in this thread, so that its processor time is without interruptions.
    steady: a run takes the same time every time.
    """
    if not steady:
        each_s = len(runs) * (1 + loops) * run_s
        feeds = feeds[: max(FEWEST_INPUTS, int(seconds / (MIN_ROUNDS * each_s)))]
    clock = time.thread_time_ns if working else time.perf_counter_ns
    shuffled = random.Random(0)  # noqa: S311 an order, no secret
    values: list[list[list[float]]] = [[[] for _ in feeds] for _ in runs]

    rounds, limit = 0, time.perf_counter() + seconds
    while rounds < MIN_ROUNDS or (time.perf_counter() < limit and rounds * len(feeds) < MOST_SAMPLES):
        for place in shuffled.sample(range(len(feeds)), len(feeds)):
            for run, mine in zip(runs, values):  # noqa: B905
                run(feeds[place])
                began = clock()
                for _ in range(loops):
                    run(feeds[place])
                mine[place].append((clock() - began) * 1e-9 / loops)
        rounds += 1
        if steady:
            break
    return [[statistics.median(each) for each in mine] for mine in values], rounds
