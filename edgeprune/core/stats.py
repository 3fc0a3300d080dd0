"""Statistics of repeated timings: medians with intervals.

Latency samples are skewed and have a heavy upper tail (interrupts, clock changes), so everything
here rests on ranks. Random resampling is seeded: the same samples give the same interval.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeprune.core.errors import DataError
from edgeprune.core.records import FloatArray, Quantity, Samples


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


def turn_medians(samples: Samples) -> FloatArray:
    """The median of each turn: what is independent when two models are measured in turns."""
    return np.asarray(np.median(_array(samples.values).reshape(-1, samples.per_turn), axis=1), dtype=np.float64)


def turn_ratios(samples: Samples, against: Samples) -> FloatArray:
    """How many times as long as its neighbour each turn took.

    raises: DataError when the two were not measured in turns with each other.
    """
    ours, theirs = turn_medians(samples), turn_medians(against)
    if len(ours) != len(theirs):
        raise DataError("samples of different numbers of turns cannot be compared; measure both together")
    return np.asarray(ours / theirs, dtype=np.float64)
