"""Statistics of repeated timings: medians with intervals, outliers, drift.

Latency samples are skewed and have a heavy upper tail (interrupts, clock changes), so everything
here rests on ranks. Random resampling is seeded: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeprune.core.errors import DataError
from edgeprune.core.records import FloatArray, Quantity

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution, as a multiple of its standard deviation."""


def _array(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0 or not np.isfinite(array).all():
        raise DataError("statistics need at least one finite sample; measure again")
    return array


def median(values: npt.ArrayLike) -> float:
    """Middle sample. raises: DataError when there is none or one is not finite."""
    return float(np.median(_array(values)))


def iqr(values: npt.ArrayLike) -> float:
    """Distance between the quartiles, in the samples' unit."""
    low, high = np.percentile(_array(values), [25, 75])
    return float(high - low)


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


def inliers(values: npt.ArrayLike, *, limit: float = 5.0) -> npt.NDArray[np.bool_]:
    """Mask of samples within `limit` robust standard deviations of the median.

    With more than half of the samples equal the deviation is 0 and only those are kept.
    source: Iglewicz & Hoaglin, How to Detect and Handle Outliers (1993).
    """
    array = _array(values)
    distance = np.abs(array - np.median(array))
    return np.asarray(distance <= limit * MAD_TO_SIGMA * np.median(distance), dtype=np.bool_)


def interpolate_drift(positions: Sequence[float], anchors: Sequence[float], at: Sequence[float]) -> FloatArray:
    """Factor by which the board was slower than usual at each place of a run.

    positions, anchors: where in the run the anchor was measured and what it took (s), any order.
    at: the places asked for. returns: (len(at),), 1 = as usual; divide a timing by it.
    """
    times = _array(anchors)
    order = np.argsort(positions)
    return np.interp(at, np.asarray(positions, dtype=np.float64)[order], times[order] / np.median(times))


def drifted(anchors: npt.ArrayLike, *, limit: float = 0.1) -> bool:
    """Whether repeated timings of one thing spread by more than `limit` of their median (IQR)."""
    return iqr(anchors) > limit * median(anchors)
