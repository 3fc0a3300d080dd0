"""Statistics of repeated timings: medians with intervals.

Latency samples are skewed and have a heavy upper tail (interrupts, clock changes), so everything
here rests on ranks. Random resampling is seeded: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgeprune.core.errors import DataError
from edgeprune.core.records import Distribution, FloatArray, Quantity, Samples

FEWEST_FOR_MODES = 30
BLOCKS = 20
FEWEST_CLEAN = 5


def _array(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0 or not np.isfinite(array).all():
        raise DataError("statistics need at least one finite sample; measure again")
    return array


def median(values: npt.ArrayLike) -> float:
    """Middle sample. raises: DataError when there is none or one is not finite."""
    return float(np.median(_array(values)))


def p95(values: npt.ArrayLike) -> float:
    """The sample that 95 % do not exceed (linear interpolation)."""
    return float(np.percentile(_array(values), 95))


def statistic(values: npt.ArrayLike, name: str) -> float:
    """`median` or `p95`, as `Budget.statistic` names them."""
    return p95(values) if name == "p95" else median(values)


def bootstrap_interval(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median.

    confidence: in (0, 1). returns: (low, high) in the samples' unit; a point for a single sample.
    source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
    """
    array = _array(values)
    picks = np.random.default_rng(seed).integers(0, array.size, (resamples, array.size))
    medians = np.median(array[picks], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def quantity(values: npt.ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Quantity:
    """Median of samples with its bootstrap interval."""
    low, high = bootstrap_interval(values, confidence=confidence, seed=seed)
    return Quantity(median=median(values), low=low, high=high)


def round_ratio(rounds: Sequence[npt.ArrayLike], *, confidence: float = 0.99) -> Quantity:
    """The typical ratio over rounds that opened both models anew, with Student's interval of its logarithm.

    rounds: per round the ratios of neighbouring turns; at least two rounds. Turns of one round share
    what opening a model decides (where its buffers lie), so that rounds are what is independent.
    """
    from scipy.stats import t

    logs = np.log([median(ratios) for ratios in rounds])
    if len(logs) < 2:
        raise DataError("an interval needs at least two rounds; measure with more effort")
    center = float(np.mean(logs))
    reach = float(t.ppf((1 + confidence) / 2, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs)))
    return Quantity(median=float(np.exp(center)), low=float(np.exp(center - reach)), high=float(np.exp(center + reach)))


def pooled_ratio(rounds: Sequence[npt.ArrayLike]) -> Quantity:
    """The median of all ratios; its 95 % interval is that of rounds (`round_ratio`) where there are several.

    rounds: as for `round_ratio`, at least one.
    """
    pooled = quantity(np.concatenate([_array(ratios) for ratios in rounds]))
    if len(rounds) < 2:
        return pooled
    interval = round_ratio(rounds, confidence=0.95)
    return Quantity(median=pooled.median, low=min(interval.low, pooled.median), high=max(interval.high, pooled.median))


def over_inputs(
    samples: Sequence[Samples], against: Sequence[Samples], gates: Mapping[str, npt.ArrayLike]
) -> Distribution:
    """What is typical of each input, and how that is spread over the inputs.

    samples, against: a round each, with the latency of each input, and of the other model beside it, in one order;
        where time was short a round has fewer inputs, the first ones, and those of all rounds count.
    gates: gate -> whether it runs, for each input and maybe more. Inputs for which the same gates run take the same
        time, so that the slowest is told from all that go its way: the largest of many noisy numbers would be noise.
    """
    common = min(len(each.values) for each in (*samples, *against))
    values, others = (np.asarray([each.values[:common] for each in rounds]) for rounds in (samples, against))
    latencies, shares = np.median(values, axis=0), np.median(values / others, axis=0)
    runs = {name: np.asarray(ran, dtype=bool)[:common] for name, ran in gates.items()}
    ways = np.unique(np.stack([*runs.values()], axis=1), axis=0, return_inverse=True)[1] if runs else np.arange(common)
    worst = max(range(common), key=lambda place: float(np.median(shares[ways == ways[place]])))
    slowest = ways == ways[worst]
    return Distribution(
        mean_s=float(latencies.mean()), median_s=median(latencies), p95_s=p95(latencies),
        worst_s=median(latencies[slowest]), mean_share=float(shares.mean()), worst_share=median(shares[slowest]),
        latencies_s=tuple(latencies.tolist()), shares=tuple(shares.tolist()),
        gates={name: float(ran.mean()) for name, ran in runs.items()},
    )  # fmt: skip


def find_modes(values: npt.ArrayLike) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The two speeds that samples jump between: (share, median) of the fast and the slow one; None where it is one.

    A kernel density with two peaks at least 5 % apart, each of at least a tenth of the samples, and
    between them a valley below 60 % of the lower one. Fewer than 30 samples cannot tell.
    source: bandwidth by Silverman, Density Estimation (1986), eq. 3.31.
    """
    logs = np.sort(np.log(_array(values)))
    count = len(logs)
    if count < FEWEST_FOR_MODES:
        return None
    # Far outliers are interruptions, not a speed, and would flatten the grid.
    logs = logs[: max(FEWEST_FOR_MODES, int(0.98 * count))]
    spread = min(float(np.std(logs)), float(np.subtract(*np.percentile(logs, [75, 25]))) / 1.34) or float(np.std(logs))
    if spread == 0:
        return None
    bandwidth = 0.9 * spread * len(logs) ** -0.2
    grid = np.linspace(logs[0], logs[-1], 256)
    density = np.exp(-0.5 * ((grid[:, None] - logs[None, :]) / bandwidth) ** 2).sum(axis=1)
    peaks = [i for i in range(1, 255) if density[i - 1] < density[i] >= density[i + 1]]
    peaks += [i for i, inner in ((0, 1), (255, 254)) if density[i] > density[inner]]
    best: tuple[float, int] | None = None
    for left in peaks:
        for right in peaks:
            if grid[right] - grid[left] < np.log(1.05):
                continue
            valley = left + int(np.argmin(density[left : right + 1]))
            below = int(np.searchsorted(logs, grid[valley]))
            depth = density[valley] / min(density[left], density[right])
            if depth < 0.6 and min(below, len(logs) - below) >= 0.1 * len(logs) and (best is None or depth < best[0]):
                best = (float(depth), below)
    if best is None:
        return None
    fast, slow = logs[: best[1]], logs[best[1] :]
    share = len(fast) / len(logs)
    return (share, float(np.exp(np.median(fast)))), (1 - share, float(np.exp(np.median(slow))))


def find_drift(values: npt.ArrayLike) -> float | None:
    """Relative change from the first to the last of samples in order of time; None where there is no trend.

    A trend: Kendall's rank correlation with time of p < 0.001, and a Theil-Sen slope of at least 3 % over all.
    """
    from scipy.stats import kendalltau, theilslopes

    array = _array(values)
    if len(array) < FEWEST_FOR_MODES:
        return None
    # Medians of blocks: neighbours are alike, and Kendall's test takes samples for independent.
    blocks = np.array([np.median(block) for block in np.array_split(array, BLOCKS)])
    place = np.arange(BLOCKS)
    change = float(theilslopes(blocks, place)[0] * (BLOCKS - 1) / np.median(blocks))
    return change if kendalltau(place, blocks).pvalue < 0.001 and abs(change) >= 0.03 else None


def turn_medians(samples: Samples) -> FloatArray:
    """The median of each turn: what is independent when two models are measured in turns."""
    return np.asarray(np.median(_array(samples.values).reshape(-1, samples.per_turn), axis=1), dtype=np.float64)


def clean_turns(samples: Samples) -> FloatArray:
    """`turn_medians` of turns that no other process interrupted; of all where those are fewer than five."""
    return _without(turn_medians(samples), samples.interrupted)


def _without(values: FloatArray, places: Sequence[int]) -> FloatArray:
    clean = np.ones(len(values), dtype=bool)
    clean[list(places)] = False
    return values[clean] if clean.sum() >= FEWEST_CLEAN else values


def _without_order(ratios: FloatArray) -> FloatArray:
    """Geometric means of two successive ratios, which were measured in opposite order.

    Who goes first follows its own turn and finds the caches as it left them: some percent, in the ratio once up and
    once down.
    """
    pairs = len(ratios) // 2
    return np.sqrt(ratios[: 2 * pairs : 2] * ratios[1::2][:pairs]) if pairs else ratios


def turn_ratios(samples: Samples, against: Samples) -> FloatArray:
    """How many times as long as its neighbour each turn took, without what other processes took of them.

    From the processor time of the thread where that is the whole work. Else from the clock, of neighbours that
    no other process interrupted; of all where those are fewer than five.
    raises: DataError when the two were not measured in turns with each other.
    """
    ours, theirs = turn_medians(samples), turn_medians(against)
    if len(ours) != len(theirs):
        raise DataError("samples of different numbers of turns cannot be compared; measure both together")
    if len(samples.at_work) == len(ours) == len(against.at_work):
        return _without_order(_array(samples.at_work) / _array(against.at_work))
    return _without(ours / theirs, (*samples.interrupted, *against.interrupted))
